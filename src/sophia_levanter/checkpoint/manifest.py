"""The manifest of a checkpoint, which lists its arrays and files with digests that detect damage."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from sophia_levanter.errors import InputError

FORMAT = 2
FILE_NAME = "manifest.json"
MOST_DEPTH = 50  # maximum nesting depth of the metadata
_YEAR_9999 = 253_370_764_800
_FOLDER = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,200}")
_DIGEST_LINE = '{{"digest": "{}",'

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"
Box: TypeAlias = tuple[tuple[int, int], ...]  # a part of an array: (start, stop) along each axis


class CheckpointError(Exception):
    """Raised if a checkpoint cannot be written or read. The message is one line that names the leaf and the file."""


@dataclasses.dataclass(frozen=True)
class SavedArray:
    """The description of one saved leaf of the tree.

    Attributes:
        path: its path in the tree.
        folder: the name of its folder in the checkpoint.
        shape, dtype, chunk_shape: as in zarr.json.
        header: the digest of zarr.json.
        chunks: the digest of each chunk, keyed by file name. It covers the bytes of the array (row-major,
            little-endian), so it does not depend on how the chunk is encoded in storage.
    """

    path: str
    folder: str
    shape: tuple[int, ...]
    dtype: str
    chunk_shape: tuple[int, ...]
    header: str
    chunks: dict[str, str]

    def chunk_name(self, box: Box) -> str:
        return ".".join(["c", *(str(start // size) for (start, _), size in zip(box, self.chunk_shape, strict=True))])

    def boxes(self) -> Iterator[Box]:
        """Yield the part of the array in each chunk. All parts have the same size: shards divide arrays evenly."""
        grid = (size // chunk for size, chunk in zip(self.shape, self.chunk_shape, strict=True))
        for index in np.ndindex(*grid):
            yield tuple((i * chunk, (i + 1) * chunk) for i, chunk in zip(index, self.chunk_shape, strict=True))

    @property
    def num_chunks(self) -> int:
        return math.prod(size // chunk for size, chunk in zip(self.shape, self.chunk_shape, strict=True))

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.numpy_dtype).itemsize

    @property
    def numpy_dtype(self) -> np.dtype:
        import tensorstore as ts  # supports bfloat16

        return ts.dtype(self.dtype).numpy_dtype


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint.

    Attributes:
        run_id: the id of the run that saved it.
        step: the number of steps taken.
        saved_at: the time of the save, in seconds since the Unix epoch.
        metadata: data about the run, as JSON.
        folder: the name of the folder of arrays, which is next to the manifest.
        arrays: the saved leaves.
    """

    run_id: str
    step: int
    saved_at: float
    metadata: dict[str, JSON]
    folder: str
    arrays: list[SavedArray]


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest as JSON. The first line contains a digest of all bytes after it."""
    body = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1).removeprefix("{").encode()
    return f"{_DIGEST_LINE.format(_digest(body))}".encode() + body


def decode_manifest(file: str, content: bytes) -> Manifest:
    """Decode and check the content of the manifest `file`, which is named in messages.

    Raises:
        CheckpointError: if the manifest is damaged.
        InputError: if it was written by another version of this package.
    """
    head, newline, rest = content.partition(b"\n")
    whole = head.decode(errors="replace") == _DIGEST_LINE.format(_digest(newline + rest))
    try:
        body = json.loads(content)
        digest, version = body.pop("digest"), body.pop("format", None)
        if not whole:  # in format 1, the digest covers the JSON with sorted keys
            whole = version == 1 and digest == _digest(json.dumps(body | {"format": 1}, sort_keys=True).encode())
        if whole and version == FORMAT:
            return _manifest_of(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if whole:
            raise CheckpointError(f"{file} is not a checkpoint manifest: {one_line(error)}") from error
    if not whole:
        raise CheckpointError(f"{file}: the digest does not match the contents")
    raise InputError(f"{file} is not in format {FORMAT}; read it with the version of this package that wrote it")


def _manifest_of(body: dict[str, Any]) -> Manifest:
    """Build a manifest from JSON, and check its values.

    A valid digest alone does not prove that `encode_manifest` wrote the file.
    """
    manifest = Manifest(**body | {"arrays": [_array_of(entry) for entry in body["arrays"]]})
    _check(isinstance(manifest.run_id, str), "run_id is not a string")
    _check(type(manifest.step) is int and 0 <= manifest.step < 2**63, "step is not a non-negative integer")
    _check(
        type(manifest.saved_at) in (int, float) and 0 <= manifest.saved_at < _YEAR_9999, "saved_at is not a timestamp"
    )
    _check(bool(_FOLDER.fullmatch(manifest.folder)), "folder is not a valid folder name")
    _check(len({a.path for a in manifest.arrays}) == len(manifest.arrays), "two arrays have the same path")
    _check(isinstance(manifest.metadata, dict), "metadata is not an object")
    level: list[Any] = [manifest.metadata]
    for _ in range(MOST_DEPTH):
        trees = [tree.values() if isinstance(tree, dict) else tree for tree in level if isinstance(tree, dict | list)]
        level = [value for tree in trees for value in tree]
    _check(not level, "metadata is nested too deeply")
    return manifest


def _array_of(entry: dict[str, Any]) -> SavedArray:
    array = SavedArray(**entry | {name: tuple(entry[name]) for name in ("shape", "chunk_shape")})
    texts = (array.path, array.header, *array.chunks, *array.chunks.values())
    _check(all(isinstance(text, str) for text in texts), "a path or a digest is not a string")
    _check(bool(_FOLDER.fullmatch(array.folder)), f"folder of {array.path} is not a valid folder name")
    _check(
        all(type(size) is int for size in array.shape + array.chunk_shape),
        f"shape of {array.path} contains a non-integer",
    )
    grid = zip(array.shape, array.chunk_shape, strict=True)
    _check(
        all(size >= 0 and chunk > 0 and not size % chunk for size, chunk in grid), f"chunks do not divide {array.path}"
    )
    _check(array.numpy_dtype.kind != "O", f"dtype of {array.path} is not numeric")
    _check(array.num_bytes < 2**60, f"{array.path} is too large")
    return array


def _check(is_sound: bool, problem: str) -> None:
    if not is_sound:
        raise ValueError(problem)


def one_line(error: Exception) -> str:
    """Return an error's message without tensorstore's source locations, or the error's type if the message is empty."""
    return " ".join(str(error).split(" [source locations=")[0].split()) or type(error).__name__


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
