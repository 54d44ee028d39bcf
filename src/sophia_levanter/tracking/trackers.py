"""Trackers for a run's metrics: metrics.jsonl, and optional trackers whose failure does not stop the run."""

from __future__ import annotations

import math
import os
import queue
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sophia_levanter.config.registries import STATISTICS
from sophia_levanter.config.run import TrackingConfig
from sophia_levanter.tracking.console import Console
from sophia_levanter.tracking.jsonl import JsonLines

# The maximum number of records queued for a slow tracker, such as one that is still connecting to its server.
LONGEST_QUEUE = 10_000
CLOSE_SECONDS = 90.0
# Metrics that the scripts of Sophia's authors log under different names.
_SAME = {
    "validation/loss": "val/loss",
    "train/learning_rate": "lr",
    "train/parameter_norm": "param_norm",
    "optim/win_rate": "train/win_rate",
    "optim/curvature_norm": "hessian_norm2",
    "optim/momentum_norm": "momentum_norm",
}


class Trackers:
    """All trackers of a run. A failure to write metrics.jsonl ends the run, but a failing optional tracker does not.

    Args:
        lines: the writer of metrics.jsonl; None except in the first process, which also runs the optional trackers.
        optional: the optional trackers, which may outlive this object.

    Attributes:
        last: the last value of each metric. Array statistics are excluded, because there may be thousands of them.
    """

    def __init__(self, lines: JsonLines | None, optional: OptionalTrackers) -> None:
        self._lines = lines
        self._optional = optional
        self.last: dict[str, float] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step to all trackers."""
        self.last |= {name: value for name, value in metrics.items() if not name.startswith(f"{STATISTICS}/")}
        if self._lines is not None:
            self._lines.log(step, metrics)
        self._optional.log(step, metrics)

    def sync(self) -> None:
        """Block until all lines of metrics.jsonl are on disk."""
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._lines is not None:
            self._lines.close()


class OptionalTrackers:
    """The trackers other than metrics.jsonl. They stay open until the run ends, even if it rolls back to a checkpoint.

    Args:
        trackers: the trackers. They also receive the metrics under the names used by Sophia's authors.
        max_grad_norm: the norm to which gradients are clipped; None if they are not clipped.
    """

    def __init__(self, trackers: Sequence[Background] = (), *, max_grad_norm: float | None = None) -> None:
        self._trackers = trackers
        self._authors = AuthorsMetrics(max_grad_norm)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step to all trackers."""
        both = {**metrics, **self._authors.of(step, metrics)}
        for tracker in self._trackers:
            tracker.log(step, both)

    def close(self, *, failed: bool, seconds: float = CLOSE_SECONDS) -> None:
        """Close all trackers, waiting at most `seconds` for each."""
        for tracker in self._trackers:
            tracker.close(failed=failed, seconds=seconds)


def start_optional(
    config: TrackingConfig,
    directory: Path,
    *,
    run_id: str,
    first_step: int,
    facts: Mapping[str, Any],
    max_grad_norm: float | None,
    console: Console,
) -> OptionalTrackers:
    """Start the configured trackers other than metrics.jsonl.

    Args:
        config: the configuration of the trackers.
        directory: the run directory.
        run_id: the run's id.
        first_step: the first step that will be logged.
        facts: the configuration to show, as a nested mapping.
        max_grad_norm: the norm to which gradients are clipped; None if they are not clipped.
        console: prints where to find the metrics, and any warnings from the trackers.
    """

    def say(text: str) -> None:
        console.line(_without_secrets(text))

    def warn(text: str) -> None:
        console.notice(_without_secrets(text))

    def start_wandb() -> Tracker:
        from sophia_levanter.tracking.wandb import Wandb

        return Wandb(config, directory, run_id, facts, say, warn)

    def start_tensorboard() -> Tracker:
        from sophia_levanter.tracking.tensorboard import TensorBoard

        return TensorBoard(directory / "tensorboard", first_step)

    others = []
    if config.wandb is not None:
        others.append(Background("wandb", start_wandb, warn))
    if config.tensorboard:
        others.append(Background("tensorboard", start_tensorboard, warn))
        say(f"tensorboard: tensorboard --logdir {shlex.quote(str(directory / 'tensorboard'))}")
    return OptionalTrackers(others, max_grad_norm=max_grad_norm)


def _without_secrets(text: str) -> str:
    """Mask wandb's API key, because messages from wandb may contain it."""
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text


class Tracker(Protocol):
    """A destination for a run's metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step, keyed by their names in metrics.jsonl. A step may be logged in several parts."""

    def close(self, *, failed: bool) -> None:
        """Close the tracker once all metrics have reached their destination.

        Args:
            failed: whether the run failed or was stopped.
        """


class AuthorsMetrics:
    """Renames metrics to the names used by Sophia's authors. `train/loss` has the same name in both projects.

    Args:
        max_grad_norm: the norm to which gradients are clipped; None if they are not clipped.
    """

    def __init__(self, max_grad_norm: float | None) -> None:
        self._max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self._steps = 0
        self._clipped_steps = 0

    def of(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of a step under the authors' names. `train/clip_rate` covers the steps in this process."""
        named = {"iter": float(step)} | {theirs: metrics[ours] for ours, theirs in _SAME.items() if ours in metrics}
        if "train/mfu" in metrics:
            named["mfu"] = 100 * metrics["train/mfu"]
        if "train/grad_norm" in metrics:
            self._steps += 1
            self._clipped_steps += metrics["train/grad_norm"] > self._max_grad_norm
            named["train/clip_rate"] = self._clipped_steps / self._steps
        return named


class Background:
    """Runs a tracker in a background thread, so that it can neither delay nor end the run.

    At the first error, whether at the start, in a step or at the end, a warning is printed and the run continues
    without the tracker.

    Args:
        name: the tracker's name, for messages.
        start: creates the tracker; called in the background thread.
        warn: prints a warning.
    """

    def __init__(self, name: str, start: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name = name
        self._start = start
        self._warn = warn
        # Each item is a step with its metrics. The last item is a bool that tells whether the run failed.
        self._queue: queue.Queue[tuple[int, Mapping[str, float]] | bool] = queue.Queue(LONGEST_QUEUE)
        self._left_out = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of a step without waiting."""
        if self._left_out.is_set():
            return
        try:
            self._queue.put_nowait((step, metrics))
        except queue.Full:
            self._leave_out(f"cannot keep up: {LONGEST_QUEUE:,} records are waiting")

    def close(self, *, failed: bool, seconds: float = CLOSE_SECONDS) -> None:
        """Close the tracker, waiting at most `seconds`."""
        if self._left_out.is_set():
            return
        try:
            self._queue.put_nowait(failed)
        except queue.Full:
            self._leave_out(f"cannot keep up: {LONGEST_QUEUE:,} records are waiting")
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._leave_out(f"did not finish within {seconds:.0f} s")

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
            self._warn(f"WARNING: {self._name}: {reason}; the run continues without it")
