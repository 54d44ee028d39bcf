"""How a run is asked to stop: by SIGINT or SIGTERM to one of its processes."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from types import FrameType

from sophia_levanter.status import FAILURE

STOPPING = (signal.SIGINT, signal.SIGTERM)
RUN_STOPS = "stop requested: the run saves and ends after the present step or compilation"


class StopRequest:
    """Notes the signals that ask a run to stop, so that it can save and end, and says so at once.

    Outside the main thread signals are not its business. A second SIGINT acts as it would without this, unless another
    signal came before it. The handlers stay until the caller puts its own back: a signal that comes while the run
    reports its end must not change how it ends.

    Args:
        line: printed on standard error when the first signal comes; the end may take a while.
        signals: those that are noted.
        several: whether the run has several processes. Then jax's runtime notes SIGTERM, and tells all of them; a
            SIGINT to one of them is passed on to it as that.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(
        self, line: str = RUN_STOPS, signals: Iterable[signal.Signals] = STOPPING, *, several: bool = False
    ) -> None:
        self.signal: signal.Signals | None = None
        self._line = line
        self._on_second = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            return
        if several:
            signal.signal(signal.SIGINT, self._pass_on)
        else:
            for number in signals:
                signal.signal(number, self._note)

    def check(self) -> None:
        """End what waits if a signal has come.

        An exception from a handler may come where Python drops it, such as in jax's callback of the garbage collector.

        Raises:
            KeyboardInterrupt: if one has.
        """
        if self.signal is not None:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_first = self.signal is None
        # SIGTERM counts even after SIGINT: Python reports those that arrive together in the order of their numbers.
        if number != signal.SIGINT:
            self.signal = signal.Signals(number)
            signal.signal(signal.SIGINT, self._note)
        elif self.signal is None:
            self.signal = signal.SIGINT
            signal.signal(signal.SIGINT, self._on_second)
        if is_first:
            self._say()

    def _say(self) -> None:
        # Not by print, which fails where the signal comes while something is printed. In a terminal the line takes the
        # place of the progress bar, which is drawn again below it.
        start = "\r\x1b[2K" if os.isatty(2) else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{start}{self._line}\n".encode())

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._note(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)


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
            "resume the run to continue from its last checkpoint; what each thread was doing:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(FAILURE)
