"""Documents of files: text, JSON, Parquet, and the standard library."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import tokenize
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from sophia_levanter.data.config import DataConfig
from sophia_levanter.data.formats import Format, format_of, named_formats
from sophia_levanter.data.names import PYTHON_STDLIB
from sophia_levanter.data.text_files import (
    OpenFile,
    TextFile,
    find_files,
    opened,
    optional_import,
    readable,
)
from sophia_levanter.errors import InputError

MAX_LISTED_FIELDS = 10
PARQUET_ROWS = 256  # at once
ARRAY_BYTES = 1 << 20  # of a JSON array, at once
# What stands before an object of an array and what ends it: at its beginning, and after an object.
ARRAY_FIRST = re.compile(r"\ufeff?\s*\[\s*(?=\{)"), re.compile(r"\ufeff?\s*\[\s*\]\s*\Z")
ARRAY_NEXT = re.compile(r"\s*,\s*(?=\{)"), re.compile(r"\s*\]\s*\Z")
READING_VERSION = 2  # of how files become documents; what was prepared by another one is prepared again

# How far a source has been read: files that are done, and records of the next one.
Position = tuple[int, int]
START: Position = (0, 0)


def _ignore(line: str) -> None:
    pass


class FileSource:
    """The documents of files, one at a time; those without text are left out.

    A file's content decides how it is read, see `format_of`: JSON lines and JSON arrays hold an object a document,
    Parquet a row a document, and any other file is one document; in UTF-8. The Python standard library is one document
    a module, as its encoding declaration says.

    Args:
        name: which files, see `find_files`.
        config: which field holds the text, and what is done about bytes that are not UTF-8.
        field: the config field to name in errors.
        report: takes a line about files whose names do not say what they hold.

    Raises:
        InputError: here, if there are no such files; while reading, if one cannot be read or decoded, or a record has
            no text.
    """

    def __init__(self, name: str, config: DataConfig, *, field: str, report: Callable[[str], None] = _ignore) -> None:
        self._name = name
        self._config = config
        self._field = field
        self._report = report
        self._reported: set[Any] = set()
        self._files = find_files(name, field=field, report=report)
        self._sizes = [file.size for file in self._files]
        self._file = 0
        self._share_of_file: Callable[[], float] = lambda: 0.0

    @property
    def identity(self) -> Any:
        """What the documents depend on, as a JSON value."""
        files = [(file.name, file.size, file.version) for file in self._files]
        return [READING_VERSION, self._name, files, self._config.text_field, self._config.invalid_utf8]

    @property
    def inputs(self) -> list[str]:
        """What is read: real paths, and URLs."""
        return [file.name if "://" in file.name else os.path.realpath(file.name) for file in self._files]

    def where(self, position: Position) -> str:
        """The document before a position, for people."""
        return f"{self._files[position[0]].name}, document {position[1]}"

    def documents(self, start: Position = START) -> Iterator[tuple[Position, str]]:
        """Each document from `start` on, with the position after it."""
        for number in range(start[0], len(self._files)):
            skip = start[1] if number == start[0] else 0
            self._file = number
            for record, text in enumerate(self._records(self._files[number], skip), start=skip + 1):
                if text and not text.isspace():
                    yield (number, record), text
        self._file, self._share_of_file = len(self._files), lambda: 0.0

    def share_read(self) -> float | None:
        """How much of the source has been read, from 0 to 1; None if that cannot be known."""
        total = sum(self._sizes)
        if not total:
            return None
        current = self._sizes[self._file] * self._share_of_file() if self._file < len(self._sizes) else 0.0
        return (sum(self._sizes[: self._file]) + current) / total

    def _records(self, file: TextFile, skip: int) -> Iterator[str]:
        """The texts of a file from record `skip` on, empty ones too."""
        with opened(file, self._field) as open_file:
            self._share_of_file = open_file.share_read
            if self._name == PYTHON_STDLIB:
                if not skip:
                    yield _python_source(open_file.content)
                return
            format_ = format_of(open_file, self._config.text_field, self._field)
            self._report_disagreement(open_file, format_)
            if format_ is Format.PARQUET:
                yield from self._parquet_rows(open_file, skip)
            elif format_ is Format.JSON_LINES:
                yield from self._json_lines(file, open_file.content, skip)
            elif format_ is Format.JSON_ARRAY:
                yield from self._json_array(file, open_file.content, skip)
            elif not skip:
                yield self._plain_text(file, open_file.content)

    def _report_disagreement(self, opened: OpenFile, format_: Format) -> None:
        """One line for all files whose names and contents disagree in the same way."""
        named, compressed = named_formats(opened.file.kind), opened.file.named_compression
        agree = format_ in named and opened.compression == compressed
        key = (format_, opened.compression, named, compressed)
        if agree or not opened.file.size or key in self._reported:
            return
        self._reported.add(key)
        held = format_.value if opened.compression is None else f"{format_.value} compressed by {opened.compression}"
        self._report(
            f"{self._field}: {opened.file.name} holds {held}, unlike its name; it and files like it are read by content"
        )

    def _plain_text(self, file: TextFile, content: BinaryIO) -> str:
        data = content.read()
        zero = data.find(b"\0")
        if zero >= 0:
            raise InputError(
                f"{self._field}: {file.name} is a binary file (zero byte at byte offset {zero}); give UTF-8 text"
            )
        return self._decode(data, 0, file.name)

    def _json_lines(self, file: TextFile, content: BinaryIO, skip: int) -> Iterator[str]:
        offset = 0
        for number, line in enumerate(content, start=1):
            if number > skip:
                where = f"{file.name}:{number}"
                text = self._decode(line, offset, where)
                yield self._text_of_line(text, where) if text.strip() else ""
            offset += len(line)

    def _json_array(self, file: TextFile, content: BinaryIO, skip: int) -> Iterator[str]:
        for number, record in enumerate(self._array_items(file, content), start=1):
            if number > skip:
                yield text_of_record(record, self._config, f"{file.name}, record {number}", self._field)

    def _array_items(self, file: TextFile, content: BinaryIO) -> Iterator[dict[str, Any]]:
        """The objects of a JSON array; what is kept of its text is a piece, or the object that is longer."""
        decoder = codecs.getincrementaldecoder("utf-8")(self._decode_errors)
        scanner = json.JSONDecoder()
        text, at, num_read, number, at_end = "", 0, 0, 1, False
        before, last = ARRAY_FIRST
        while True:
            reason = "neither a JSON object nor the end of the array"
            try:
                if match := before.match(text, at):
                    item, at = scanner.raw_decode(text, match.end())
                    yield item
                    number += 1
                    before, last = ARRAY_NEXT
                    continue
            except json.JSONDecodeError as error:
                reason = f"not JSON: {error.msg}"
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{self._field}: {file.name}, record {number}, is not JSON that can be read: {error}"
                ) from error
            if at_end:
                if last.match(text, at):
                    return
                raise InputError(
                    f"{self._field}: {file.name}, record {number}, is {reason}; "
                    "write one array of objects, or one object a line"
                )
            # As much again, so that a long object is not scanned more often than its length doubles.
            piece = content.read(max(ARRAY_BYTES, len(text) - at))
            at_end = not piece
            offset = num_read - len(decoder.getstate()[0])
            num_read += len(piece)
            try:
                text, at = text[at:] + decoder.decode(piece, at_end), 0
            except UnicodeDecodeError as error:
                raise self._not_utf8(error, offset, file.name) from error

    @property
    def _decode_errors(self) -> str:
        return "strict" if self._config.invalid_utf8 == "error" else "replace"

    def _decode(self, data: bytes, offset: int, where: str) -> str:
        try:
            # Files that were put one after the other may have byte order marks in their middle.
            return data.decode("utf-8", errors=self._decode_errors).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise self._not_utf8(error, offset, where) from error

    def _not_utf8(self, error: UnicodeDecodeError, offset: int, where: str) -> InputError:
        return InputError(
            f"{self._field}: {where} is not UTF-8 text (0x{error.object[error.start]:02x} at byte offset "
            f"{offset + error.start}); convert it to UTF-8, or set data.invalid_utf8 to replace"
        )

    def _text_of_line(self, line: str, where: str) -> str:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{self._field}: {where} is not JSON: {error.msg} at column {error.colno}; write one object a line"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self._field}: {where} is not JSON that can be read: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f"{self._field}: {where} is not a JSON object but a {type(record).__name__}")
        return text_of_record(record, self._config, where, self._field)

    def _parquet_rows(self, opened: OpenFile, skip: int) -> Iterator[str]:
        file, content = opened.file, opened.content
        parquet = optional_import("pyarrow.parquet", "pyarrow", f"{self._field}: {file.name}")
        # The footer is at the end: a compressed Parquet file is read whole.
        seekable = content if content.seekable() and opened.compression is None else None
        table = self._parquet_file(parquet, seekable or io.BytesIO(content.read()), file)
        done, rows = 0, table.metadata.num_rows
        self._share_of_file = lambda: done / rows if rows else 1.0
        for group in range(table.metadata.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if done + size <= skip:
                done += size
                continue
            for batch in self._parquet_batches(table, group, file):
                for text in batch:
                    done += 1
                    if done > skip:
                        record = {self._config.text_field: text}
                        yield text_of_record(record, self._config, f"{file.name}, row {done}", self._field)

    def _parquet_file(self, parquet: Any, content: Any, file: TextFile) -> Any:
        try:
            table = parquet.ParquetFile(content)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise InputError(f"{self._field}: {file.name} is truncated or damaged, or no Parquet file") from error
        names = table.schema_arrow.names
        if self._config.text_field not in names:
            raise _no_field(names, self._config, file.name, self._field)
        return table

    def _parquet_batches(self, table: Any, group: int, file: TextFile) -> Iterator[list[Any]]:
        batches = table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[self._config.text_field])
        with readable(file, self._field):
            while True:
                try:
                    batch = next(batches, None)
                    rows = None if batch is None else batch.column(0).to_pylist()
                except ValueError as error:
                    raise InputError(f"{self._field}: {file.name} is damaged: {str(error).splitlines()[0]}") from error
                if rows is None:
                    return
                yield rows


def text_of_record(record: dict[str, Any], config: DataConfig, where: str, field: str) -> str:
    """The text in a record.

    Raises:
        InputError: if the field is not there, or is no text that UTF-8 can hold.
    """
    if config.text_field not in record:
        raise _no_field(list(record), config, where, field)
    text = record[config.text_field]
    if not isinstance(text, str):
        raise InputError(
            f"{field}: {where}: the field {config.text_field!r} is not a string but a {type(text).__name__}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if config.invalid_utf8 == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise InputError(
            f"{field}: {where}: the field {config.text_field!r} holds half of a surrogate pair, "
            f"\\u{ord(text[error.start]):04x}, at character {error.start}, which UTF-8 cannot"
        ) from error
    return text


def _no_field(names: list[str], config: DataConfig, where: str, field: str) -> InputError:
    shown = [repr(name) for name in names]
    listed = ", ".join(shown[:MAX_LISTED_FIELDS]) + (", …" if len(shown) > MAX_LISTED_FIELDS else "")
    return InputError(
        f"{field}: {where} has no field {config.text_field!r}; data.text_field may be {listed or '(none)'}"
    )


def _python_source(content: BinaryIO) -> str:
    try:
        encoding, _ = tokenize.detect_encoding(content.readline)
        content.seek(0)
        return io.TextIOWrapper(content, encoding, line_buffering=True).read()
    except (SyntaxError, UnicodeDecodeError):  # the library ships a few files that are broken on purpose
        return ""
