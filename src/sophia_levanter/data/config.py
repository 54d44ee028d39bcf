"""Where the text comes from. Free of heavy imports, so that a command line can be checked at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sophia_levanter.errors import InputError
from sophia_levanter.files import check_utf8

INVALID_UTF8 = ("error", "replace")
ON_LEAK = ("warn", "error")
BAD_ROWS = ("error", "skip")


@dataclass(frozen=True)
class MixturePart:
    """One of several training texts.

    Raises:
        InputError: if the source is empty or the weight not positive.
    """

    source: str  # as data.train
    weight: float = 1.0  # of its windows, relative to those of the others

    def __post_init__(self) -> None:
        if not self.source:
            raise InputError("data.train has a part with an empty source")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"data.train: the weight of {self.source} is {self.weight}; it must be positive")


@dataclass(frozen=True)
class DataConfig:
    """The training and validation text and how it becomes tokens.

    Raises:
        InputError: if `validation_fraction` is not in (0, 1), `num_workers` is negative or a name is empty or unknown.
    """

    train: tuple[MixturePart, ...] | str = "python_stdlib"  # files, hub:NAME, ...; in YAML also a list with weights
    validation: str | None = None  # like train; without it a part of train is held out, by document
    tokenizer: str = "bytes"  # bytes, or the name of a tiktoken encoding such as gpt2
    text_field: str = "text"  # the field of a JSONL, Parquet or dataset record that holds the text
    validation_fraction: float = 0.05  # share of documents held out when validation is not given
    invalid_utf8: str = "error"  # or replace: bytes that are not UTF-8 become U+FFFD
    on_leak: str = "warn"  # or error: what happens if documents are both in train and in validation
    bad_rows: str = "error"  # or skip: rows without text are left out and counted
    document_separator: str | None = None  # such as <|endoftext|>: texts are split there, each piece is a document
    num_workers: int | None = None  # processes that make tokens; null: one a core; 0: none but this one
    cache_dir: str = "~/.cache/sophia_levanter"  # token stores are kept here

    def __post_init__(self) -> None:
        for name in ("train", "tokenizer", "text_field", "cache_dir"):
            if not getattr(self, name):
                raise InputError(f"data.{name} is empty")
        check_utf8("data.cache_dir", self.cache_dir)
        if self.validation is not None and not self.validation:
            raise InputError("data.validation is empty; leave it out to hold out a part of data.train")
        if not isinstance(self.train, str) and self.validation is None:
            raise InputError("data.validation is missing; data.train is a mixture, of which no part is held out")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"data.validation_fraction is {self.validation_fraction}; it must be between 0 and 1")
        if self.invalid_utf8 not in INVALID_UTF8:
            raise InputError(f"data.invalid_utf8 is {self.invalid_utf8!r}; it must be {' or '.join(INVALID_UTF8)}")
        if self.on_leak not in ON_LEAK:
            raise InputError(f"data.on_leak is {self.on_leak!r}; it must be {' or '.join(ON_LEAK)}")
        if self.bad_rows not in BAD_ROWS:
            raise InputError(f"data.bad_rows is {self.bad_rows!r}; it must be {' or '.join(BAD_ROWS)}")
        if self.document_separator == "":
            raise InputError("data.document_separator is empty; leave it out to make each text one document")
        if self.num_workers is not None and self.num_workers < 0:
            raise InputError(f"data.num_workers is {self.num_workers}; it must be 0 or more")
