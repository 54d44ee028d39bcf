"""A trace of some training steps, for TensorBoard or Perfetto."""

from __future__ import annotations

from pathlib import Path

import jax

from sophia_levanter.tracking.console import Console
from sophia_levanter.training.callbacks import Callback, Pause


class Profiling(Callback):
    """Traces host and devices from the first of some steps to the last.

    Args:
        steps: the steps to trace; none of them if empty.
        directory: where the trace is written, as `plugins/profile/TIME/HOST.xplane.pb`.
        console: says where it is.
    """

    def __init__(self, steps: range, directory: Path, console: Console) -> None:
        self._steps, self._directory, self._console = steps, directory, console
        self._running = False

    def is_due(self, done: int) -> bool:
        """Steps before the first one traced should have ended, and so should the last one."""
        return done == self._steps.stop if self._running else done in self._steps

    def before_step(self, step: int) -> None:
        """Begins the trace at its first step, or at the one that a resumed run begins with."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def on_pause(self, pause: Pause) -> None:
        self.on_end()

    def on_end(self) -> None:
        """Write the trace if one is running, also when the run ends inside the traced steps."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._console.line(f"profile: tensorboard --logdir {self._directory}")
