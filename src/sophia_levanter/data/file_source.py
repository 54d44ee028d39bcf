"""Documents in files: text, JSON, Parquet, and Python's standard library."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import tokenize
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from sophia_levanter.data.documents import START, Position, Rows, Source
from sophia_levanter.data.formats import Format, OpenFile, format_of, has_objects, named_formats, opened
from sophia_levanter.data.text_files import PYTHON_STDLIB, Report, TextFile, find_files, optional_import
from sophia_levanter.errors import InputError

MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
PARQUET_ROWS = 256  # rows read at once
PIECE_BYTES = 1 << 20  # how much of a JSON array, or of text with separators, is read at once
# In each pair, the first pattern matches the text before an element of a JSON array, and the second the array's end.
ARRAY_FIRST = re.compile(r"\s*\[\s*(?=[^\s\]])"), re.compile(r"\s*\[\s*\]\s*\Z")
ARRAY_NEXT = re.compile(r"\s*,\s*(?=\S)"), re.compile(r"\s*\]\s*\Z")
ARRAY_DELIMITER = re.compile(r"\s*[,\]]")
READING_VERSION = 2  # version of the conversion of files to documents; token stores from other versions are rebuilt

# The location of a record, for messages, and its text. The text is None if the record is skipped.
Record = tuple[str, str | None]


class FileSource(Source):
    """Documents from the files that `find_files` finds, read one at a time. Documents without text are skipped.

    The format of a file is detected from its content (see `format_of`). JSON lines and JSON arrays contain one document
    per object, Parquet files contain one per row, and any other file is a single UTF-8 document. In Python's standard
    library, each module is a document, decoded according to its encoding declaration. Text is split at
    `data.document_separator`, if it is set.

    Raises:
        InputError: if no files are found; later, during reading, if a file cannot be read or decoded, or a record has
            no text.
    """

    def __init__(self, name: str, rows: Rows, report: Report) -> None:
        super().__init__(name, rows)
        self._report = report
        self._reported: set[Any] = set()
        self._files = find_files(name, field=rows.field, report=report)
        self._file = 0
        self._share_of_file: Callable[[], float] = lambda: 0.0

    @property
    def parts(self) -> list[Any]:
        return [(file.name, file.size, file.version) for file in self._files]

    @property
    def settings(self) -> list[Any]:
        return [READING_VERSION, *super().settings]

    @property
    def identity(self) -> Any:
        return [READING_VERSION, self.name, self.parts, *self.rows.settings]

    @property
    def inputs(self) -> list[str]:
        return [file.name if "://" in file.name else os.path.realpath(file.name) for file in self._files]

    def where(self, position: Position) -> str:
        return f"{self._files[position[0]].name}, document {position[1]}"

    def documents(self, start: Position = START) -> Iterator[tuple[Position, str]]:
        for number in range(start[0], len(self._files)):
            skip = start[1] if number == start[0] else 0
            self._file = number
            if not skip:
                self.rows.tally_before = self.rows.tally
            for record, (where, text) in enumerate(self._records(self._files[number], skip), start=skip + 1):
                for document in self.rows.documents(text, where):
                    yield (number, record), document
        self._file, self._share_of_file = len(self._files), lambda: 0.0

    def share_read(self) -> float | None:
        sizes = [file.size for file in self._files]
        if not sum(sizes):
            return None
        current = sizes[self._file] * self._share_of_file() if self._file < len(sizes) else 0.0
        return (sum(sizes[: self._file]) + current) / sum(sizes)

    def _records(self, file: TextFile, skip: int) -> Iterator[Record]:
        """Yield the records of a file after the first `skip`, including records without text."""
        with opened(file) as open_file:
            self._share_of_file = open_file.share_read
            if self.name == PYTHON_STDLIB:
                if not skip:
                    text = _python_source(open_file.content)
                    yield file.name, text if text.strip() else None  # empty modules are not counted
                return
            format_ = format_of(open_file, self.rows.config.text_field)
            self._report_disagreement(open_file, format_)
            if format_ is Format.PARQUET:
                yield from self._parquet_rows(open_file, skip)
            elif format_ is Format.JSON_LINES:
                yield from self._json_lines(file, open_file.content, skip)
            elif format_ is Format.JSON_ARRAY:
                yield from self._json_array(file, open_file.content, skip)
            else:
                self._report_objects(open_file)
                yield from self._plain_text(file, open_file.content, skip)

    def _report_disagreement(self, opened: OpenFile, format_: Format) -> None:
        """Report files whose names and contents disagree, once for each kind of disagreement."""
        named, compressed = named_formats(opened.file), opened.file.named[1]
        agree = format_ in named and opened.compression == compressed
        key = (format_, opened.compression, named, compressed)
        if agree or not opened.file.size or key in self._reported:
            return
        self._reported.add(key)
        held = format_.value if opened.compression is None else f"{format_.value} compressed with {opened.compression}"
        self._report(
            f"{opened.file.where} contains {held}, despite its name; "
            "it and similar files are read according to their contents"
        )

    def _report_objects(self, opened: OpenFile) -> None:
        """Warn once about plain-text files that seem to consist of JSON records."""
        if "objects" not in self._reported and has_objects(opened):
            self._reported.add("objects")
            self._report(
                f"WARNING: {opened.file.where} is read as plain text, although some lines are JSON objects, because "
                f"not all of the first lines have the field {self.rows.config.text_field!r}; set data.text_field, or "
                "remove the lines that are not records"
            )

    def _plain_text(self, file: TextFile, content: BinaryIO, skip: int) -> Iterator[Record]:
        """Yield the text of a file as one record or, to save memory, as one record per separated document."""
        separator = self.rows.config.document_separator
        if separator is None and file.size > MEMORY:
            raise InputError(
                f"{file.where} is one document of {file.size:,} bytes, which does not fit in memory; "
                "split it, convert it to JSON lines, or set data.document_separator"
            )
        reader = _Utf8(content, self._decode_errors, f"{file.where}")
        text, ended = "", 0
        # Each read doubles the text, so that a long document is searched only a logarithmic number of times.
        while more := reader.read(max(PIECE_BYTES, len(text)) if separator else -1):
            text += more
            if separator:
                *documents, text = text.split(separator)
                for document in documents:
                    ended += 1
                    if ended > skip:
                        yield f"{file.name}, document {ended}", document + separator
        if not ended and not skip:
            yield file.name, text
        elif ended >= skip and text.strip():
            yield f"{file.name}, document {ended + 1}", text

    def _json_lines(self, file: TextFile, content: BinaryIO, skip: int) -> Iterator[Record]:
        offset = 0
        for number, line in enumerate(content, start=1):
            if number > skip:
                where = f"{file.name}:{number}"
                text = self._decode(line, offset, where)
                yield where, self._text_of_line(text, where) if text.strip() else None
            offset += len(line)

    def _json_array(self, file: TextFile, content: BinaryIO, skip: int) -> Iterator[Record]:
        for number, row in enumerate(self._array_items(file, content), start=1):
            if number > skip:
                where = f"{file.name}, record {number}"
                yield where, self.rows.text_of(row, where)

    def _array_items(self, file: TextFile, content: BinaryIO) -> Iterator[Any]:
        """Yield the elements of a JSON array, with only one piece of text (or one long element) in memory at a time."""
        reader = _Utf8(content, self._decode_errors, f"{file.where}")
        scanner = json.JSONDecoder()
        text, at, number, at_end = "", 0, 1, False
        before, last = ARRAY_FIRST
        while True:
            reason = "neither a JSON object nor the end of the array"
            try:
                if match := before.match(text, at):
                    item, end = scanner.raw_decode(text, match.end())
                    # The rest of a number may not have been read yet.
                    if isinstance(item, dict) or at_end or ARRAY_DELIMITER.match(text, end):
                        yield item
                        at, number = end, number + 1
                        before, last = ARRAY_NEXT
                        continue
            except json.JSONDecodeError as error:
                reason = f"not valid JSON: {error.msg}"
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file.where}, record {number}, cannot be parsed as JSON: {error}") from error
            if at_end:
                if last.match(text, at):
                    return
                raise InputError(
                    f"{file.where}, record {number}, is {reason}; use one array of objects, or one object per line"
                )
            # Each read doubles the text, so that a long object is scanned only a logarithmic number of times.
            more = reader.read(max(PIECE_BYTES, len(text) - at))
            text, at, at_end = text[at:] + more, 0, not more

    @property
    def _decode_errors(self) -> str:
        return "strict" if self.rows.config.invalid_utf8 == "error" else "replace"

    def _decode(self, data: bytes, offset: int, where: str) -> str:
        try:
            # Concatenated files may have byte order marks in the middle.
            return data.decode("utf-8", errors=self._decode_errors).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise _not_utf8(error, offset, f"{self.rows.field}: {where}") from error

    def _text_of_line(self, line: str, where: str) -> str | None:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return self.rows.bad(
                f"{where} is not valid JSON (expected one object per line): {error.msg} at column {error.colno}"
            )
        except (ValueError, RecursionError) as error:
            return self.rows.bad(f"{where} cannot be parsed as JSON: {error}")
        return self.rows.text_of(row, where)

    def _parquet_rows(self, opened: OpenFile, skip: int) -> Iterator[Record]:
        file, content = opened.file, opened.content
        parquet = optional_import("pyarrow.parquet", "pyarrow", file.where)
        if opened.compression is not None or not _can_seek(content):  # the footer is at the end, so read everything
            content = io.BytesIO(content.read())
        try:
            table = parquet.ParquetFile(content)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise InputError(f"{file.where} is truncated, damaged or not a Parquet file") from error
        done, rows = 0, table.metadata.num_rows
        self._share_of_file = lambda: done / rows if rows else 1.0
        for group in range(table.metadata.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if done + size <= skip:
                done += size
                continue
            for row in self._group_rows(table, group, file):
                done += 1
                if done > skip:
                    where = f"{file.name}, row {done}"
                    yield where, self.rows.text_of(row, where)

    def _group_rows(self, table: Any, group: int, file: TextFile) -> Iterator[dict[str, Any]]:
        name, names = self.rows.config.text_field, table.schema_arrow.names
        if name not in names:
            yield from [dict.fromkeys(names)] * table.metadata.row_group(group).num_rows
            return
        try:
            for batch in table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[name]):
                yield from ({name: text} for text in batch.column(0).to_pylist())
        except ValueError as error:
            raise InputError(f"{file.where} is damaged: {str(error).splitlines()[0]}") from error


class _Utf8:
    """Decodes UTF-8 piece by piece.

    Args:
        content: the bytes.
        errors: how to handle invalid UTF-8, as in `bytes.decode`.
        where: the config field and the file, for error messages.
    """

    def __init__(self, content: BinaryIO, errors: str, where: str) -> None:
        self._content = content
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._where = where
        self._num_read = 0
        self._at_beginning = True

    def read(self, size: int) -> str:
        """Return the text of the next `size` bytes, or of all remaining bytes if `size` is negative; empty at the end.

        Raises:
            InputError: if the bytes are not valid UTF-8, or contain a null byte.
        """
        while True:
            data = self._content.read(size)
            if (zero := data.find(b"\0")) >= 0:
                raise InputError(
                    f"{self._where} is a binary file (null byte at byte offset {self._num_read + zero}); "
                    "provide UTF-8 text"
                )
            offset = self._num_read - len(self._decoder.getstate()[0])
            try:
                text = self._decoder.decode(data, not data)
            except UnicodeDecodeError as error:
                raise _not_utf8(error, offset, self._where) from error
            self._num_read += len(data)
            if text and self._at_beginning:
                text, self._at_beginning = text.removeprefix("\ufeff"), False
            if text or not data:
                return text


def _can_seek(content: BinaryIO) -> bool:
    """Return whether a file at its beginning can seek. fsspec's streams say that they can."""
    try:
        content.seek(0, os.SEEK_END)
        content.seek(0)
    except (OSError, ValueError):
        return False
    return True


def _not_utf8(error: UnicodeDecodeError, offset: int, where: str) -> InputError:
    return InputError(
        f"{where} is not valid UTF-8 (0x{error.object[error.start]:02x} at byte offset {offset + error.start}); "
        "convert it to UTF-8, or set data.invalid_utf8 to replace"
    )


def _python_source(content: BinaryIO) -> str:
    try:
        encoding, _ = tokenize.detect_encoding(content.readline)
        content.seek(0)
        # A TextIOWrapper would close the content, whose position is still needed to report progress.
        return io.StringIO(content.read().decode(encoding), newline=None).read()
    except (SyntaxError, UnicodeDecodeError):  # the library ships a few files that are broken on purpose
        return ""
