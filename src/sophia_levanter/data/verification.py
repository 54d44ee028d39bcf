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
        self._cache_dir = cache_dir
        self._processes = processes
        self._name = f"data/{next(_numbers)}"
        self._finishes = 0
        self._failure: Exception | None = None
        self._thread = Thread(target=self._run, name="verification", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what has been found so far, if this process is the only one; to be called often.

        Raises:
            InputError: if a corpus is not what it should be.
            Exception: what kept this process from finding out.
        """
        if self._failure is not None and self._processes.count == 1:
            raise self._failure

    def finish(self) -> None:
        """Return when all corpora have been compared and have not changed since; all processes call it together.

        Raises:
            InputError: in every process, if a corpus of one is not what it should be.
            Exception: what kept this process from finding out; `OSError` if it was another process.
        """
        self._thread.join()
        if self._failure is None:
            self._note(lambda corpus: corpus.check_unchanged())
        name, patience = f"{self._name}/{self._finishes}", PATIENCE if self._finishes else READING_PATIENCE
        mine = None if self._failure is None else _described(self._failure)
        failure = self._processes.first_failure(name, mine, patience)
        if self._finishes:
            self._processes.forget(f"{self._name}/{self._finishes - 1}")
        self._finishes += 1
        if failure is None:
            return
        if self._failure is not None and failure == mine:
            raise self._failure
        is_input, message = json.loads(failure)
        raise InputError(message) if is_input else OSError(message)

    def _run(self) -> None:
        self._note(lambda corpus: corpus.check_whole(self._cache_dir))

    def _note(self, check: Callable[[Tokens], None]) -> None:
        try:
            for corpus in self._corpora:
                check(corpus)
        except Exception as error:  # whatever it is, the text has not been compared
            self._failure = error


def _described(error: Exception) -> str:
    """An error for other processes: whether the input is at fault, and a message."""
    is_input = isinstance(error, InputError)
    return json.dumps([is_input, str(error) if is_input or isinstance(error, OSError) else repr(error)])
