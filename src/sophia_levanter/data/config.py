"""Where the text comes from. Free of heavy imports, so that a command line can be checked at once."""

from __future__ import annotations

from dataclasses import dataclass

from sophia_levanter.errors import InputError


@dataclass(frozen=True)
class DataConfig:
    """The training and validation text and how it becomes tokens.

    Raises:
        InputError: if `validation_fraction` is not in (0, 1) or a name is empty.
    """

    train: str = "python_stdlib"  # python_stdlib, or a path or glob of text or .jsonl files (.gz too)
    validation: str | None = None  # like train; without it a part of train is held out, by document
    tokenizer: str = "bytes"  # bytes, or the name of a tiktoken encoding such as gpt2
    text_field: str = "text"  # the field of a JSONL record that holds the text
    validation_fraction: float = 0.05  # share of documents held out when validation is not given
    cache_dir: str = "~/.cache/sophia_levanter"  # token stores are kept here

    def __post_init__(self) -> None:
        for name in ("train", "tokenizer", "text_field", "cache_dir"):
            if not getattr(self, name):
                raise InputError(f"data.{name} is empty")
        if self.validation is not None and not self.validation:
            raise InputError("data.validation is empty; leave it out to hold out a part of data.train")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"data.validation_fraction is {self.validation_fraction}; it must be between 0 and 1")
