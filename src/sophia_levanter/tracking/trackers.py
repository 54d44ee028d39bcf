"""All that takes the numbers of a run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sophia_levanter.config.tracking import TrackingConfig
from sophia_levanter.tracking.authors import AuthorsMetrics
from sophia_levanter.tracking.background import CLOSE_SECONDS, Background
from sophia_levanter.tracking.console import Console
from sophia_levanter.tracking.jsonl import JsonLines
from sophia_levanter.tracking.tracker import Tracker


class Trackers:
    """metrics.jsonl, whose failure is the run's, and others, whose failures are not.

    Args:
        lines: metrics.jsonl; None where another process writes it, which then has the other trackers too.
        optional: the rest, which outlive this.

    Attributes:
        last: the last value of each metric.
    """

    def __init__(self, lines: JsonLines | None, optional: OptionalTrackers) -> None:
        self._lines = lines
        self._optional = optional
        self.last: dict[str, float] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand a step's metrics to all of them."""
        self.last |= metrics
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
