"""Opening text files, and detecting their compression and format from their content."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from enum import Enum
from typing import Any, BinaryIO, cast

from sophia_levanter.data.text_files import TextFile, optional_import
from sophia_levanter.errors import InputError

LOOK_BYTES = 1 << 16
LOOK_LINES = 5
LOOK_LINE_BYTES = 1 << 24  # a file with a longer first line is one document, unless its name indicates JSON
PARQUET_MAGIC = b"PAR1"
LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
# Longer marks come first, because the UTF-32LE mark begins with the UTF-16LE mark.
WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32LE",
    codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE",
    codecs.BOM_UTF16_BE: "UTF-16BE",
}
# The first bytes of compressed files. The second zstd pattern matches a skippable frame.
MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
}
MAGIC_BYTES = 10
# A compressed file may expand to EXPANDED_BYTES or to MOST_EXPANSION times its size, whichever is larger.
EXPANDED_BYTES, MOST_EXPANSION = 1 << 28, 200


class OpenFile:
    """An open file. Its first bytes determine its `compression`; `content` is the stream of decompressed bytes."""

    def __init__(self, file: TextFile) -> None:
        self.file = file
        self._raw = file.open()
        begin = self._raw.read(MAGIC_BYTES)
        self.compression = next((name for name, magic in MAGIC.items() if magic.match(begin)), None)
        self.rewind()

    def rewind(self) -> None:
        try:
            self._raw.seek(0)
        except (OSError, ValueError):  # a stream from a server that sends only whole files
            self._raw.close()
            self._raw = self.file.open()
        self.content = _decompressed(self._raw, self.compression, self.file.where)
        if self.compression is not None:
            # Some servers do not send the size.
            limit = max(EXPANDED_BYTES, MOST_EXPANSION * self.file.size) if self.file.size else sys.maxsize
            self.content = cast(BinaryIO, io.BufferedReader(_Bounded(self.content, limit, self.file.where), 1 << 17))

    def share_read(self) -> float:
        """Return the fraction of the file that has been read, from 0 to 1."""
        return self._raw.tell() / self.file.size if self.file.size else 1.0

    def close(self) -> None:
        self._raw.close()


class _Bounded(io.RawIOBase):
    """A stream of decompressed bytes with a size limit, which protects against decompression bombs."""

    def __init__(self, content: BinaryIO, limit: int, where: str) -> None:
        self._content, self._left, self._where = content, limit, where

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # Read only once, so that intact bytes are returned before an error is raised for damaged ones.
        data = self._content.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise InputError(
                f"{self._where} decompresses to more than {MOST_EXPANSION} times its size; if that is "
                "expected, decompress the file first"
            )
        return len(data)


@contextmanager
def opened(file: TextFile) -> Iterator[OpenFile]:
    """Open a file for reading.

    Raises:
        InputError: if the file cannot be opened, read or decompressed, or, at the end, if it was modified or replaced
            after it was found.
    """
    try:
        with readable(file), closing(OpenFile(file)) as open_file:
            yield open_file
    except InputError:
        file.check_unchanged()  # a file that is being written to may look damaged
        raise
    file.check_unchanged()


@contextmanager
def readable(file: TextFile) -> Iterator[None]:
    """Convert errors from reading a file to `InputError`."""
    try:
        yield
    except Exception as error:
        # Each compression format has its own error class.
        if (
            isinstance(error, EOFError | zlib.error | lzma.LZMAError | gzip.BadGzipFile)
            or type(error).__name__ == "ZstdError"
        ):
            raise InputError(f"{file.where} is truncated or damaged: {error}; copy or download it again") from error
        if isinstance(error, MemoryError):
            raise InputError(f"{file.where} contains a document that does not fit in memory; split it") from error
        if isinstance(error, OSError):
            reason = error.strerror or " ".join(str(error).split())
            raise InputError(f"{file.field}: cannot read {file.name}: {reason}") from error
        if isinstance(error, ValueError) and "://" in file.name:  # fsspec, where a server cannot send parts of a file
            raise InputError(f"{file.where} cannot be read in parts; download it and specify the local file") from error
        raise


def _decompressed(raw: BinaryIO, compression: str | None, where: str) -> BinaryIO:
    match compression:
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
        case "xz":
            return cast(BinaryIO, lzma.LZMAFile(raw))
        case "bzip2":
            return cast(BinaryIO, bz2.BZ2File(raw))
        case "zstd":
            # Python has included zstd since version 3.14. The zstandard package does not detect truncated files.
            module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
            zstd = optional_import(module, "backports.zstd", where)
            # By default, decoders reject the large windows of `zstd --long=31`.
            window = zstd.DecompressionParameter.window_log_max
            return cast(BinaryIO, zstd.ZstdFile(raw, options={window: window.bounds()[1]}))
    return raw


class Format(Enum):
    """A file format. The value is the name of the format in messages."""

    TEXT = "plain text"
    JSON_LINES = "JSON lines"
    JSON_ARRAY = "a JSON array"
    PARQUET = "Parquet"


# The formats that a suffix may indicate. Any other suffix indicates text.
NAMED = {
    ".json": (Format.JSON_LINES, Format.JSON_ARRAY),
    ".jsonl": (Format.JSON_LINES,),
    ".ndjson": (Format.JSON_LINES,),
    ".jsonlines": (Format.JSON_LINES,),
    ".parquet": (Format.PARQUET,),
}


def named_formats(file: TextFile) -> tuple[Format, ...]:
    """Return the formats suggested by the name of a file."""
    return NAMED.get(file.named[0], (Format.TEXT,))


def format_of(opened: OpenFile, text_field: str) -> Format:
    """Detect the format of a file from its beginning, and rewind the file.

    Parquet is recognized by its first bytes. JSON is read as records if the suffix indicates JSON, or if the first
    records have the field `text_field`. Otherwise, the suffix determines the format, and a damaged file is rejected.

    Raises:
        InputError: if the file is UTF-16 or UTF-32, or a Git LFS pointer.
    """
    begin = opened.content.read(LOOK_BYTES)
    opened.rewind()
    where = opened.file.where
    for mark, encoding in WIDE_MARKS.items():
        if begin.startswith(mark):
            raise InputError(
                f"{where} is {encoding}, not UTF-8; convert it with iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"
            )
    if begin.startswith(LFS_MAGIC):
        raise InputError(f"{where} is a Git LFS pointer, not the file itself; download the file with git lfs pull")
    if begin.startswith(PARQUET_MAGIC):
        return Format.PARQUET
    named = named_formats(opened.file)
    begin = begin.removeprefix(codecs.BOM_UTF8).lstrip()
    is_named_json = Format.JSON_LINES in named
    if begin[:1] == b"[" and is_named_json:
        # The bracket may begin a JSON array, or a list in the first of several JSON lines.
        if _first_of_lines(opened):
            return Format.JSON_LINES
        if Format.JSON_ARRAY in named or begin[1:].lstrip()[:1] in (b"{", b"]"):
            return Format.JSON_ARRAY
    elif begin[:1] == b"[" and begin[1:].lstrip()[:1] in (b"{", b"]"):
        if _begins_with_record(opened, text_field):
            return Format.JSON_ARRAY
    elif begin[:1] == b"{" and not is_named_json and _lines_are_records(opened, text_field):
        return Format.JSON_LINES
    return named[0]


def _begins_with_record(opened: OpenFile, text_field: str) -> bool:
    """Return whether the first object in a JSON array has the field `text_field`."""
    begin = opened.content.read(LOOK_LINE_BYTES).decode("utf-8", errors="replace")
    opened.rewind()
    try:
        record, _ = json.JSONDecoder().raw_decode(begin, begin.index("{"))
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and text_field in record


def _first_of_lines(opened: OpenFile) -> bool:
    """Return whether the first line is valid JSON by itself and is followed by more lines."""
    lines = [line for line in opened.content.read(LOOK_LINE_BYTES).splitlines() if line.strip()]
    opened.rewind()
    return len(lines) > 1 and _parsed(lines[0]) is not None


def _lines_are_records(opened: OpenFile, text_field: str) -> bool:
    """Return whether the first non-blank lines are JSON objects with the field `text_field`."""
    seen = 0
    while seen < LOOK_LINES and (line := opened.content.readline(LOOK_LINE_BYTES)):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            record = _parsed(line)  # a line truncated at the limit is not valid JSON
            if not (isinstance(record, dict) and text_field in record):
                seen = 0
                break
            seen += 1
    opened.rewind()
    return seen > 0


def has_objects(opened: OpenFile) -> bool:
    """Return whether any of the first lines is a JSON object, regardless of its fields."""
    lines = opened.content.read(LOOK_BYTES).splitlines()[:LOOK_LINES]
    opened.rewind()
    return any(line.startswith(b"{") and _parsed(line) is not None for line in lines)


def _parsed(line: bytes) -> Any:
    """Return the JSON value in a line, or None if the line is not valid JSON."""
    try:
        return json.loads(line.decode("utf-8", errors="replace").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return None
