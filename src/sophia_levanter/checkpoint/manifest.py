"""The manifest of a checkpoint: what must be there, and the digests that tell whether it is."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from sophia_levanter.errors import InputError

FORMAT = 2
FILE_NAME = "manifest.json"
_DIGEST_LINE = '{{"digest": "{}",'

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"
Box: TypeAlias = tuple[tuple[int, int], ...]  # a part of an array: (start, stop) along each axis


class CheckpointError(Exception):
    """A checkpoint could not be written, or none could be read. The message is one line with the leaf and the file."""


@dataclasses.dataclass(frozen=True)
class SavedArray:
    """One leaf of the tree.

    Attributes:
        path: its name in the tree.
        folder: where it lies among the checkpoint's arrays.
        shape, dtype, chunk_shape: as in zarr.json.
        header: digest of the file zarr.json.
        chunks: digests of the chunks by file name, each of the array's own bytes (row-major, little-endian), so that a
            chunk can be checked wherever the storage splits or wraps it.
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
        """The part of the array that each chunk holds. All are of one size: the shards of an array divide it."""
        grid = (size // chunk for size, chunk in zip(self.shape, self.chunk_shape, strict=True))
        for index in np.ndindex(*grid):
            yield tuple((i * chunk, (i + 1) * chunk) for i, chunk in zip(index, self.chunk_shape, strict=True))

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.numpy_dtype).itemsize

    @property
    def numpy_dtype(self) -> np.dtype:
        import tensorstore as ts  # which knows bfloat16

        return ts.dtype(self.dtype).numpy_dtype


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        run_id: of the run that saved it.
        step: steps taken.
        saved_at: seconds since 1970.
        metadata: whatever the run wants to find again.
        folder: the one beside the manifest that holds the arrays.
        arrays: the leaves.
    """

    run_id: str
    step: int
    saved_at: float
    metadata: dict[str, JSON]
    folder: str
    arrays: list[SavedArray]


def encode_manifest(manifest: Manifest) -> bytes:
    """The file's content: JSON, whose first line is a digest of all the bytes after it."""
    body = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1).removeprefix("{").encode()
    return f"{_DIGEST_LINE.format(_digest(body))}".encode() + body


def decode_manifest(file: str, content: bytes) -> Manifest:
    """The manifest in a file's content.

    Args:
        file: its name, for messages.
        content: its bytes.

    Raises:
        CheckpointError: if it is damaged.
        InputError: if another version of this package wrote it.
    """
    head, newline, rest = content.partition(b"\n")
    if head.decode(errors="replace") == _DIGEST_LINE.format(_digest(newline + rest)):
        body = json.loads(content)
    else:
        body = _of_another_format(content)
        if body is None:
            raise CheckpointError(f"{file}: its digest does not match its contents")
    if body.pop("format", None) != FORMAT:
        raise InputError(f"{file} is not in format {FORMAT}: read it with the version of this package that wrote it")
    body.pop("digest")
    try:
        arrays = [
            SavedArray(**{**entry, "shape": tuple(entry["shape"]), "chunk_shape": tuple(entry["chunk_shape"])})
            for entry in body.pop("arrays")
        ]
        return Manifest(**body, arrays=arrays)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: it is no manifest of a checkpoint: {one_line(error)}") from error


def _of_another_format(content: bytes) -> dict[str, Any] | None:
    """The manifest of format 1, whose digest was of its sorted JSON; None if it is not whole or of no such format."""
    try:
        body = json.loads(content)
        digest = body.pop("digest")
        whole = body["format"] == 1 and digest == _digest(json.dumps(body, sort_keys=True).encode())
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return body if whole else None


def one_line(error: Exception) -> str:
    """An error's message, or its kind when it has none, without tensorstore's list of source locations."""
    return " ".join(str(error).split(" [source locations=")[0].split()) or type(error).__name__


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
