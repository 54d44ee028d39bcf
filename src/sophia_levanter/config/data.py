"""Where the text comes from. Free of heavy imports, so that a command line can be checked at once."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import ClassVar

from sophia_levanter.config.settings import Settings, setting
from sophia_levanter.errors import InputError
from sophia_levanter.files import check_utf8


@dataclass(frozen=True)
class MixturePart(Settings):
    """One of several training texts."""

    section: ClassVar[str] = "data.train"

    source: str = setting(MISSING, "as data.train", empty="name a file, hub:NAME, ...")
    weight: float = setting(1.0, "share of its sequences, relative to the other weights", above=0)


@dataclass(frozen=True)
class DataConfig(Settings):
    """The training and validation text and how it becomes tokens.

    Raises:
        InputError: if a value is out of its bounds, or a mixture has no validation text.
    """

    section: ClassVar[str] = "data"

    train: tuple[MixturePart, ...] | str = setting(
        "python_stdlib", "files, hub:NAME, ...; in YAML also a list with weights"
    )
    validation: str | None = setting(
        None,
        "like train; if not given, part of train's documents is held out",
        empty="leave it out to hold out a part of data.train",
    )
    tokenizer: str = setting("bytes", "bytes, or the name of a tiktoken encoding such as gpt2")
    text_field: str = setting("text", "field of a JSONL, Parquet or dataset record that holds the text")
    validation_fraction: float = setting(
        0.05, "share of the documents held out if validation is not given", above=0, below=1
    )
    invalid_utf8: str = setting(
        "error", "bytes that are not UTF-8: stop, or replace them with U+FFFD", choices=("error", "replace")
    )
    on_leak: str = setting("warn", "documents that are in both train and validation", choices=("warn", "error"))
    bad_rows: str = setting("error", "rows without text: stop, or skip and count them", choices=("error", "skip"))
    document_separator: str | None = setting(
        None,
        "split texts at this string, such as <|endoftext|>; each piece is a document",
        empty="leave it out to make each text one document",
    )
    num_workers: int | None = setting(
        None, "processes that make tokens; null: one per core, 0: this process only", low=0
    )
    cache_dir: str = setting("~/.cache/sophia_levanter", "directory of the token stores")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train == ():
            raise InputError("data.train is empty; name a file, hub:NAME, ...")
        check_utf8("data.cache_dir", self.cache_dir)
        if not isinstance(self.train, str) and self.validation is None:
            raise InputError("data.validation is missing; a mixture in data.train has no held-out part")

    @property
    def train_parts(self) -> tuple[MixturePart, ...]:
        """The training texts; one of weight 1 if `train` is not a mixture."""
        return (MixturePart(self.train),) if isinstance(self.train, str) else self.train
