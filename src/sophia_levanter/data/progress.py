"""How far a preparation has got, in a file that a later process goes on from."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sophia_levanter.data.documents import Position
from sophia_levanter.data.store_writer import WriterState
from sophia_levanter.files import write_atomically

FILE_NAME = "progress.npz"


@dataclass(frozen=True)
class Progress:
    """What has been read, and where the writers of the stores were then."""

    position: Position
    writers: tuple[WriterState, ...]


def save_progress(directory: Path, progress: Progress) -> None:
    """Replace what the directory says.

    Raises:
        OSError: if the disk does not take it.
    """
    numbers = [{"documents": w.num_documents, "bytes": w.num_bytes, "written": w.written} for w in progress.writers]
    tails = {f"{i}_{name}": tail for i, w in enumerate(progress.writers) for name, tail in w.tails.items()}
    content = io.BytesIO()
    header = json.dumps({"position": progress.position, "writers": numbers})
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
            return Progress(tuple(header["position"]), writers)
    except Exception:  # whatever damage makes of it
        return None


def forget_progress(directory: Path) -> None:
    """Remove what the directory says."""
    for path in directory.glob(f"{FILE_NAME}*"):  # a process that was killed may have left one half written
        path.unlink()
