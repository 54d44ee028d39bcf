"""How a run is asked to stop: by SIGINT or SIGTERM to one of its processes."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class StopRequest:
    """Notes SIGINT or SIGTERM so that the loop can save and end. Outside the main thread signals are not its business.

    A second SIGINT acts as it would without this, unless SIGTERM came before it. The handlers stay until the caller of
    the run puts its own back: a signal that comes while the run reports its end must not change how it ends.

    Args:
        several: whether the run has several processes. Then jax's runtime notes SIGTERM, and tells all of them; a
            SIGINT to one of them is passed on to it as that.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self, *, several: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._on_second = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            return
        if several:
            signal.signal(signal.SIGINT, self._pass_on)
        else:
            signal.signal(signal.SIGINT, self._note)
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # SIGTERM counts even after SIGINT: Python reports those that arrive together in the order of their numbers.
        if number == signal.SIGTERM:
            self.signal = signal.SIGTERM
            signal.signal(signal.SIGINT, self._note)
        elif self.signal is None:
            self.signal = signal.SIGINT
            signal.signal(signal.SIGINT, self._on_second)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._note(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)
