"""Writing token stores shard by shard, with a progress file from which a later process can resume."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from sophia_levanter.data.documents import START, Position, Source, Tally
from sophia_levanter.data.encoding import EncodedDocuments
from sophia_levanter.data.token_store import (
    DOCUMENT_ENDS,
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENS,
    Manifest,
    digest_of,
    open_array,
    tokens_digest,
)
from sophia_levanter.data.tokenizer import Tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.files import write_atomically
from sophia_levanter.kvstore import CODECS, array_spec

SHARD_TOKENS = 1 << 21  # tokens per file
CHUNK_TOKENS = 1 << 14  # tokens that one random read fetches and checks
SHARD_DOCUMENTS = 1 << 18
CHUNK_DOCUMENTS = 1 << 12
FILE_NAME = "progress.npz"
TALLIES = ("tally", "tally_before")


@contextmanager
def writing(before: str, after: str = "") -> Iterator[None]:
    """Convert disk errors, which tensorstore raises as `ValueError`, to `InputError`.

    The message contains the reason between `before` and `after`. A later process can resume from the data already
    written.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise InputError(
            f"data.cache_dir: cannot write {before}{reason}{after}; free some space and run the same command again "
            "to continue, or choose another directory"
        ) from error


class Layout(NamedTuple):
    """The layout of an array in files."""

    dtype: np.dtype
    shard: int  # elements in a file
    chunk: int  # elements that share a checksum; it divides `shard`


