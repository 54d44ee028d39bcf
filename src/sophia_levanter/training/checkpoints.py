"""Save a training run's checkpoints, and end the run if a save fails."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Timer
from typing import Any

from sophia_levanter.checkpoint import JSON, Retention, Saver
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.build import encode
from sophia_levanter.errors import one_line
from sophia_levanter.partition.processes import Processes
from sophia_levanter.status import FAILURE
from sophia_levanter.training.step import TrainState

# Seconds to wait for the loop to notice a failed save before killing the process. The loop may never notice: if another
# process has already exited, this process may be waiting for it inside a step.
GRACE = 5.0
DAY = 86_400.0

# Counts the calls to `CheckpointTimer.has_expired`. All processes make the same calls, so their counts agree.
_questions = itertools.count()


def is_of_training(metadata: Mapping[str, Any]) -> bool:
    """Return whether the metadata of a checkpoint was written by `RunCheckpoints` rather than by another program."""
    parts = [metadata.get(name) for name in ("config", "environment", "data", "validation")]
    config = parts[0] if isinstance(parts[0], dict) else {"": None}
    sections = [part for name, part in config.items() if name != "plugins"]
    return all(isinstance(part, dict) for part in (*parts, *sections)) and "tokenizer" in metadata["validation"]


class CheckpointTimer:
    """Determines when the next checkpoint is due.

    All processes must save at the same step, so the first process decides by its clock, and sends its decision to the
    others at each call. No messages are sent if `minutes` is None.

    Args:
        minutes: maximum time between checkpoints, in minutes; None for no limit.
        processes: the run's processes; they must all make the same calls.
    """

    def __init__(self, minutes: float | None, processes: Processes) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self._processes = processes
        self._started = time.monotonic()

    def restart(self) -> None:
        """Restart the clock."""
        self._started = time.monotonic()

    def has_expired(self) -> bool:
        """Return whether the time has expired on the first process's clock. Call this once per step.

        Raises:
            NoAnswer: if the first process does not answer within a day. `trainer.step_timeout` can end the run earlier.
        """
        if self._seconds is None:
            return False
        number = next(_questions)
        if number >= 3:
            # The first process has read the results of the step after answer `number - 3`. All processes took part in
            # that step, so all of them have read that answer.
            self._processes.forget(f"checkpoint_timer/{number - 3}")
        over = time.monotonic() - self._started >= self._seconds
        return self._processes.broadcast(f"checkpoint_timer/{number}/answer", str(over), DAY) == str(True)


def better_of(best: dict[str, Any] | None, step: int, metric: str, loss: float) -> dict[str, Any] | None:
    """Return the better of `best` and this checkpoint: a dict with its `step`, and its loss under the metric's name."""
    return {"step": step, metric: loss} if math.isfinite(loss) and (best is None or loss < best[metric]) else best


class RunCheckpoints:
    """Saves the state of a run during training, together with the run's configuration, provenance and metrics.

    Args:
        directory: a path, or a `gs://` or `s3://` URL.
        config: the run's configuration.
        provenance: everything besides the configuration that determines the results.
        run_id: the run's identifier.
        processes: the run's processes.
        best: step and loss of the best checkpoint so far, as saved in the checkpoint from which the run resumes.

    Attributes:
        saved_step: the step of the most recently started save, or None.
    """

    def __init__(
        self,
        directory: Path | str,
        config: TrainConfig,
        provenance: Mapping[str, Any],
        *,
        run_id: str,
        processes: Processes,
        best: dict[str, Any] | None = None,
        saved_step: int | None = None,
    ) -> None:
        self.saved_step = saved_step
        self._trainer = config.trainer
        self._metadata: dict[str, JSON] = {**provenance, "config": encode(config)}
        self._best = best
        on_failure = _end_soon if processes.count > 1 else None
        self._saver = Saver(directory, run_id=run_id, processes=processes, on_failure=on_failure)

    def save(
        self,
        step: int,
        state: TrainState,
        numbers: Mapping[str, float],
        *,
        evaluated: bool,
        facts: Mapping[str, JSON],
    ) -> None:
        """Start saving a state. Its buffers may be donated once this method returns.

        Args:
            step: number of completed steps.
            state: the state after those steps.
            numbers: the latest metrics, keyed by name.
            evaluated: whether the validation loss in `numbers` was measured on this state.
            facts: further metadata to save.

        Raises:
            CheckpointError: if the previous save failed.
        """
        if evaluated:
            metric = self._trainer.best_metric
            self._best = better_of(self._best, step, metric, numbers.get(metric, math.nan))
        finite: dict[str, JSON] = {name: value for name, value in numbers.items() if math.isfinite(value)}
        if not evaluated:
            stale = ("validation/", *(f"{name}/" for name in self._trainer.callbacks))
            finite = {name: value for name, value in finite.items() if not name.startswith(stale)}
        retention = Retention(
            self._trainer.keep_checkpoints,
            every=self._trainer.keep_every,
            best=self._best["step"] if self._best and self._trainer.keep_best else None,
        )
        metadata: dict[str, JSON] = {**self._metadata, **facts, "metrics": finite, "best": self._best}
        self._saver.save(step, state, metadata=metadata, retention=retention)
        self.saved_step = step

    def check(self) -> None:
        """Raise `CheckpointError` if the last save failed. Call this at every step."""
        self._saver.check()

    def wait(self) -> str | None:
        """Wait until the last checkpoint is committed, and return its path or URL.

        Raises:
            CheckpointError: if it could not be committed.
        """
        self._saver.wait()
        return self._saver.saved


def _end_soon(error: Exception) -> None:
    def end() -> None:
        print(one_line(f"error: {error}"), file=sys.stderr, flush=True)
        os._exit(FAILURE)

    timer = Timer(GRACE, end)
    timer.daemon = True
    timer.start()
