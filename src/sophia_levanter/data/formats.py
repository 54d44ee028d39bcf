"""What a file of text holds, by its content."""

from __future__ import annotations

import codecs
import json
from enum import Enum
from typing import Any

from sophia_levanter.data.opened_files import OpenFile
from sophia_levanter.errors import InputError

LOOK_BYTES = 1 << 16
LOOK_LINES = 5
LOOK_LINE_BYTES = 1 << 24  # a file whose first line is longer is one text, unless its name says JSON
PARQUET_MAGIC = b"PAR1"
LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
# Of marks that begin alike the longer one is first.
WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32LE",
    codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE",
    codecs.BOM_UTF16_BE: "UTF-16BE",
}


class Format(Enum):
    """How documents are kept in a file; the value is its name in messages."""

    TEXT = "plain text"
    JSON_LINES = "JSON lines"
    JSON_ARRAY = "a JSON array"
    PARQUET = "Parquet"


# What a suffix may stand for; any other stands for text.
NAMED = {
    ".json": (Format.JSON_LINES, Format.JSON_ARRAY),
    ".jsonl": (Format.JSON_LINES,),
    ".ndjson": (Format.JSON_LINES,),
    ".jsonlines": (Format.JSON_LINES,),
    ".parquet": (Format.PARQUET,),
}


def named_formats(kind: str) -> tuple[Format, ...]:
    """What files with the suffix `kind` are expected to hold."""
    return NAMED.get(kind, (Format.TEXT,))


def format_of(opened: OpenFile, text_field: str, field: str) -> Format:
    """What a file holds, from a look at its beginning; it is at its beginning again afterwards.

    Parquet is known by its first bytes. JSON is taken for records if the first ones have the field `text_field`, or
    at once if the suffix says JSON. What is neither is what the suffix says, so that a damaged file is refused.

    Raises:
        InputError: if it is UTF-16 or UTF-32, or a pointer that Git LFS left in place of the file.
    """
    begin = opened.content.read(LOOK_BYTES)
    opened.rewind()
    name = opened.file.name
    for mark, encoding in WIDE_MARKS.items():
        if begin.startswith(mark):
            raise InputError(
                f"{field}: {name} is {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"
            )
    if begin.startswith(LFS_MAGIC):
        raise InputError(f"{field}: {name} is a Git LFS pointer, not the file itself; get it with git lfs pull")
    if begin.startswith(PARQUET_MAGIC):
        return Format.PARQUET
    named = named_formats(opened.file.kind)
    begin = begin.removeprefix(codecs.BOM_UTF8).lstrip()
    is_named_json = Format.JSON_LINES in named
    if begin[:1] == b"[" and is_named_json:
        # Both an array and JSON lines may begin with a list.
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
    """Whether the first object of a JSON array has the field."""
    begin = opened.content.read(LOOK_LINE_BYTES).decode("utf-8", errors="replace")
    opened.rewind()
    try:
        record, _ = json.JSONDecoder().raw_decode(begin, begin.index("{"))
    except (ValueError, RecursionError):
        return False
    return _is_record(record, text_field)


def _first_of_lines(opened: OpenFile) -> bool:
    """Whether the first line is JSON by itself and more lines follow."""
    lines = [line for line in opened.content.read(LOOK_LINE_BYTES).splitlines() if line.strip()]
    opened.rewind()
    try:
        json.loads(lines[0].decode("utf-8", errors="replace").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return False
    return len(lines) > 1


def _lines_are_records(opened: OpenFile, text_field: str) -> bool:
    """Whether the first lines that are not blank are JSON objects with the field."""
    seen = 0
    while seen < LOOK_LINES:
        line = opened.content.readline(LOOK_LINE_BYTES)
        if not line:
            break
        # A line that is cut short by the limit is not JSON.
        text = line.decode("utf-8", errors="replace").removeprefix("\ufeff")
        if text.strip():
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                record = None
            if not _is_record(record, text_field):
                seen = 0
                break
            seen += 1
    opened.rewind()
    return seen > 0


def has_objects(opened: OpenFile) -> bool:
    """Whether one of the first lines is a JSON object, whatever its fields."""
    lines = opened.content.read(LOOK_BYTES).splitlines()[:LOOK_LINES]
    opened.rewind()
    return any(line.startswith(b"{") and _is_object(line) for line in lines)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_record(value: Any, text_field: str) -> bool:
    return isinstance(value, dict) and text_field in value
