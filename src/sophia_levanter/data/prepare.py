"""From a data config to token stores, prepared once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sophia_levanter.data.cache import build_directory
from sophia_levanter.data.config import DataConfig
from sophia_levanter.data.documents import read_documents, resolve_files
from sophia_levanter.data.split import split_documents
from sophia_levanter.data.token_store import FORMAT_VERSION, MANIFEST_NAME, TokenStore, TokenStoreWriter
from sophia_levanter.data.tokenizer import Tokenizer, load_tokenizer

ENCODE_CHARACTERS = 1 << 22  # of text are encoded at once, rounded up to whole documents
REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class TextData:
    """The tokens to train on and to validate with."""

    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore


def prepare(config: DataConfig, report: Callable[[str], None]) -> TextData:
    """The token stores of `config`, from `config.cache_dir` if they are there.

    They are kept under a digest of all that determines them. Memory is bounded by the largest documents.

    Args:
        config: the text, its tokenizer and the split.
        report: takes a line of news for the user.

    Raises:
        InputError: if the tokenizer, a source or the cache is not usable. Nothing half done is left behind.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.validation is None:
        source = _Source.of("data.train", config.train, config, tokenizer, config.validation_fraction)
        train, validation = source.stores(report)
        return TextData(tokenizer, train, validation)
    # Both are looked up before the first is read: a misspelt validation path must not wait for the training text.
    sources = [
        _Source.of("data.train", config.train, config, tokenizer, None),
        _Source.of("data.validation", config.validation, config, tokenizer, None),
    ]
    (train,), (validation,) = (source.stores(report) for source in sources)
    return TextData(tokenizer, train, validation)


@dataclass(frozen=True)
class _Source:
    """One source of documents and the directory for what is made of it."""

    field: str
    name: str
    text_field: str
    tokenizer: Tokenizer
    held_out: float | None  # share of the documents that goes to a second store
    directory: Path

    @classmethod
    def of(cls, field: str, name: str, config: DataConfig, tokenizer: Tokenizer, held_out: float | None) -> _Source:
        files = [(str(path), _size_and_time(path)) for path in resolve_files(name, field=field)]
        identity = [FORMAT_VERSION, name, files, config.text_field, tokenizer.fingerprint, held_out]
        digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
        directory = Path(os.path.expanduser(config.cache_dir)).absolute() / digest
        return cls(field, name, config.text_field, tokenizer, held_out, directory)

    def stores(self, report: Callable[[str], None]) -> list[TokenStore]:
        if self._is_complete(self.directory):
            report(f"{self.field}: {self.name} is prepared already, in {self.directory}")
        build_directory(
            self.directory,
            is_complete=self._is_complete,
            build=lambda directory: self._build(directory, report),
            report=report,
        )
        return [TokenStore.open(self.directory / name, self.tokenizer) for name in self._store_names]

    def _is_complete(self, directory: Path) -> bool:
        return all(os.path.exists(directory / name / MANIFEST_NAME) for name in self._store_names)

    @property
    def _store_names(self) -> list[str]:
        return ["all"] if self.held_out is None else ["train", "validation"]

    def _build(self, directory: Path, report: Callable[[str], None]) -> None:
        started = time.monotonic()
        report(f"{self.field}: preparing {self.name} with the tokenizer {self.tokenizer.name}")
        writers = [TokenStoreWriter(directory / name, self.tokenizer, self.name) for name in self._store_names]
        next_report = started + REPORT_SECONDS
        for group in _groups(self._documents(), ENCODE_CHARACTERS):
            encoded = self.tokenizer.encode_batch([text for _, text in group])
            for (held_out, text), tokens in zip(group, encoded, strict=True):
                writers[held_out].append(tokens, num_bytes=len(text.encode("utf-8")))
            if time.monotonic() >= next_report:
                report(f"{self.field}: {_summary(writers)} so far")
                next_report = time.monotonic() + REPORT_SECONDS
        for writer in writers:
            writer.finish()
        seconds = time.monotonic() - started
        report(f"{self.field}: {_summary(writers)}, prepared in {seconds:.1f} s, in {self.directory}")

    def _documents(self) -> Iterator[tuple[bool, str]]:
        documents = read_documents(self.name, self.text_field, field=self.field)
        if self.held_out is None:
            return ((False, text) for text in documents)
        return split_documents(documents, self.held_out, field=self.field)


def _groups(documents: Iterable[tuple[bool, str]], characters: int) -> Iterator[list[tuple[bool, str]]]:
    group: list[tuple[bool, str]] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document[1])
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _summary(writers: list[TokenStoreWriter]) -> str:
    documents = sum(writer.num_documents for writer in writers)
    tokens = sum(writer.num_tokens for writer in writers)
    text_bytes = sum(writer.num_bytes for writer in writers)
    held_out = f" ({writers[1].num_tokens:,} held out)" if len(writers) == 2 else ""
    return f"{documents:,} documents, {tokens:,} tokens{held_out}, {text_bytes / tokens:.2f} bytes per token"


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
