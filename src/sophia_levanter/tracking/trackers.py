"""What takes the numbers of a run: metrics.jsonl, and optional trackers that cannot stop it."""

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

# Records that wait for a tracker that is slow, such as one that looks for its server.
LONGEST_QUEUE = 10_000
CLOSE_SECONDS = 90.0
# Metrics that the Sophia authors' scripts log under other names.
_SAME = {
    "validation/loss": "val/loss",
    "train/learning_rate": "lr",
    "train/parameter_norm": "param_norm",
    "optim/win_rate": "train/win_rate",
    "optim/curvature_norm": "hessian_norm2",
    "optim/momentum_norm": "momentum_norm",
}


class Trackers:
    """metrics.jsonl, whose failure is the run's, and others, whose failures are not.

    Args:
        lines: metrics.jsonl; None where another process writes it, which then has the other trackers too.
        optional: the rest, which outlive this.

    Attributes:
        last: the last value of each metric; statistics of arrays, which may be thousands, are left out.
    """

    def __init__(self, lines: JsonLines | None, optional: OptionalTrackers) -> None:
        self._lines = lines
        self._optional = optional
        self.last: dict[str, float] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand a step's metrics to all of them."""
        self.last |= {name: value for name, value in metrics.items() if not name.startswith(f"{STATISTICS}/")}
        if self._lines is not None:
            self._lines.log(step, metrics)
        self._optional.log(step, metrics)

    def sync(self) -> None:
        """Return when all lines of metrics.jsonl are on the disk."""
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        """End metrics.jsonl."""
        if self._lines is not None:
            self._lines.close()


class OptionalTrackers:
    """The trackers besides metrics.jsonl, from a run's start to its end, whatever checkpoints it goes back to.

    Args:
        trackers: get each step's metrics under the Sophia authors' names as well.
        max_grad_norm: that gradients are clipped to; None for no clipping.
    """

    def __init__(self, trackers: Sequence[Background] = (), *, max_grad_norm: float | None = None) -> None:
        self._trackers = trackers
        self._authors = AuthorsMetrics(max_grad_norm)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand a step's metrics to all of them."""
        both = {**metrics, **self._authors.of(step, metrics)}
        for tracker in self._trackers:
            tracker.log(step, both)

    def close(self, *, failed: bool, seconds: float = CLOSE_SECONDS) -> None:
        """Let each of them end, for so many seconds at most."""
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
    """The trackers besides metrics.jsonl that a configuration asks for.

    Args:
        config: says which.
        directory: of the run.
        run_id: of the run.
        first_step: that will be logged.
        facts: the configuration to show, nested.
        max_grad_norm: that gradients are clipped to; None for no clipping.
        console: says where the numbers are to be seen, and what is wrong with a tracker.
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
    """The text without wandb's key, should a message of wandb's have it."""
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text


class Tracker(Protocol):
    """A place that the numbers of a run's steps go to."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a step's metrics, by their names in metrics.jsonl; a step may come in several parts."""

    def close(self, *, failed: bool) -> None:
        """Return when all that was logged is where it belongs.

        Args:
            failed: whether the run ends with an error.
        """


class AuthorsMetrics:
    """A run's metrics by the authors' names, beside `train/loss`, which is theirs and ours.

    Args:
        max_grad_norm: that gradients are clipped to; None for no clipping.
    """

    def __init__(self, max_grad_norm: float | None) -> None:
        self._max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self._steps = 0
        self._clipped_steps = 0

    def of(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Those that the step's metrics give; `train/clip_rate` is over the steps of this process."""
        named = {"iter": float(step)} | {theirs: metrics[ours] for ours, theirs in _SAME.items() if ours in metrics}
        if "train/mfu" in metrics:
            named["mfu"] = 100 * metrics["train/mfu"]
        if "train/grad_norm" in metrics:
            self._steps += 1
            self._clipped_steps += metrics["train/grad_norm"] > self._max_grad_norm
            named["train/clip_rate"] = self._clipped_steps / self._steps
        return named


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
            self._leave_out(f"cannot keep up: {LONGEST_QUEUE:,} records are waiting")

    def close(self, *, failed: bool, seconds: float = CLOSE_SECONDS) -> None:
        """Let the tracker end, for so many seconds at most."""
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
