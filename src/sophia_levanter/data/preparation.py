"""From a data config to token stores, prepared once and kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sophia_levanter.allocation import return_freed_memory
from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.blocks import Texts
from sophia_levanter.data.cache import build_directory
from sophia_levanter.data.encoding import Workers, encode_blocks, processes, ray_tasks
from sophia_levanter.data.progress import (
    Place,
    Progress,
    Trail,
    forget_progress,
    has_progress,
    load_progress,
    place_after,
    save_progress,
)
from sophia_levanter.data.rows import Tally
from sophia_levanter.data.sources import DataSource, Report, Source
from sophia_levanter.data.split import NoSplit, Split
from sophia_levanter.data.store_writer import NotWritten, TokenStoreWriter
from sophia_levanter.data.token_store import FORMAT_VERSION, MANIFEST_NAME, SIDES, TokenStore, digest_of
from sophia_levanter.data.tokenizer import Tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.files import write_atomically

BLOCK_CHARACTERS = 1 << 18  # of text are encoded by one process at a time, rounded up to whole documents
REPORT_SECONDS = 5.0
TALLY_NAME = "tally.json"  # beside the stores: what the rows of their text held, and the directory's name


@dataclass(frozen=True)
class Preparation:
    """One source of documents and the directory for the token stores that are made of it.

    Attributes:
        field: the config field that names the source, for messages.
        name: the source.
        directories: where the stores may be: under a digest of all that determines them; with `data.bad_rows: skip`
            also where they are if rows were skipped.
        base: what the directory is called, with a suffix, while it is made. Files that change are not in its digest,
            so that what was prepared before an error is found when they are corrected.
    """

    field: str
    name: str
    directories: tuple[Path, ...]
    base: Path
    _source: Source
    _tokenizer: Tokenizer
    _held_out: float | None
    _workers: Callable[[], AbstractContextManager[Workers]] | None

    @classmethod
    def of(
        cls,
        named: DataSource,
        config: DataConfig,
        tokenizer: Tokenizer,
        report: Report,
        *,
        held_out: float | None = None,
        ray: str | None = None,
    ) -> Preparation:
        """Looks the source up; nothing of its text is read yet.

        Args:
            named: the source.
            config: how its text is read, and where stores are kept.
            tokenizer: what makes the tokens.
            report: takes a line of news about the source's files.
            held_out: share of the documents that goes to a second store.
            ray: address of a Ray cluster whose cores make the tokens.

        Raises:
            InputError: if there is no such source.
        """
        source = named.open(config, report, tokenizer.special_tokens)

        def place(*text: Any) -> Path:
            identity = [FORMAT_VERSION, *text, tokenizer.fingerprint, held_out]
            return cache_directory(config) / digest_of(json.dumps(identity).encode())

        directories = [place(source.identity)]
        if config.bad_rows == "skip":
            directories.append(place(source.identity, "rows were skipped"))
        count = config.num_workers if config.num_workers is not None else _num_cores()
        workers: Callable[[], AbstractContextManager[Workers]] | None = None
        if ray is not None:
            workers = partial(ray_tasks, ray, tokenizer)
        elif count and tokenizer.is_slow and not multiprocessing.current_process().daemon:  # which may start none
            workers = partial(processes, count, tokenizer)
        base = place(source.settings)
        return cls(named.field, named.name, tuple(directories), base, source, tokenizer, held_out, workers)

    @property
    def source(self) -> Source:
        """The documents."""
        return self._source

    def stores(self, report: Report, warn: Report) -> list[TokenStore]:
        """The source's store, or those of its two sides; made if they are not there.

        Args:
            report: takes a line of news.
            warn: takes a warning.

        Raises:
            InputError: if the source or the cache is not usable.
        """
        if found := self._find():
            report(f"{self.field}: {self.name} is prepared already, in {found}")
        directory = build_directory(
            self.base,
            find=self._find,
            build=lambda partial: self._build(partial, report),
            is_resumable=has_progress,
            report=report,
        )
        _, tally = _read_tally(directory)
        if tally is not None:
            rows = self._source.rows
            rows.tally = tally
            if rows.left_out:
                report(f"{self.field}: {rows.left_out}")
            for warning in rows.warnings():
                warn(warning)
        return [TokenStore.open(directory / name, self._tokenizer) for name in self._store_names]

    def _find(self) -> Path | None:
        return next(filter(self._is_complete, self.directories), None)

    def _is_complete(self, directory: Path) -> bool:
        return all((directory / name / MANIFEST_NAME).exists() for name in self._store_names)

    @property
    def _store_names(self) -> list[str]:
        return ["all"] if self._held_out is None else list(SIDES)

    def _build(self, partial: Path, report: Report) -> Path:
        finished = partial.parent / _read_tally(partial)[0]
        if finished in self.directories and self._is_complete(partial):
            forget_progress(partial)
            return finished
        begun = self._begun(partial, report)
        states = begun.writers if begun else (None,) * len(self._store_names)
        writers = [
            TokenStoreWriter(partial / name, self._tokenizer, self.name, state)
            for name, state in zip(self._store_names, states, strict=True)
        ]
        if begun:
            report(f"{self.field}: going on with {self.name} after {_counts(writers)}")
        else:
            report(f"{self.field}: preparing {self.name} with the tokenizer {self._tokenizer.name}")
        speed = _Speed(writers, self._source)
        next_report = time.monotonic() + REPORT_SECONDS
        written = [writer.num_written for writer in writers]
        blocks = self._blocks(begun.place if begun else None)
        for (place, error), encoded in encode_blocks(blocks, self._tokenizer, self._workers):
            for writer, documents in zip(writers, encoded, strict=False):
                writer.append(documents)
            if place is not None and (error or written != [writer.num_written for writer in writers]):
                written = [writer.num_written for writer in writers]
                _save(partial, Progress(place, tuple(writer.state for writer in writers)))
                return_freed_memory()
            if error:
                if place is not None:
                    report(f"{self.field}: kept {_counts(writers)}; run the same command again to continue")
                raise error
            if time.monotonic() >= next_report:
                report(f"{self.field}: {_counts(writers)} so far; {speed}")
                next_report = time.monotonic() + REPORT_SECONDS
        rows = self._source.rows
        if not sum(writer.num_documents for writer in writers):
            left_out = f"; {rows.left_out}" if rows.tally.num_bad else ""
            raise InputError(f"{self.field}: {self.name!r} contains no documents with text{left_out}")
        for writer in writers:
            writer.finish()
        directory = self.directories[1 if rows.tally.num_bad else 0]
        _write_tally(partial, directory.name, rows.tally)
        forget_progress(partial)
        counts = f"{_counts(writers)}{rows.split_at}"
        report(f"{self.field}: {counts}, prepared in {speed.seconds:.1f} s, in {directory}")
        if self._held_out is not None and self._held_out <= 0.5 and writers[1].num_tokens > writers[0].num_tokens:
            report(
                f"WARNING: {self.field}: most of {self.name} is held out for validation, as a few documents have most "
                "of the text; split them, or name data.validation"
            )
        return directory

    def _begun(self, partial: Path, report: Report) -> Progress | None:
        """What an earlier process left, if the text up to there is still the same; otherwise it is deleted."""
        begun, rows = load_progress(partial), self._source.rows
        if begun is not None and (rows.skips or not begun.place.tally.num_bad):
            place = place_after(self._source, begun.place)
            if place is not None:
                rows.tally, rows.tally_before = place.tally, place.tally_before
                return replace(begun, place=place)
            report(
                f"{self.field}: {self.name} changed in the part that was already prepared; "
                "preparing it again from the start"
            )
        rows.tally = rows.tally_before = Tally()
        shutil.rmtree(partial)
        partial.mkdir()
        return None

    def _blocks(self, begun: Place | None) -> Iterator[tuple[tuple[Place | None, InputError | None], Texts]]:
        """Texts of about a block's size, of whole records, with the place after each.

        The place is None if a document before it is kept back. Where the source cannot be read any further, the last
        block comes with the error.
        """
        settled = begun is not None
        split = NoSplit() if self._held_out is None else Split(self._held_out, field=self.field, settled=settled)
        trail = Trail(self._source, begun)
        texts: Texts = ([], [])
        size = 0

        def place() -> Place | None:
            return trail.place if split.is_settled and trail.num_documents else None

        try:
            for position, text in self._source.documents(trail.position):
                if size >= BLOCK_CHARACTERS and position != trail.position:
                    yield (place(), None), texts
                    texts, size = ([], []), 0
                trail.add(position, text)
                for held_out, own in split.push(text):
                    texts[held_out].append(own)
                    size += len(own)
        except InputError as error:
            kept = place()
            # Whatever the size and time of the file say then: its documents are compared before more are taken.
            yield (kept and replace(kept, file=""), error), texts
            return
        for held_out, own in split.finish():
            texts[held_out].append(own)
        yield (None, None), texts


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
        raise _not_written(directory, error) from error


def _write_tally(directory: Path, name: str, tally: Tally) -> None:
    try:
        write_atomically(directory / TALLY_NAME, json.dumps([name, tally._asdict()], indent=2).encode())
    except OSError as error:
        raise _not_written(directory, error) from error


def _read_tally(directory: Path) -> tuple[str, Tally | None]:
    """The name of the finished directory, and what its rows held; None of stores that have no such file."""
    try:
        name, tally = json.loads((directory / TALLY_NAME).read_bytes())
        return str(name), Tally(**tally)
    except (OSError, ValueError, TypeError):
        return "", None


def _not_written(directory: Path, error: OSError) -> NotWritten:
    return NotWritten(
        f"data.cache_dir: cannot write in {directory}: {error.strerror}; make room, or choose another place; "
        "the same command goes on from what is written"
    )


def _counts(writers: list[TokenStoreWriter]) -> str:
    documents = sum(writer.num_documents for writer in writers)
    tokens = sum(writer.num_tokens for writer in writers)
    text_bytes = sum(writer.num_bytes for writer in writers)
    held_out = f" ({writers[1].num_tokens:,} held out)" if len(writers) == 2 else ""
    return f"{documents:,} documents, {tokens:,} tokens{held_out}, {text_bytes / max(tokens, 1):.2f} bytes per token"
