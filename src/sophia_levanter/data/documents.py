"""Documents from a source that one string names: the standard library, text files, JSON lines."""

from __future__ import annotations

import glob
import gzip
import json
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from sophia_levanter.errors import InputError

PYTHON_STDLIB = "python_stdlib"
NOT_STDLIB_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
MAX_LISTED_FIELDS = 10


def resolve_files(source: str, *, field: str) -> list[Path]:
    """The files that `source` names, as absolute paths in sorted order.

    Args:
        source: `python_stdlib`, a path, or a glob (`**` crosses folders); `~` is the home folder.
        field: the config field to name in errors.

    Raises:
        InputError: if there are none, or `source` is a folder or something else that is not a file.
    """
    if source == PYTHON_STDLIB:
        files = _stdlib_files()
        if not files:
            raise InputError(f"{field}: {PYTHON_STDLIB}: this Python has no source files of its library; name a file")
        return files
    pattern = os.path.abspath(os.path.expanduser(source))
    if os.path.isdir(pattern):
        raise InputError(
            f"{field}: {source!r} is a folder; name its files with a glob such as {source.rstrip('/')}/*.txt"
        )
    if os.path.lexists(pattern):
        paths = [Path(pattern)]
    else:
        paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(match)]
    if not paths:
        raise InputError(f"{field}: no file is called or matches {source!r}; give a path, a glob or {PYTHON_STDLIB}")
    for path in paths:
        if not path.is_file():
            raise InputError(f"{field}: {path} is not a regular file, or a link to one that is gone")
    return paths


def read_documents(source: str, text_field: str, *, field: str) -> Iterator[str]:
    """The documents of `source`, those without text left out, one at a time.

    A `.jsonl` file holds a JSON object a line, any other file is one document in UTF-8, either may end in `.gz`. The
    Python standard library is one document a module, as its encoding declaration says.

    Args:
        source: see `resolve_files`.
        text_field: the key of a JSON object that holds the text.
        field: the config field to name in errors.

    Raises:
        InputError: if a file cannot be read or decoded, a line is not a JSON object with text, or no document has text.
    """
    return _documents(resolve_files(source, field=field), source, text_field, field)


def _documents(paths: list[Path], source: str, text_field: str, field: str) -> Iterator[str]:
    found = False
    for path in paths:
        for text in _read_file(path, source, text_field, field):
            if text and not text.isspace():
                found = True
                yield text
    if not found:
        raise InputError(f"{field}: {source!r} is empty: there is no document with text in its {len(paths)} file(s)")


def _read_file(path: Path, source: str, text_field: str, field: str) -> Iterator[str]:
    with _readable(path, field):
        if source == PYTHON_STDLIB:
            yield _python_source(path)
        elif path.name.lower().removesuffix(".gz").endswith(".jsonl"):
            yield from _json_lines(path, text_field, field)
        else:
            yield _plain_text(path, field)


@contextmanager
def _readable(path: Path, field: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{field}: {path} is truncated or damaged, or no gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"{field}: cannot read {path}: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if not NOT_STDLIB_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    )


def _python_source(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # the library ships a few files that are broken on purpose
        return ""


def _plain_text(path: Path, field: str) -> str:
    with _open(path) as file:
        data = file.read()
    zero = data.find(b"\0")
    if zero >= 0:
        raise InputError(f"{field}: {path} is a binary file (zero byte at byte offset {zero}); give UTF-8 text")
    return _decode(data, 0, str(path), field)


def _json_lines(path: Path, text_field: str, field: str) -> Iterator[str]:
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = _decode(line, offset, where, field)
            offset += len(line)
            if text.strip():
                yield _text_of_record(text, text_field, where, field)


def _decode(data: bytes, offset: int, where: str, field: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise InputError(
            f"{field}: {where} is not UTF-8 text (0x{data[error.start]:02x} at byte offset {at}); convert it to UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _text_of_record(line: str, text_field: str, where: str, field: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{field}: {where} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{field}: {where} is not JSON that can be read: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{field}: {where} is not a JSON object but a {type(record).__name__}")
    if text_field not in record:
        names = [repr(name) for name in record]
        listed = ", ".join(names[:MAX_LISTED_FIELDS]) + (", …" if len(names) > MAX_LISTED_FIELDS else "")
        raise InputError(f"{field}: {where} has no field {text_field!r}; data.text_field may be {listed or '(none)'}")
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(f"{field}: {where}: the field {text_field!r} is not a string but a {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{field}: {where}: the field {text_field!r} holds half of a surrogate pair, "
            f"\\u{ord(text[error.start]):04x}, at character {error.start}, which UTF-8 cannot"
        ) from error
    return text
