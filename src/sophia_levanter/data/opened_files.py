"""Files of text while they are read: decompressed as their first bytes say, and checked for changes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from sophia_levanter.data.text_files import (
    TextFile,
    filesystem_of,
    local_file,
    naming_url,
    optional_import,
    remote_file,
)
from sophia_levanter.errors import InputError

# How compressed files begin; the second pattern of zstd is a skippable frame.
MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
}
MAGIC_BYTES = 10
# A compressed file may expand to so many bytes, or so many times its size if that is more.
EXPANDED_BYTES, MOST_EXPANSION = 1 << 28, 200


class OpenFile:
    """A file that is being read, decompressed as its first bytes say.

    Attributes:
        file: which one.
        compression: gzip, zstd, xz, bzip2 or None.
        content: the decompressed bytes, from where they have been read to.
    """

    def __init__(self, file: TextFile, field: str) -> None:
        self.file = file
        self._field = field
        self._raw = _open_raw(file, field)
        begin = self._raw.read(MAGIC_BYTES)
        self.compression = next((name for name, magic in MAGIC.items() if magic.match(begin)), None)
        self.rewind()

    def rewind(self) -> None:
        """Go back to the beginning."""
        try:
            self._raw.seek(0)
        except (OSError, ValueError):  # a stream of a server that sends whole files only
            self._raw.close()
            self._raw = _open_raw(self.file, self._field)
        where = f"{self._field}: {self.file.name}"
        self.content = _decompressed(self._raw, self.compression, where)
        if self.compression is not None:
            limit = max(EXPANDED_BYTES, MOST_EXPANSION * self.file.size)
            self.content = cast(BinaryIO, io.BufferedReader(_Bounded(self.content, limit, where), 1 << 17))

    def share_read(self) -> float:
        """The share of the file that has been read."""
        return self._raw.tell() / self.file.size if self.file.size else 1.0

    def close(self) -> None:
        """Close the file."""
        self._raw.close()


class _Bounded(io.RawIOBase):
    """Decompressed bytes, as long as there are not many more than a text can have been."""

    def __init__(self, content: BinaryIO, limit: int, where: str) -> None:
        self._content, self._left, self._where = content, limit, where

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # One read, so that what stands before damage is there before the error.
        data = self._content.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise InputError(
                f"{self._where} decompresses to more than {MOST_EXPANSION} times its size; if that is "
                "intended, decompress it first"
            )
        return len(data)


@contextmanager
def opened(file: TextFile, field: str) -> Iterator[OpenFile]:
    """The file, open for reading.

    Raises:
        InputError: here or while it is read, if it cannot be read or decompressed; at the end, if something was written
            to it since it was looked up, or another file took its place.
    """
    try:
        with readable(file, field), closing(OpenFile(file, field)) as open_file:
            yield open_file
    except InputError:
        _check_unchanged(file, field)  # a file that is being written to may look damaged
        raise
    _check_unchanged(file, field)


def _check_unchanged(file: TextFile, field: str) -> None:
    if "://" not in file.name:
        marks = local_file(Path(file.name), field).marks
    else:
        filesystem, path = filesystem_of(file.name, field)
        with naming_url(file.name, field):
            filesystem.invalidate_cache(path)
            marks = remote_file(filesystem, path).marks
    # What a server tells of a file alone and of all in a folder may differ.
    if any(marks[name] != file.marks[name] for name in marks.keys() & file.marks.keys()):
        raise InputError(
            f"{field}: {file.name} changed after it was looked up; run the command again when nothing writes to it"
        )


@contextmanager
def readable(file: TextFile, field: str) -> Iterator[None]:
    """Errors of reading a file as errors of input."""
    try:
        yield
    except Exception as error:
        # Each compression has an error of its own.
        if (
            isinstance(error, EOFError | zlib.error | lzma.LZMAError | gzip.BadGzipFile)
            or type(error).__name__ == "ZstdError"
        ):
            raise InputError(
                f"{field}: {file.name} is truncated or damaged: {error}; copy or download it again"
            ) from error
        if isinstance(error, MemoryError):
            raise InputError(f"{field}: {file.name} holds a text that does not fit into memory; split it") from error
        if isinstance(error, OSError):
            reason = error.strerror or " ".join(str(error).split())
            raise InputError(f"{field}: cannot read {file.name}: {reason}") from error
        raise


def _open_raw(file: TextFile, field: str) -> BinaryIO:
    if "://" not in file.name:
        return cast(BinaryIO, Path(file.name).open("rb"))
    filesystem, path = filesystem_of(file.name, field)
    with naming_url(file.name, field):
        return cast(BinaryIO, filesystem.open(path, "rb"))


def _decompressed(raw: BinaryIO, compression: str | None, where: str) -> BinaryIO:
    match compression:
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
        case "xz":
            return cast(BinaryIO, lzma.LZMAFile(raw))
        case "bzip2":
            return cast(BinaryIO, bz2.BZ2File(raw))
        case "zstd":
            # Python has it from 3.14 on. The package zstandard takes a truncated file for a whole one.
            module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
            zstd = optional_import(module, "backports.zstd", where)
            # `zstd --long=31` makes windows that decoders refuse unless they are told.
            window = zstd.DecompressionParameter.window_log_max
            return cast(BinaryIO, zstd.ZstdFile(raw, options={window: window.bounds()[1]}))
    return raw
