"""The manifest of a checkpoint: what must be there, and the digests that tell whether it is."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sophia_levanter.errors import InputError

FORMAT = 1
FILE_NAME = "manifest.json"

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"
Box: TypeAlias = tuple[tuple[int, int], ...]  # a part of an array: (start, stop) along each axis


class CheckpointError(Exception):
    """A checkpoint could not be written, or none could be read. The message is one line with the leaf and the file."""


@dataclasses.dataclass(frozen=True)
class SavedArray:
    """One leaf: `path` in the tree, `folder` in the checkpoint, and the SHA-256 of each chunk's bytes by file name.

    The digests are of the array's own bytes (row-major, little-endian), so that a chunk can be checked wherever the
    storage splits or wraps it.
    """

    path: str
    folder: str
    shape: tuple[int, ...]
    dtype: str
    chunk_shape: tuple[int, ...]
    chunks: dict[str, str]

    def chunk_name(self, box: Box) -> str:
        return ".".join(["c", *(str(start // size) for (start, _), size in zip(box, self.chunk_shape, strict=True))])

    def boxes(self) -> Iterator[Box]:
        """The part of the array that each chunk holds. All are of one size: the shards of an array divide it."""
        grid = (size // chunk for size, chunk in zip(self.shape, self.chunk_shape, strict=True))
        for index in np.ndindex(*grid):
            yield tuple((i * chunk, (i + 1) * chunk) for i, chunk in zip(index, self.chunk_shape, strict=True))


@dataclasses.dataclass(frozen=True)
class Manifest:
    run_id: str
    step: int
    metadata: dict[str, JSON]
    arrays: list[SavedArray]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it and wait until the disk has it."""
    body = {"format": FORMAT, **dataclasses.asdict(manifest)}
    with open(folder / FILE_NAME, "x", encoding="utf-8") as file:
        json.dump({"digest": _digest(body), **body}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Raises `CheckpointError` when it is damaged, `InputError` when another version of this package wrote it."""
    file = folder / FILE_NAME
    try:
        body = json.loads(file.read_bytes())
        intact = body.pop("digest") == _digest(body)
    except Exception as error:  # whatever damage makes of it
        raise CheckpointError(f"{file}: {one_line(error)}") from error
    if not intact:
        raise CheckpointError(f"{file}: its digest does not match its contents")
    if body.pop("format") != FORMAT:
        raise InputError(f"{file} is not in format {FORMAT}: read it with the version of this package that wrote it")
    body["arrays"] = [
        SavedArray(**{**entry, "shape": tuple(entry["shape"]), "chunk_shape": tuple(entry["chunk_shape"])})
        for entry in body["arrays"]
    ]
    return Manifest(**body)


def one_line(error: Exception) -> str:
    """An error's message, or its kind when it has none, without tensorstore's list of source locations."""
    return " ".join(str(error).split(" [source locations=")[0].split()) or type(error).__name__


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
