"""Texts as a file source reads them, and the content of files for it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.documents import Rows
from sophia_levanter.data.file_source import FileSource
from sophia_levanter.errors import InputError


def source_of(name: str | Path, config: DataConfig | None = None) -> FileSource:
    return FileSource(str(name), Rows(config or DataConfig(), "data.train"), print)


def read(source: str | Path, text_field: str = "text", said: list[str] | None = None) -> list[str]:
    config, said = DataConfig(text_field=text_field), [] if said is None else said
    return [text for _, text in FileSource(str(source), Rows(config, "data.train"), said.append).documents()]


def error_of(source: str | Path, text_field: str = "text") -> str:
    return refused(lambda: read(source, text_field))


def refused(act: Callable[[], object]) -> str:
    """The line in which a training text is refused."""
    with pytest.raises(InputError) as info:
        act()
    message = str(info.value)
    assert message.startswith("data.train: ")
    assert "\n" not in message
    return message


def json_lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def parquet(columns: dict[str, list], **options: object) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, **options)
    return buffer.getvalue()
