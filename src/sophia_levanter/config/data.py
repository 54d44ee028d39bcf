"""Data settings. This module avoids slow imports, so that command lines are checked immediately."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar

from sophia_levanter.config.settings import Settings, setting
from sophia_levanter.errors import InputError
from sophia_levanter.files import check_utf8


@dataclass(frozen=True)
class MixturePart(Settings):
    """One source of training data in a mixture."""

    section: ClassVar[str] = "data.train"

    source: str = setting(
        MISSING, "text source, in the same form as data.train", empty="specify a file, hub:NAME or another source"
    )
    weight: float = setting(1.0, "sampling weight, relative to the other sources", above=0)


@dataclass(frozen=True)
class DataConfig(Settings):
    """The training and validation data, and how to tokenize it.

    Raises:
        InputError: if a value is out of bounds, a mixture is given without validation data, or a validation set has an
            invalid name.
    """

    section: ClassVar[str] = "data"

    train: tuple[MixturePart, ...] | str = setting(
        "python_stdlib", "training text: files, hub:NAME, ...; in YAML, also a list of sources with weights"
    )
    validation: Mapping[str, str] | str | None = setting(
        None,
        "validation text, specified like train; in YAML, also NAME: SOURCE pairs; if unset, part of train is held out",
        empty="omit it to hold out part of data.train",
    )
    tokenizer: str = setting("bytes", "bytes, or the name of a tiktoken encoding such as gpt2")
    text_field: str = setting("text", "name of the text field in JSONL, Parquet and dataset records")
    validation_fraction: float = setting(
        0.05, "fraction of documents to hold out if validation is unset", above=0, below=1
    )
    invalid_utf8: str = setting(
        "error", "how to handle invalid UTF-8; replace inserts U+FFFD", choices=("error", "replace")
    )
    on_leak: str = setting(
        "warn", "how to report documents that are in both the training and validation text", choices=("warn", "error")
    )
    bad_rows: str = setting(
        "error", "how to handle rows without text; skipped rows are counted", choices=("error", "skip")
    )
    document_separator: str | None = setting(
        None,
        "split text at this string, such as <|endoftext|>; each piece is a document",
        empty="omit it to leave the text unsplit",
    )
    mask_documents: bool = setting(False, "keep attention within documents, and restart positions in each document")
    num_workers: int | None = setting(
        None, "number of tokenizer processes; null: one per core, 0: main process only", low=0
    )
    cache_dir: str = setting("~/.cache/sophia_levanter", "directory for token stores")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train == ():
            raise InputError("data.train is empty; specify a file, hub:NAME or another source")
        check_utf8("data.cache_dir", self.cache_dir)
        if not isinstance(self.train, str) and self.validation is None:
            raise InputError("data.validation is missing; it is required if data.train is a mixture")
        if isinstance(self.validation, Mapping):
            _check_sets(self.validation)

    def __hash__(self) -> int:
        # The generated hash function fails if `validation` is a mapping, because mappings are not hashable.
        return hash((self.train, frozenset(self.validation_sets.items()), self.tokenizer, self.cache_dir))

    @property
    def train_parts(self) -> tuple[MixturePart, ...]:
        """The sources of training data; a single source with weight 1 if `train` is not a mixture."""
        return (MixturePart(self.train),) if isinstance(self.train, str) else self.train

    @property
    def validation_sets(self) -> dict[str, str]:
        """The sources of the validation sets, keyed by name.

        The name is empty if `validation` is a single source. The mapping is empty if part of the training data is held
        out instead.
        """
        if self.validation is None:
            return {}
        return {"": self.validation} if isinstance(self.validation, str) else dict(self.validation)


def validation_field(name: str) -> str:
    """Return the field that specifies a validation set's source: `data.validation` or `data.validation.NAME`."""
    return f"data.validation.{name}" if name else "data.validation"


def _check_sets(sets: Mapping[str, str]) -> None:
    if not sets:
        raise InputError("data.validation is empty; specify a source, or several as NAME: SOURCE")
    for name, source in sets.items():
        check_name("data.validation", name)
        if not source:
            raise InputError(
                f"{validation_field(name)} is empty; specify a file, hub:NAME or another source, or omit the setting"
            )


def check_name(field: str, name: str) -> None:
    """Check a name that will be part of metric names.

    Raises:
        InputError: if the name is invalid; the message lists the allowed characters.
    """
    # `type` is reserved, because `encode` shortens a mapping whose only key is `type`.
    if name == "type" or not re.fullmatch("[A-Za-z0-9_-]+", name):
        raise InputError(f"{field}: {name!r} is not a valid name; use letters, digits, _ and - ('type' is reserved)")
