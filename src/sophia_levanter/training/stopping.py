"""How a run is asked to stop: by SIGINT or SIGTERM to one of its processes."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Notes SIGINT or SIGTERM so that the loop can save and end; a SIGINT after that acts as it would without.

    Args:
        several: whether the run has several processes. Then jax's runtime notes SIGTERM, and tells all of them; a
            SIGINT to one of them is passed on to it as that.

    Attributes:
        signal: the signal that came, or None.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, several: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._several = several
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if self._several:
            self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._pass_on)}
        else:
            self._before = {s: signal.signal(s, self._note) for s in self._SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        # Further SIGTERMs, which some schedulers send to a group and to its processes, do not stop the saving.
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._note(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
        self._before = {}
