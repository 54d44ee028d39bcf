"""Write metrics to TensorBoard event files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

FLUSH_SECONDS = 5.0


class TensorBoard:
    """Writes scalars to a new event file. TensorBoard combines it with the other files in the directory.

    tensorboardX's SummaryWriter is not used, because its thread and queue would report a full disk too late.

    Args:
        directory: the directory for the event files.
        first_step: the first step to log. TensorBoard discards this step and later steps from older files.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        directory.mkdir(exist_ok=True)
        # The timestamps in tensorboardX's file names are in whole seconds, but a run may restart within a second.
        self._events = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
        self._flushed = time.monotonic()
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._write(Event(step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self, *, failed: bool) -> None:
        self._events.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
