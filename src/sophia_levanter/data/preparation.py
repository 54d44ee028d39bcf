"""From a data config to token stores, prepared once and kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sophia_levanter.allocation import return_freed_memory
from sophia_levanter.data.blocks import Texts
from sophia_levanter.data.cache import build_directory
from sophia_levanter.data.config import DataConfig
from sophia_levanter.data.documents import START, Position
from sophia_levanter.data.encoding import Workers, encode_blocks, processes, ray_tasks
from sophia_levanter.data.progress import Progress, forget_progress, load_progress, save_progress
from sophia_levanter.data.sources import Source, open_source
from sophia_levanter.data.split import NoSplit, Split
from sophia_levanter.data.store_writer import NotWritten, TokenStoreWriter
from sophia_levanter.data.token_store import FORMAT_VERSION, MANIFEST_NAME, SIDES, TokenStore, digest_of
from sophia_levanter.data.tokenizer import Tokenizer
from sophia_levanter.errors import InputError

BLOCK_CHARACTERS = 1 << 18  # of text are encoded by one process at a time, rounded up to whole documents
REPORT_SECONDS = 5.0

Report = Callable[[str], None]


@dataclass(frozen=True)
class Preparation:
    """One source of documents and the directory for the token stores that are made of it.

    Attributes:
        field: the config field that names the source, for messages.
        name: the source.
        directory: where the stores are: under a digest of all that determines them.
    """

    field: str
    name: str
    directory: Path
    _source: Source
    _tokenizer: Tokenizer
    _held_out: float | None
    _workers: Callable[[], AbstractContextManager[Workers]] | None

    @classmethod
    def of(
        cls,
        field: str,
        name: str,
        config: DataConfig,
        tokenizer: Tokenizer,
        report: Report,
        *,
        held_out: float | None = None,
        ray: str | None = None,
    ) -> Preparation:
        """Looks the source up; nothing of its text is read yet.

        Args:
            field: the config field that names it.
            name: what `open_source` takes.
            config: how its text is read, and where stores are kept.
            tokenizer: what makes the tokens.
            report: takes a line of news about the source's files.
            held_out: share of the documents that goes to a second store.
            ray: address of a Ray cluster whose cores make the tokens.

        Raises:
            InputError: if there is no such source.
        """
        source = open_source(name, config, field=field, report=report)
        identity = [FORMAT_VERSION, source.identity, tokenizer.fingerprint, held_out]
        directory = cache_directory(config) / digest_of(json.dumps(identity).encode())
        count = config.num_workers if config.num_workers is not None else _num_cores()
        workers: Callable[[], AbstractContextManager[Workers]] | None = None
        if ray is not None:
            workers = partial(ray_tasks, ray, tokenizer)
        elif count and tokenizer.is_slow and not multiprocessing.current_process().daemon:  # which may start none
            workers = partial(processes, count, tokenizer)
        return cls(field, name, directory, source, tokenizer, held_out, workers)

    @property
    def source(self) -> Source:
        """The documents."""
        return self._source

    def stores(self, report: Report) -> list[TokenStore]:
        """The source's store, or those of its two sides; made if they are not there.

        Raises:
            InputError: if the source or the cache is not usable.
        """
        if self._is_complete(self.directory):
            report(f"{self.field}: {self.name} is prepared already, in {self.directory}")
        build_directory(
            self.directory,
            is_complete=self._is_complete,
            build=lambda directory: self._build(directory, report),
            resumes_after=NotWritten,
            report=report,
        )
        return [TokenStore.open(self.directory / name, self._tokenizer) for name in self._store_names]

    def _is_complete(self, directory: Path) -> bool:
        return all((directory / name / MANIFEST_NAME).exists() for name in self._store_names)

    @property
    def _store_names(self) -> list[str]:
        return ["all"] if self._held_out is None else list(SIDES)

    def _build(self, directory: Path, report: Report) -> None:
        begun = load_progress(directory)
        states = begun.writers if begun else (None,) * len(self._store_names)
        writers = [
            TokenStoreWriter(directory / name, self._tokenizer, self.name, state)
            for name, state in zip(self._store_names, states, strict=True)
        ]
        if begun:
            report(f"{self.field}: going on with {self.name} after {_counts(writers)}")
        else:
            report(f"{self.field}: preparing {self.name} with the tokenizer {self._tokenizer.name}")
        speed = _Speed(writers, self._source)
        next_report = time.monotonic() + REPORT_SECONDS
        written = [writer.num_written for writer in writers]
        blocks = self._blocks(begun.position if begun else START, settled=begun is not None)
        for position, encoded in encode_blocks(blocks, self._tokenizer, self._workers):
            for writer, documents in zip(writers, encoded, strict=False):
                writer.append(documents)
            if position is not None and written != [writer.num_written for writer in writers]:
                written = [writer.num_written for writer in writers]
                _save(directory, Progress(position, tuple(writer.state for writer in writers)))
                return_freed_memory()
            if time.monotonic() >= next_report:
                report(f"{self.field}: {_counts(writers)} so far; {speed}")
                next_report = time.monotonic() + REPORT_SECONDS
        if not sum(writer.num_documents for writer in writers):
            raise InputError(f"{self.field}: {self.name!r} is empty: there is no document with text in it")
        for writer in writers:
            writer.finish()
        forget_progress(directory)
        report(f"{self.field}: {_counts(writers)}, prepared in {speed.seconds:.1f} s, in {self.directory}")

    def _blocks(self, start: Position, *, settled: bool) -> Iterator[tuple[Position | None, Texts]]:
        """Texts of about a block's size, with the position after each, or None if a document before it is kept back."""
        split = NoSplit() if self._held_out is None else Split(self._held_out, field=self.field, settled=settled)
        texts: Texts = ([], [])
        size = 0
        position: Position | None = None
        for position, text in self._source.documents(start):
            for held_out, own in split.push(text):
                texts[held_out].append(own)
                size += len(own)
            if size >= BLOCK_CHARACTERS:
                yield position if split.is_settled else None, texts
                texts, size = ([], []), 0
        for held_out, own in split.finish():
            texts[held_out].append(own)
        yield None, texts


