"""How far a preparation has got, in a file that a later process goes on from."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sophia_levanter.data.documents import START, Position
from sophia_levanter.data.rows import Tally
from sophia_levanter.data.sources import Source
from sophia_levanter.data.store_writer import WriterState
from sophia_levanter.files import write_atomically

FILE_NAME = "progress.npz"
TALLIES = ("tally", "tally_before")


@dataclass(frozen=True)
class Place:
    """How far a source has been read, and what it held up to there.

    Attributes:
        position: after the last document.
        tally: what the rows up to there held.
        tally_before: of these, what those held that are of the files before the position's.
        files_before: digest of the files before the position's, as the source identifies them.
        file: digest of the position's file, as the source identifies it.
        num_documents: of that file, up to there.
        documents: digest of these documents.
    """

    position: Position
    tally: Tally
    tally_before: Tally
    files_before: str
    file: str
    num_documents: int
    documents: str


class Trail:
    """Follows a source while it is read, so that a later process can go on after any document.

    Args:
        source: what is read.
        place: where an earlier process was; the beginning if not given.
    """

    def __init__(self, source: Source, place: Place | None = None) -> None:
        self._source = source
        self._files = [_as_bytes(part) for part in source.parts]
        self.position = place.position if place else START
        self._tally = place.tally if place else Tally()
        self._tally_before = place.tally_before if place else Tally()
        self._files_before = bytes.fromhex(place.files_before) if place else b""
        self.num_documents = place.num_documents if place else 0
        self._documents = bytes.fromhex(place.documents) if place else b""

    def add(self, position: Position, text: str) -> None:
        """Follow to the position after a document."""
        if position[0] != self.position[0]:
            self._files_before = reduce(_chained, self._files[self.position[0] : position[0]], self._files_before)
            self.num_documents, self._documents = 0, b""
        self.num_documents += 1
        self._documents = _chained(self._documents, text.encode("utf-8"))
        rows = self._source.rows
        self.position, self._tally, self._tally_before = position, rows.tally, rows.tally_before

    @property
    def place(self) -> Place:
        """Where it is."""
        return Place(
            self.position,
            self._tally,
            self._tally_before,
            self._files_before.hex(),
            _chained(b"", self._files[self.position[0]]).hex(),
            self.num_documents,
            self._documents.hex(),
        )


def place_after(source: Source, place: Place) -> Place | None:
    """Where to go on with a source that was read up to `place`; None if what was read there has changed.

    A file that is not what it was, such as one that was corrected, is read again up to as many documents, which must
    be the same; its rows are counted again.

    Raises:
        InputError: if it cannot be read.
    """
    files = [_as_bytes(part) for part in source.parts]
    number = place.position[0]
    if number >= len(files) or reduce(_chained, files[:number], b"").hex() != place.files_before:
        return None
    if _chained(b"", files[number]).hex() == place.file:
        return place
    source.rows.tally = place.tally_before
    trail = Trail(source, replace(place, position=(number, 0), num_documents=0, documents=""))
    for position, text in islice(source.documents(trail.position), place.num_documents):
        trail.add(position, text)
    return trail.place if trail.place.documents == place.documents else None


def _as_bytes(part: Any) -> bytes:
    return json.dumps(part).encode()


def _chained(digest: bytes, data: bytes) -> bytes:
    return hashlib.sha256(digest + data).digest()


@dataclass(frozen=True)
class Progress:
    """What has been read, and where the writers of the stores were then."""

    place: Place
    writers: tuple[WriterState, ...]


def save_progress(directory: Path, progress: Progress) -> None:
    """Replace what the directory says.

    Raises:
        OSError: if the disk does not take it.
    """
    numbers = [{"documents": w.num_documents, "bytes": w.num_bytes, "written": w.written} for w in progress.writers]
    tails = {f"{i}_{name}": tail for i, w in enumerate(progress.writers) for name, tail in w.tails.items()}
    content = io.BytesIO()
    place = vars(progress.place) | {name: getattr(progress.place, name)._asdict() for name in TALLIES}
    header = json.dumps({"place": place, "writers": numbers})
    np.savez(content, header=np.frombuffer(header.encode(), np.uint8), **tails)  # type: ignore[arg-type]
    write_atomically(directory / FILE_NAME, content.getvalue())


def load_progress(directory: Path) -> Progress | None:
    """What the directory says; None if it says nothing that can be read, so that all is done anew."""
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
    except Exception:  # whatever damage makes of it
        return None


def has_progress(directory: Path) -> bool:
    """Whether a later process can go on from what is in the directory."""
    return (directory / FILE_NAME).exists()


def forget_progress(directory: Path) -> None:
    """Remove what the directory says."""
    for path in directory.glob(f"{FILE_NAME}*"):  # a process that was killed may have left one half written
        path.unlink()
