"""Documents of files: text, JSON lines, Parquet, and the standard library."""

from __future__ import annotations

import io
import json
import tokenize
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from sophia_levanter.data.config import DataConfig
from sophia_levanter.data.names import PYTHON_STDLIB
from sophia_levanter.data.text_files import (
    JSON_LINES,
    PARQUET,
    TextFile,
    find_files,
    opened,
    optional_import,
    readable,
)
from sophia_levanter.errors import InputError

MAX_LISTED_FIELDS = 10
PARQUET_ROWS = 256  # at once

# How far a source has been read: files that are done, and records of the next one.
Position = tuple[int, int]
START: Position = (0, 0)


class FileSource:
    """The documents of files, one at a time; those without text are left out.

    A `.jsonl` file holds a JSON object a line, a `.parquet` file a row a document, any other file is one document; in
    UTF-8. The Python standard library is one document a module, as its encoding declaration says.

    Args:
        name: which files, see `find_files`.
        config: which field holds the text, and what is done about bytes that are not UTF-8.
        field: the config field to name in errors.

    Raises:
        InputError: here, if there are no such files; while reading, if one cannot be read or decoded, or a record has
            no text.
    """

    def __init__(self, name: str, config: DataConfig, *, field: str) -> None:
        self._name = name
        self._config = config
        self._field = field
        self._files = find_files(name, field=field)
        self._sizes = [file.size for file in self._files]
        self._file = 0
        self._share_of_file: Callable[[], float] = lambda: 0.0

    @property
    def identity(self) -> Any:
        """What the documents depend on, as a JSON value."""
        files = [(file.name, file.size, file.version) for file in self._files]
        return [self._name, files, self._config.text_field, self._config.invalid_utf8]

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
        if file.kind == PARQUET:
            yield from self._parquet_rows(file, skip)
            return
        with opened(file, self._field) as (content, self._share_of_file):
            if file.kind == JSON_LINES:
                yield from self._json_lines(file, content, skip)
            elif not skip:
                yield _python_source(content) if self._name == PYTHON_STDLIB else self._plain_text(file, content)

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

    def _decode(self, data: bytes, offset: int, where: str) -> str:
        try:
            text = data.decode("utf-8", errors="strict" if self._config.invalid_utf8 == "error" else "replace")
        except UnicodeDecodeError as error:
            at = offset + error.start
            raise InputError(
                f"{self._field}: {where} is not UTF-8 text (0x{data[error.start]:02x} at byte offset {at}); "
                "convert it to UTF-8, or set data.invalid_utf8 to replace"
            ) from error
        return text.removeprefix("\ufeff") if offset == 0 else text

    def _text_of_line(self, line: str, where: str) -> str:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{self._field}: {where} is not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self._field}: {where} is not JSON that can be read: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f"{self._field}: {where} is not a JSON object but a {type(record).__name__}")
        return text_of_record(record, self._config, where, self._field)

    def _parquet_rows(self, file: TextFile, skip: int) -> Iterator[str]:
        parquet = optional_import("pyarrow.parquet", "pyarrow", f"{self._field}: {file.name}")
        with opened(file, self._field) as (content, _):
            # The footer is at the end: a compressed Parquet file is read whole.
            seekable = (
                content if content.seekable() and not file.name.lower().endswith((".gz", ".xz", ".zst")) else None
            )
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
