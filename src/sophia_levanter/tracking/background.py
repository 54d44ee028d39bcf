"""A tracker that a run can do without."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

from sophia_levanter.tracking.tracker import Tracker

# Records that wait for a tracker that is slow, such as one that looks for its server.
LONGEST_QUEUE = 10_000
CLOSE_SECONDS = 90.0


class Background:
    """A tracker in a thread of its own, which a run neither waits for nor fails with.

    Whatever goes wrong with it, at its start, in a step or at the end, gives one warning, and the tracker is left out
    from then on.

    Args:
        name: of the tracker, for messages.
        start: makes it; called in the thread.
        warn: is told what went wrong.
    """

    def __init__(self, name: str, start: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name = name
        self._start = start
        self._warn = warn
        # A step and its metrics; at the end, whether the run failed.
        self._queue: queue.Queue[tuple[int, Mapping[str, float]] | bool] = queue.Queue(LONGEST_QUEUE)
        self._left_out = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over a step's metrics; never waits."""
        if self._left_out.is_set():
            return
        try:
            self._queue.put_nowait((step, metrics))
        except queue.Full:
            self._leave_out(f"does not keep up: {LONGEST_QUEUE:,} records wait for it")

    def close(self, *, failed: bool, seconds: float = CLOSE_SECONDS) -> None:
        """Let the tracker end, for so many seconds at most."""
        if self._left_out.is_set():
            return
        try:
            self._queue.put_nowait(failed)
        except queue.Full:
            self._leave_out(f"does not keep up: {LONGEST_QUEUE:,} records wait for it")
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._leave_out(f"has not ended within {seconds:.0f} s")

    def _work(self) -> None:
        try:
            tracker = self._start()
            while not isinstance(item := self._queue.get(), bool):
                if self._left_out.is_set():
                    return
                tracker.log(*item)
            tracker.close(failed=item)
        except Exception as error:
            self._leave_out(" ".join(str(error).split()).rstrip(".") or type(error).__name__)

    def _leave_out(self, reason: str) -> None:
        if not self._left_out.is_set():
            self._left_out.set()
            self._warn(f"WARNING: {self._name}: {reason}; the run goes on without it")
