"""The line that a run prints of a step: written for people, and read by what watches a run from outside."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_STEP = re.compile(r"step (\d+)/(\d+)  loss (\S+)(?:  smoothed \S+)?  ([\d,]+) tokens/s  ")
_RESUMED = re.compile(r"resuming after step (\d+) of ")

SMOOTHING = 0.95


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: that are done.
        total: that the run has; None where the line does not say.
        loss: of the last one, nats per token.
        tokens_per_second: of all devices.
    """

    step: int
    total: int | None = None
    loss: float | None = None
    tokens_per_second: int | None = None

    def __str__(self) -> str:
        if self.loss is None:
            return f"step {self.step}"
        return f"step {self.step}/{self.total}, loss {self.loss:.3f}, {self.tokens_per_second:,} tokens/s"


class StepNumbers:
    """The numbers of a run's last step as they are shown, with those that need the steps before it.

    Those are the smoothed loss, an exponential mean of this process's finite losses without a bias towards its start,
    and the win rate, which is that of the last refresh.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0
        self._shown: dict[str, str] = {}

    def update(self, metrics: Mapping[str, float]) -> None:
        """Take a step's metrics, by their names in metrics.jsonl."""
        loss = metrics["train/loss"]
        if math.isfinite(loss):
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self._shown |= {
            "loss": f"loss {loss:.3f}",
            "smoothed": f"smoothed {self.smoothed_loss:.3f}",
            "rate": f"{metrics['train/tokens_per_second']:,.0f} tokens/s",
            "mfu": f"MFU {metrics['train/mfu']:.1%}",
        }
        if "optim/win_rate" in metrics:
            self._shown["win rate"] = f"win rate {metrics['optim/win_rate']:.1%}"

    @property
    def smoothed_loss(self) -> float:
        """Nats per token; not a number before the first finite loss."""
        return self._sum / self._weight if self._weight else math.nan

    def __str__(self) -> str:
        return "  ".join(self._shown.values())

    def within(self, width: int) -> str:
        """As many of them as fit in a line of so many columns, the loss before all others."""
        kept = dict(self._shown)
        for name in ("mfu", "win rate", "rate", "smoothed"):
            if len("  ".join(kept.values())) > width:
                kept.pop(name, None)
        return "  ".join(kept.values())


def show_step(done: int, total: int, numbers: StepNumbers) -> str:
    """The line of a step, but for the time that is left."""
    return f"step {done}/{total}  {numbers}"


def read_progress(line: str) -> Progress | None:
    """How far the run is that printed a line; None if the line does not tell."""
    if match := _STEP.match(line):
        return Progress(int(match[1]), int(match[2]), float(match[3]), int(match[4].replace(",", "")))
    if match := _RESUMED.match(line):
        return Progress(int(match[1]))
    return None
