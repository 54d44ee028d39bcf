"""Ends a run that is stuck: alive, and waiting for what will not come."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from sophia_levanter.exit_status import FAILURE


class Watchdog:
    """Ends the process, every thread's stack on standard error, when there has been no progress for some time.

    A collective whose other side has hung never returns, and no exception can be raised there.

    Args:
        seconds: how long without progress; None never ends it.
    """

    def __init__(self, seconds: int | None) -> None:
        self._seconds = seconds
        self._doing = ""
        self._deadline: float | None = None
        self._stopped = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()

    def begin(self, doing: str) -> None:
        """There is progress: this begins now.

        Args:
            doing: what, for the message: "step 7".
        """
        self._doing = doing
        self._deadline = None if self._seconds is None else time.monotonic() + self._seconds

    def pause(self) -> None:
        """What begins now may take any time."""
        self._deadline = None

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._stopped.wait(min(1.0, self._seconds / 4)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._end()

    def _end(self) -> None:
        print(
            f"error: {self._doing} has taken more than {self._seconds} s (trainer.step_timeout); "
            "the run goes on from its last checkpoint when it is started again; what each thread was doing:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(FAILURE)
