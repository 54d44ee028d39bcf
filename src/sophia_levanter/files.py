"""Atomic and durable writes, locks, and safe reads of files specified by users."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import IO, BinaryIO

from sophia_levanter.errors import InputError

MOST_BYTES = 1 << 28  # maximum size of a file to read as a whole; the largest known vocabulary is 4 MB
# Pipes that a shell creates for `<(command)` and `command |`. Reading from other pipes or devices may never end.
_PIPES_OF_SHELL = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


class NotRegular(OSError, InputError):
    """The path does not refer to a regular file, or the file is too large."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def check_utf8(field: str, path: str) -> None:
    """Check that tensorstore can use `path`, which is the value of `field`.

    Raises:
        InputError: if the path is not valid UTF-8 or contains a NUL character.
    """
    if re.search("[\0\ud800-\udfff]", path):
        raise InputError(f"{field} is {path!r}; it must be a valid UTF-8 path without NUL characters")


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file, or a pipe from the shell, for reading.

    Raises:
        NotRegular: if `check_regular` rejects the path.
        OSError: if the file cannot be opened.
    """
    check_regular(path)
    return open(path, "rb")


def check_regular(path: Path | str) -> None:
    """Check that a path is a regular file, or a pipe from the shell, before a library opens it.

    Raises:
        NotRegular: if the path is something else, such as a named pipe, which might block forever.
        OSError: if the path does not exist.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        raise NotRegular(
            errno.EINVAL, "the path contains a character that is not allowed in file names", str(path)
        ) from None
    if stat.S_ISDIR(mode):
        raise NotRegular(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and str(path).startswith(_PIPES_OF_SHELL)):
        raise NotRegular(errno.EINVAL, "not a regular file", str(path))


def read_regular(path: Path | str, most_bytes: int = MOST_BYTES) -> bytes:
    """Read the entire content of a regular file, or of a pipe from the shell.

    Raises:
        NotRegular: if `check_regular` rejects the path, or the file has more than `most_bytes` bytes.
        OSError: if the file cannot be read.
    """
    with open_regular(path) as file:
        # `read(n)` allocates n bytes, so pass the file's actual size. Pipes and files in /proc report a size of 0.
        size = os.fstat(file.fileno()).st_size or most_bytes
        content = file.read(min(size, most_bytes) + 1)
    if len(content) > most_bytes:
        raise NotRegular(errno.EFBIG, f"larger than {most_bytes:,} bytes", str(path))
    return content


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path`. After a crash or power failure, it contains either the old or the new content."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # Name the file, because the system's error for a full disk does not.
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush the content of a file or the entries of a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> IO[str] | None:
    """Lock a file until the returned file object is closed or this process ends.

    Args:
        path: the lock file, which is created if it does not exist. Its directory must exist.

    Returns:
        The locked file object, or None if another process holds the lock.
    """
    # With O_NONBLOCK, opening a named pipe fails instead of waiting for a reader.
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o666), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
