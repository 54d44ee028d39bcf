"""Whether the text that a run trains on is the one that it was given."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

from sophia_levanter.data.token_store import Tokens
from sophia_levanter.errors import InputError
from sophia_levanter.partition.messages import PATIENCE, Processes

# Seconds that other processes wait while one reads a large corpus.
READING_PATIENCE = 3600.0
# Seconds between looks at whether the run is to stop, and those that a comparison may then still take.
STOPPING_PATIENCE = 0.5
# What a process has found, the worst first.
FOUND = ("wrong", "failed", "unfinished", "compared")

_numbers = itertools.count()


class Verification:
    """Compares corpora with what they should be, in a thread of its own while training begins.

    Args:
        corpora: some of them may be large.
        cache_dir: where it is kept that files of large ones have been compared.
        processes: those of the run, which each read their own files.
    """

    def __init__(self, corpora: Sequence[Tokens], cache_dir: Path, processes: Processes) -> None:
        self._corpora = corpora
        self._processes = processes
        self._name = f"data/{next(_numbers)}"
        self._finishes = 0
        self._failure: Exception | None = None
        self._thread = self._start(lambda corpus: corpus.check_whole(cache_dir))

    def check(self) -> None:
        """Raise what has been found so far, if this process is the only one; to be called often.

        Raises:
            InputError: if a corpus is not what it should be.
            Exception: what kept this process from finding out.
        """
        if self._failure is not None and self._processes.count == 1:
            raise self._failure

    def finish(self, stopping: Callable[[], bool] = lambda: False) -> bool:
        """Return when all corpora have been compared and have not changed since; all processes call it together.

        Args:
            stopping: whether the run is to stop, and may soon be killed: then nothing is waited for.

        Returns:
            Whether they have, in every process; the same in all.

        Raises:
            InputError: in every process, if a corpus of one is not what it should be.
            Exception: what kept this process from finding out; `OSError` if it was another process.
        """
        if self._wait(stopping) and self._failure is None:
            self._thread = self._start(lambda corpus: corpus.check_unchanged())
            self._wait(stopping)
        mine = json.dumps(self._found())
        name, patience = f"{self._name}/{self._finishes}", PATIENCE if self._finishes else READING_PATIENCE
        everywhere = self._processes.gather(f"{name}/found", mine, patience)
        worst = min(everywhere, key=lambda text: FOUND.index(json.loads(text)[0]), default=None)
        worst = self._processes.broadcast(f"{name}/worst", worst, patience)
        if self._finishes:
            self._processes.forget(f"{self._name}/{self._finishes - 1}")
        self._finishes += 1
        found, message = json.loads(worst)
        if found not in ("wrong", "failed"):
            return bool(found == "compared")
        if self._failure is not None and worst == mine:
            raise self._failure
        raise InputError(message) if found == "wrong" else OSError(message)

    def _start(self, check: Callable[[Tokens], None]) -> Thread:
        thread = Thread(target=self._note, args=[check], name="verification", daemon=True)
        thread.start()
        return thread

    def _wait(self, stopping: Callable[[], bool]) -> bool:
        """Whether the thread has ended; not before it has, unless the run is to stop."""
        self._thread.join(STOPPING_PATIENCE)
        while self._thread.is_alive() and not stopping():
            self._thread.join(STOPPING_PATIENCE)
        return not self._thread.is_alive()

    def _found(self) -> tuple[str, str]:
        """One of `FOUND`, and a message."""
        error = self._failure
        if error is None:
            return "unfinished" if self._thread.is_alive() else "compared", ""
        if isinstance(error, InputError):
            return "wrong", str(error)
        return "failed", str(error) if isinstance(error, OSError) else repr(error)

    def _note(self, check: Callable[[Tokens], None]) -> None:
        try:
            for corpus in self._corpora:
                check(corpus)
        except Exception as error:  # whatever it is, the text has not been compared
            self._failure = error
