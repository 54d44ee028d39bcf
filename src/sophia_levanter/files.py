"""Files that are written whole or not at all, and are there after a power cut."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path`: whoever is killed, it has its old content or the new one, also after a power cut."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # Of a full disk the system does not say which file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's content, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> IO[str] | None:
    """Keep other processes out, as long as the file that is returned is open, or this process lives.

    Args:
        path: of a file that is made for this; its directory is there.

    Returns:
        None if another process has it.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