class _Speed:
    """How fast documents come, and how long the rest will take."""

    def __init__(self, writers: list[TokenStoreWriter], source: Source) -> None:
        self._started = time.monotonic()
        self._writers = writers
        self._source = source
        self._before = self._totals()
        self._share_before: float | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def _totals(self) -> tuple[int, int]:
        return sum(w.num_documents for w in self._writers), sum(w.num_bytes for w in self._writers)

    def __str__(self) -> str:
        documents, size = (now - before for now, before in zip(self._totals(), self._before, strict=True))
        shown = f"{documents / self.seconds:,.0f} documents/s, {size / self.seconds / 1e6:.1f} MB/s"
        share = self._source.share_read()
        if self._share_before is None or share is None:
            self._share_before, self._started_at_share = share, time.monotonic()
            return shown
        if share <= self._share_before:
            return shown
        left = (1 - share) * (time.monotonic() - self._started_at_share) / (share - self._share_before)
        minutes, seconds = divmod(round(left), 60)
        return f"{shown}, {minutes // 60}:{minutes % 60:02}:{seconds:02} left"


def cache_directory(config: DataConfig) -> Path:
    """Where stores are kept, named so that it is found from any working directory."""
    return Path(os.path.abspath(os.path.expanduser(config.cache_dir)))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _save(directory: Path, progress: Progress) -> None:
    try:
        save_progress(directory, progress)
    except OSError as error:
        raise NotWritten(
            f"data.cache_dir: cannot write in {directory}: {error.strerror}; make room, or choose another place; "
            "the same command goes on from what is written"
        ) from error


def _counts(writers: list[TokenStoreWriter]) -> str:
    documents = sum(writer.num_documents for writer in writers)
    tokens = sum(writer.num_tokens for writer in writers)
    text_bytes = sum(writer.num_bytes for writer in writers)
    held_out = f" ({writers[1].num_tokens:,} held out)" if len(writers) == 2 else ""
    return f"{documents:,} documents, {tokens:,} tokens{held_out}, {text_bytes / max(tokens, 1):.2f} bytes per token"