class ArrayWriter:
    """Appends to the one-dimensional zarr3 array at `path`, holding one shard in memory.

    Each shard is a file that appears only once it is complete. To resume in another process, create a writer with the
    `num_written` and `tail` from any earlier time. Appending the same values then produces the same files.

    Args:
        path: the array's directory.
        layout: the array's layout.
        num_written: the number of elements already in files, a multiple of `layout.shard`.
        tail: the elements that follow them, fewer than `layout.shard`.

    Raises:
        ValueError: from the constructor or any method, if a write to disk fails.
    """

    def __init__(self, path: Path, layout: Layout, num_written: int, tail: np.ndarray | None) -> None:
        self._buffer = np.empty(layout.shard, layout.dtype)
        self._filled = 0
        self.num_written = num_written
        if num_written:
            # Remove later elements, because different elements (or none) may follow now.
            self._array = (
                ts.open(array_spec(str(path)), open=True).result().resize(exclusive_max=[num_written]).result()
            )
        else:
            spec = _creation_spec(path, layout)
            self._array = ts.open(spec, create=True, delete_existing=True).result()
        if tail is not None:
            self.append(tail)

    @property
    def length(self) -> int:
        """The number of elements appended so far."""
        return self.num_written + self._filled

    @property
    def tail(self) -> np.ndarray:
        """The elements that are not in a file yet."""
        return self._buffer[: self._filled]

    def append(self, values: np.ndarray) -> None:
        while values.size:
            taken = min(values.size, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = values[:taken]
            self._filled += taken
            values = values[taken:]
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        """Write the tail to a file. If the tail is shorter than a shard, do not append anything afterwards."""
        if not self._filled:
            return
        end = self.length
        self._array = self._array.resize(exclusive_max=[end]).result()
        # No copy is needed, because the buffer does not change until the write is done.
        self._array[self.num_written : end].write(self.tail, can_reference_source_data_indefinitely=True).result()
        self.num_written, self._filled = end, 0


def _creation_spec(path: Path, layout: Layout) -> dict[str, Any]:
    sharding = {"chunk_shape": [layout.chunk], "codecs": CODECS, "index_codecs": CODECS}
    metadata = {
        "shape": [0],
        "data_type": layout.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [layout.shard]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return array_spec(str(path)) | {"metadata": metadata}


@dataclass(frozen=True)
class WriterState:
    """The state of a writer: its counts, the number of elements in files, and the elements not yet in files."""

    num_documents: int = 0
    num_bytes: int = 0
    written: dict[str, int] = field(default_factory=lambda: {TOKENS: 0, DOCUMENT_ENDS: 0})
    tails: dict[str, np.ndarray | None] = field(default_factory=lambda: {TOKENS: None, DOCUMENT_ENDS: None})


class TokenStoreWriter:
    """Writes a store in the directory `path`, starting from `state`. `finish` completes the store.

    Raises:
        InputError: from the constructor or any method, if a write to disk fails.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, source: str, state: WriterState | None = None) -> None:
        state = state or WriterState()
        self._path = path
        self._tokenizer = tokenizer
        self._source = source
        self.num_documents = state.num_documents
        self.num_bytes = state.num_bytes
        layouts = {
            TOKENS: Layout(tokenizer.dtype, SHARD_TOKENS, CHUNK_TOKENS),
            DOCUMENT_ENDS: Layout(np.dtype(np.uint64), SHARD_DOCUMENTS, CHUNK_DOCUMENTS),
        }
        with self._writing():
            self._arrays = {
                name: ArrayWriter(path / name, layout, state.written[name], state.tails[name])
                for name, layout in layouts.items()
            }

    @property
    def num_tokens(self) -> int:
        return self._arrays[TOKENS].length

    @property
    def num_written(self) -> int:
        """The number of tokens that are in files."""
        return self._arrays[TOKENS].num_written

    @property
    def state(self) -> WriterState:
        """The state from which another writer can resume."""
        return WriterState(
            self.num_documents,
            self.num_bytes,
            {name: array.num_written for name, array in self._arrays.items()},
            {name: array.tail.copy() for name, array in self._arrays.items()},
        )

    def append(self, documents: EncodedDocuments) -> None:
        ends = self.num_tokens + np.cumsum(documents.lengths)
        with self._writing():
            self._arrays[TOKENS].append(documents.tokens)
            self._arrays[DOCUMENT_ENDS].append(ends.astype(np.uint64))
        self.num_documents += len(documents.lengths)
        self.num_bytes += documents.num_bytes

    def finish(self) -> None:
        """Write the remaining elements, read everything back, and write the manifest."""
        with self._writing():
            for array in self._arrays.values():
                array.flush()
            digests = {
                name: tokens_digest(open_array(f"{self._path}/{name}"), str(self._path)) for name in self._arrays
            }
            # A killed process may leave tensorstore lock files behind.
            for lock in self._path.rglob("*.__lock"):
                lock.unlink()
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                source=self._source,
                tokenizer_name=self._tokenizer.name,
                tokenizer_fingerprint=self._tokenizer.fingerprint,
                num_documents=self.num_documents,
                num_tokens=self.num_tokens,
                num_bytes=self.num_bytes,
                digest=digests[TOKENS],
                document_ends_digest=digests[DOCUMENT_ENDS],
                arrays={name: digest_of((self._path / name / "zarr.json").read_bytes()) for name in self._arrays},
            )
            content = json.dumps(manifest.with_checksum().__dict__, indent=2)
            write_atomically(self._path / MANIFEST_NAME, content.encode())

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"the token store {self._path} (", ")")


@dataclass(frozen=True)
class Place:
    """A place in a source, with counts and digests of the text up to that place; by default, the beginning."""

    position: Position = START  # after the last document
    tally: Tally = field(default_factory=Tally)  # the row counts up to the position
    tally_before: Tally = field(default_factory=Tally)  # the row counts of all files before the current file
    files_before: str = ""  # a digest of `Source.parts` for all files before the current file
    file: str = ""  # a digest of `Source.parts` for the current file
    num_documents: int = 0  # in the current file, up to the position
    documents: str = ""  # a digest of these documents


class Trail:
    """Tracks the current place while a source is read, so that a later process can resume after any document.

    Attributes:
        place: the place after the last document; initially, the `place` argument, or the beginning by default.
    """

    def __init__(self, source: Source, place: Place | None = None) -> None:
        # The place before the first document is never saved, so its empty digest of the file does not matter.
        self.place = place or Place()
        self._rows = source.rows
        self._files = [_as_bytes(part) for part in source.parts]
        self._file_digests = [_chained("", file) for file in self._files]

    def add(self, position: Position, text: str) -> None:
        """Advance to the position after a document."""
        last = self.place
        files_before, num_documents, documents = last.files_before, last.num_documents, last.documents
        if position[0] != last.position[0]:
            files_before = reduce(_chained, self._files[last.position[0] : position[0]], files_before)
            num_documents, documents = 0, ""
        self.place = Place(
            position=position,
            tally=self._rows.tally,
            tally_before=self._rows.tally_before,
            files_before=files_before,
            file=self._file_digests[position[0]],
            num_documents=num_documents + 1,
            documents=_chained(documents, text.encode("utf-8")),
        )


def place_after(source: Source, place: Place) -> Place | None:
    """Return the place from which to continue reading a source, or None if the text before `place` has changed.

    If the file at `place` has changed, for example because the user corrected it, its documents up to `place` are read
    again and must be identical to the earlier documents. Its rows are counted again.

    Raises:
        InputError: if the file at `place` cannot be read.
    """
    files = [_as_bytes(part) for part in source.parts]
    number = place.position[0]
    if number >= len(files) or reduce(_chained, files[:number], "") != place.files_before:
        return None
    if _chained("", files[number]) == place.file:
        return place
    source.rows.tally = place.tally_before
    trail = Trail(source, replace(place, position=(number, 0), num_documents=0, documents=""))
    documents = source.documents(trail.place.position)
    for position, text in islice(documents, place.num_documents):
        trail.add(position, text)
    if trail.place.documents != place.documents:
        return None
    # Reading continues after a whole record. With a document separator, the last one may contain further documents now.
    following, _ = next(documents, (None, ""))
    return None if following == trail.place.position else trail.place


def _as_bytes(part: Any) -> bytes:
    return json.dumps(part).encode()


def _chained(digest: str, data: bytes) -> str:
    return hashlib.sha256(bytes.fromhex(digest) + data).hexdigest()


@dataclass(frozen=True)
class Progress:
    """A place in the source, and the states of the store writers at that place."""

    place: Place
    writers: tuple[WriterState, ...]


def save_progress(directory: Path, progress: Progress) -> None:
    """Write the progress file of a directory.

    Raises:
        InputError: if the write to disk fails.
    """
    numbers = [{"documents": w.num_documents, "bytes": w.num_bytes, "written": w.written} for w in progress.writers]
    tails = {f"{i}_{name}": tail for i, w in enumerate(progress.writers) for name, tail in w.tails.items()}
    content = io.BytesIO()
    place = vars(progress.place) | {name: getattr(progress.place, name)._asdict() for name in TALLIES}
    header = json.dumps({"place": place, "writers": numbers})
    np.savez(content, header=np.frombuffer(header.encode(), np.uint8), **tails)  # type: ignore[arg-type]
    with writing(f"to {directory}: "):
        write_atomically(directory / FILE_NAME, content.getvalue())


def load_progress(directory: Path) -> Progress | None:
    """Read the progress file of a directory. Return None if it is missing or damaged; preparation then starts over."""
    try:
        with np.load(directory / FILE_NAME, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            writers = tuple(
                WriterState(
                    numbers["documents"],
                    numbers["bytes"],
                    numbers["written"],
                    {name: arrays[f"{i}_{name}"] for name in numbers["written"]},
                )
                for i, numbers in enumerate(header["writers"])
            )
            place = header["place"]
            place |= {name: Tally(**place[name]) for name in TALLIES} | {"position": tuple(place["position"])}
            return Progress(Place(**place), writers)
    except Exception:  # a damaged file may raise any exception
        return None


def has_progress(directory: Path) -> bool:
    """Return whether a directory contains a progress file."""
    return (directory / FILE_NAME).exists()


def forget_progress(directory: Path) -> None:
    """Remove the progress file of a directory."""
    for path in directory.glob(f"{FILE_NAME}*"):  # a killed process may have left a partly written file
        path.unlink()
