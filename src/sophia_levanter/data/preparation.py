"""Prepare token stores from documents, one process at a time. An interrupted job can be resumed."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sophia_levanter.allocation import return_freed_memory
from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.documents import Rows, Source, Split, Tally
from sophia_levanter.data.encoding import Texts, Workers, encode_blocks, processes, ray_tasks
from sophia_levanter.data.sources import DataSource
from sophia_levanter.data.store_writer import (
    Place,
    Progress,
    TokenStoreWriter,
    Trail,
    forget_progress,
    has_progress,
    load_progress,
    place_after,
    save_progress,
    writing,
)
from sophia_levanter.data.text_files import Report
from sophia_levanter.data.token_store import FORMAT_VERSION, MANIFEST_NAME, SIDES, TokenStore, digest_of
from sophia_levanter.data.tokenizer import Tokenizer
from sophia_levanter.errors import InputError, counted
from sophia_levanter.files import sync, write_atomically

BLOCK_CHARACTERS = 1 << 18  # the size of a block of text to encode, rounded up to whole records
REPORT_SECONDS = 5.0
PARTIAL = ".partial"
TALLY_NAME = "tally.json"  # next to the stores: the row counts, and the name of the finished directory


@dataclass(frozen=True)
class Job:
    """Settings and callbacks for preparing text."""

    config: DataConfig
    tokenizer: Tokenizer
    report: Report
    warn: Report
    ray: str | None = None  # the address of a Ray cluster; by default, tokenization runs on this machine

    @property
    def cache_dir(self) -> Path:
        """The directory for token stores."""
        return cache_directory(self.config)

    @property
    def workers(self) -> Callable[[], AbstractContextManager[Workers]] | None:
        """A function that starts worker processes or Ray tasks; None to encode in this process."""
        if self.ray is not None:
            return partial(ray_tasks, self.ray, self.tokenizer)
        count = self.config.num_workers if self.config.num_workers is not None else _num_cores()
        # A daemonic process cannot start workers.
        if not count or not self.tokenizer.is_slow or multiprocessing.current_process().daemon:
            return None
        return partial(processes, count, self.tokenizer)


class Preparation:
    """Prepares the token stores for a source of documents.

    Args:
        named: the source, which is opened without reading its text.
        job: the settings and callbacks.
        held_out: the fraction of the documents to hold out in a second store; None for a single store.

    Attributes:
        source: the documents.
        directories: the possible directories for the stores, each named after a digest of everything that the stores
            depend on. With `data.bad_rows: skip`, the second directory is used if rows were skipped.
        base: the directory used during preparation, without its suffix. Its digest ignores the state of the files, so
            that earlier progress is found again after a file is corrected.

    Raises:
        InputError: if the source does not exist.
    """

    def __init__(self, named: DataSource, job: Job, held_out: float | None = None) -> None:
        rows = Rows(job.config, named.field, job.tokenizer.special_tokens)
        self.source = named.open(rows, job.report)
        self._job = job
        self._held_out = held_out
        self._store_names = ["all"] if held_out is None else list(SIDES)

        def place(*text: Any) -> Path:
            identity = [FORMAT_VERSION, *text, job.tokenizer.fingerprint, held_out]
            return job.cache_dir / digest_of(json.dumps(identity).encode())

        self.directories = [place(self.source.identity)]
        if rows.skips:
            self.directories.append(place(self.source.identity, "rows were skipped"))
        self.base = place(self.source.settings)

    def _report(self, line: str) -> None:
        self._job.report(f"{self.source.rows.field}: {line}")

    def stores(self) -> list[TokenStore]:
        """Open the store, or the training and held-out stores. Prepare them first if they are missing.

        Raises:
            InputError: if the source or the cache cannot be used.
        """
        if found := self._find():
            self._report(f"{self.source.name} is already prepared in {found}")
        directory = build_directory(self.base, find=self._find, build=self._build, report=self._job.report)
        _, tally = _read_tally(directory)
        if tally is not None:
            rows = self.source.rows
            rows.tally = tally
            if rows.left_out:
                self._report(rows.left_out)
            for warning in rows.warnings():
                self._job.warn(warning)
        return [TokenStore.open(directory / name, self._job.tokenizer) for name in self._store_names]

    def _find(self) -> Path | None:
        return next(filter(self._is_complete, self.directories), None)

    def _is_complete(self, directory: Path) -> bool:
        return all((directory / name / MANIFEST_NAME).exists() for name in self._store_names)

    def _build(self, partial: Path) -> Path:
        finished = partial.parent / _read_tally(partial)[0]
        if finished in self.directories and self._is_complete(partial):
            forget_progress(partial)
            return finished
        source, tokenizer, rows = self.source, self._job.tokenizer, self.source.rows
        begun = self._begun(partial)
        states = begun.writers if begun else (None,) * len(self._store_names)
        writers = [
            TokenStoreWriter(partial / name, tokenizer, source.name, state)
            for name, state in zip(self._store_names, states, strict=True)
        ]
        if begun:
            self._report(f"resuming {source.name} after {_counts(writers)}")
        else:
            self._report(f"preparing {source.name} with the tokenizer {tokenizer.name}")
        speed = _Speed(writers, source)
        next_report = time.monotonic() + REPORT_SECONDS
        written = [writer.num_written for writer in writers]
        blocks = self._blocks(begun.place if begun else None)
        for (place, error), encoded in encode_blocks(blocks, tokenizer, self._job.workers):
            for writer, documents in zip(writers, encoded, strict=False):
                writer.append(documents)
            if place is not None and (error or written != [writer.num_written for writer in writers]):
                written = [writer.num_written for writer in writers]
                save_progress(partial, Progress(place, tuple(writer.state for writer in writers)))
                return_freed_memory()
            if error:
                if place is not None:
                    self._report(f"saved {_counts(writers)}; run the same command again to continue")
                raise error
            if time.monotonic() >= next_report:
                self._report(f"{_counts(writers)} so far; {speed.report()}")
                next_report = time.monotonic() + REPORT_SECONDS
        if not sum(writer.num_documents for writer in writers):
            left_out = f"; {rows.left_out}" if rows.tally.num_bad else ""
            raise InputError(f"{rows.field}: {source.name!r} contains no documents with text{left_out}")
        for writer in writers:
            writer.finish()
        directory = self.directories[1 if rows.tally.num_bad else 0]
        with writing(f"to {partial}: "):
            tally = json.dumps([directory.name, rows.tally._asdict()], indent=2)
            write_atomically(partial / TALLY_NAME, tally.encode())
        forget_progress(partial)
        self._report(f"{_counts(writers)}{rows.split_at}, prepared in {speed.seconds:.1f} s and saved in {directory}")
        if self._held_out is not None:
            share = writers[1].num_tokens / sum(writer.num_tokens for writer in writers)
            # Below 5%, a single document is often several times the fraction.
            if share > 2 * max(self._held_out, 0.05):
                self._job.report(
                    f"WARNING: {rows.field}: {share:.1%} of {source.name} is held out for validation instead of "
                    f"{self._held_out:.1%}, because a few documents contain much of the text; split them, or set "
                    "data.validation"
                )
        return directory

    def _begun(self, partial: Path) -> Progress | None:
        """Load the progress of an earlier process, or delete it if the text that it covers has changed."""
        begun, rows = load_progress(partial), self.source.rows
        if begun is not None and (rows.skips or not begun.place.tally.num_bad):
            place = place_after(self.source, begun.place)
            if place is not None:
                rows.tally, rows.tally_before = place.tally, place.tally_before
                return replace(begun, place=place)
            self._report(
                f"{self.source.name} changed in the part that was already prepared; preparing it again from the start"
            )
        rows.tally = rows.tally_before = Tally()
        shutil.rmtree(partial)
        partial.mkdir()
        return None

    def _blocks(self, begun: Place | None) -> Iterator[tuple[tuple[Place | None, InputError | None], Texts]]:
        """Yield blocks of text, each with the place after it. A block consists of whole records.

        The place is None while the split buffers a document. If the source cannot be read any further, the error is
        yielded with the last block.
        """
        settled = begun is not None or self._held_out is None
        split = Split(self._held_out or 0.0, field=self.source.rows.field, settled=settled)
        trail = Trail(self.source, begun)
        texts: Texts = ([], [])
        size = 0

        def place() -> Place | None:
            return trail.place if split.is_settled and trail.place.num_documents else None

        try:
            for position, text in self.source.documents(trail.place.position):
                if size >= BLOCK_CHARACTERS and position != trail.place.position:
                    yield (place(), None), texts
                    texts, size = ([], []), 0
                trail.add(position, text)
                for held_out, own in split.push(text):
                    texts[held_out].append(own)
                    size += len(own)
        except InputError as error:
            kept = place()
            # The empty digest makes the next process compare the file's documents even if the file appears unchanged.
            yield (kept and replace(kept, file=""), error), texts
            return
        for held_out, own in split.finish():
            texts[held_out].append(own)
        rows = self.source.rows
        rows.tally = rows.tally._replace(num_copies=split.num_copies)
        yield (None, None), texts


class _Speed:
    """Measures how fast data is prepared, and estimates the time left."""

    def __init__(self, writers: list[TokenStoreWriter], source: Source) -> None:
        self._started = time.monotonic()
        self._writers = writers
        self._source = source
        self._before = self._totals()
        self._share_before: float | None = None
        self._started_at_share = self._started

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def _totals(self) -> tuple[int, int]:
        return sum(w.num_documents for w in self._writers), sum(w.num_bytes for w in self._writers)

    def report(self) -> str:
        """Return the speed so far and, from the second call on, the time left."""
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
    """Return the absolute path of the directory for token stores."""
    return Path(os.path.abspath(os.path.expanduser(config.cache_dir)))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_tally(directory: Path) -> tuple[str, Tally | None]:
    """Return the name of the finished directory and its row counts, or an empty name and None without a tally file."""
    try:
        name, tally = json.loads((directory / TALLY_NAME).read_bytes())
        return str(name), Tally(**tally)
    except (OSError, ValueError, TypeError):
        return "", None


def _counts(writers: list[TokenStoreWriter]) -> str:
    documents = sum(writer.num_documents for writer in writers)
    tokens = sum(writer.num_tokens for writer in writers)
    text_bytes = sum(writer.num_bytes for writer in writers)
    held_out = f" ({writers[1].num_tokens:,} held out)" if len(writers) == 2 else ""
    size = f"{counted(documents, 'document')}, {counted(tokens, 'token')}{held_out}"
    return f"{size}, {text_bytes / max(tokens, 1):.2f} bytes per token"


def build_directory(
    base: Path, *, find: Callable[[], Path | None], build: Callable[[Path], Path], report: Report
) -> Path:
    """Return the directory found by `find`, or create one with `build` if `find` returns None.

    `build` is called with the directory `base.partial`, which is then renamed to the path that `build` returns. If the
    process is killed, the directory is kept for the next call to `build`; after an `InputError`, it is kept only if it
    contains progress. A second process with the same `base` waits for the first.

    Raises:
        InputError: if the parent directory of `base` is not writable.
    """
    if (found := find()) is not None:
        return found
    lock_file = base.with_name(f"{base.name}.lock")
    with _naming_cache_dir(base.parent):
        base.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(lock_file, wait=False)
    if lock is None:
        report(f"waiting for another process to prepare {base}")
        with _naming_cache_dir(base.parent):
            lock = _lock(lock_file, wait=True)
    assert lock is not None
    try:
        return find() or _build_beside(base, build)
    finally:
        lock_file.unlink(missing_ok=True)
        os.close(lock)


def _build_beside(base: Path, build: Callable[[Path], Path]) -> Path:
    partial = base.with_name(base.name + PARTIAL)
    with _naming_cache_dir(base.parent):
        partial.mkdir(exist_ok=True)
    try:
        target = build(partial)
    except InputError:
        if not has_progress(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    with _naming_cache_dir(base.parent):
        shutil.rmtree(target, ignore_errors=True)  # any existing directory is incomplete
        partial.rename(target)
        sync(target.parent)
    return target


def _lock(path: Path, *, wait: bool) -> int | None:
    """Lock a file and return its descriptor, or None if another process holds the lock and `wait` is false.

    The system releases the lock when the process ends for any reason.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder deletes the file at the end. A lock on a deleted file has no effect, so try again.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)


@contextmanager
def _naming_cache_dir(parent: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"data.cache_dir: cannot write to {parent}: {error.strerror}; choose another directory"
        ) from error
