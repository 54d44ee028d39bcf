"""A trace of some training steps, for TensorBoard or Perfetto."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import jax


class Profiler:
    """Traces host and devices from the first of its steps to its last.

    Args:
        steps: the steps to trace; none of them if empty.
        directory: where the trace is written, as `plugins/profile/TIME/HOST.xplane.pb`.
    """

    def __init__(self, steps: range, directory: Path) -> None:
        self._steps, self._directory = steps, directory
        self._running = False

    def starts_at(self, step: int) -> bool:
        """Whether the trace begins with this step: its first one, or the one that a resumed run begins with."""
        return step in self._steps and not self._running

    def ends_after(self, step: int) -> bool:
        """Whether this step is the last one traced."""
        return self._running and step + 1 == self._steps.stop

    def start(self) -> None:
        """Begin the trace; steps before it should have ended."""
        jax.profiler.start_trace(self._directory)
        self._running = True

    def stop(self) -> Path | None:
        """Write the trace. Its directory, or None if there is none: it is not running."""
        if not self._running:
            return None
        self._running = False
        jax.profiler.stop_trace()
        return self._directory

    @staticmethod
    def annotated(step: int) -> AbstractContextManager[object]:
        """Names what runs inside as that training step in a trace."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)
