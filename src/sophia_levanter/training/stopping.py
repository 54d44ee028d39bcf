"""Stop a run when one of its processes receives SIGINT or SIGTERM, or when it hangs."""

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
RUN_STOPS = "stop requested; the run will save and stop after the current step or compilation and any due evaluation"


class StopRequest:
    """Records signals that ask a run to stop, so that it can save first, and prints a line immediately.

    Signals are handled only in the main thread. After a SIGINT, a second SIGINT is handled as if these handlers were
    not installed. After any other signal, this is the case only if `interruptible` is true. The handlers stay installed
    until the caller restores its own, because a signal that arrives while the run reports its result must not change
    the exit status.

    Args:
        line: the line to print to standard error when the first signal arrives, because stopping may take a while.
        signals: the signals to record.
        several: whether the run has several processes. If so, the JAX runtime records SIGTERM and notifies all of them,
            and a SIGINT to one of them is forwarded as SIGTERM.
        interruptible: whether a SIGINT after another signal interrupts the process; if not, it is ignored.

    Attributes:
        signal: the recorded signal, or None.
    """

    def __init__(
        self,
        line: str = RUN_STOPS,
        signals: Iterable[signal.Signals] = STOPPING,
        *,
        several: bool = False,
        interruptible: bool = False,
    ) -> None:
        self.signal: signal.Signals | None = None
        self._line = line
        self._interruptible = interruptible
        self._on_second = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            return
        if several:
            signal.signal(signal.SIGINT, self._pass_on)
        else:
            for number in signals:
                signal.signal(number, self._note)

    def silence(self) -> None:
        """Stop printing the line, because the work has finished and a signal can no longer interrupt it."""
        self._line = ""

    def check(self) -> None:
        """Raise an exception if a signal has arrived. Call this regularly while waiting.

        The handlers themselves do not raise, because a signal may arrive in code where Python discards exceptions, such
        as JAX's garbage collection callback.

        Raises:
            KeyboardInterrupt: if a signal has arrived.
        """
        if self.signal is not None:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_first = self.signal is None
        # SIGTERM takes precedence over SIGINT, because Python delivers simultaneous signals in numerical order.
        if number != signal.SIGINT:
            self.signal = signal.Signals(number)
            if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                signal.signal(signal.SIGINT, self._on_second if self._interruptible else self._note)
        elif self.signal is None:
            self.signal = signal.SIGINT
            signal.signal(signal.SIGINT, self._on_second)
        if is_first and self._line:
            self._say()

    def _say(self) -> None:
        # Do not use print, which fails if the signal arrives during another print. In a terminal, the line replaces the
        # progress bar, which is redrawn below it.
        start = "\r\x1b[2K" if os.isatty(2) else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{start}{self._line}\n".encode())

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._note(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)


class Watchdog:
    """Ends the process if it makes no progress for some time, and prints the stacks of all threads to standard error.

    If a peer hangs during a collective operation, the operation never returns, and no exception can be raised in it.

    Args:
        seconds: maximum time without progress, in seconds; None for no limit.
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
        """Restart the clock for a new operation. `doing` names it in the error message, for example "step 7"."""
        self._doing = doing
        self._deadline = None if self._seconds is None else time.monotonic() + self._seconds

    def pause(self) -> None:
        """Stop the clock until the next `begin`."""
        self._deadline = None

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._stopped.wait(min(1.0, self._seconds / 4)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._end()

    def _end(self) -> None:
        print(
            f"error: {self._doing} took longer than {self._seconds} s (trainer.step_timeout); "
            "resume the run to continue from its last checkpoint; stack traces of all threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(FAILURE)
