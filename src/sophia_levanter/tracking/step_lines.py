"""The line that a run prints of a step: written for people, and read by what watches a run from outside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_STEP = re.compile(r"step (\d+)/(\d+)  loss (\S+)  ([\d,]+) tokens/s  ")
_RESUMED = re.compile(r"resuming after step (\d+) of ")


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


def show_numbers(metrics: Mapping[str, float]) -> str:
    """A step's numbers, from its metrics by their names in metrics.jsonl."""
    return (
        f"loss {metrics['train/loss']:.3f}  {metrics['train/tokens_per_second']:,.0f} tokens/s  "
        f"MFU {metrics['train/mfu']:.1%}"
    )


def show_step(done: int, total: int, numbers: str) -> str:
    """The line of a step, but for the time that is left."""
    return f"step {done}/{total}  {numbers}"


def read_progress(line: str) -> Progress | None:
    """How far the run is that printed a line; None if the line does not tell."""
    if match := _STEP.match(line):
        return Progress(int(match[1]), int(match[2]), float(match[3]), int(match[4].replace(",", "")))
    if match := _RESUMED.match(line):
        return Progress(int(match[1]))
    return None
