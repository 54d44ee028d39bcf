"""What the measurements share: things timed in turns, ratios with their spread, Markdown tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def spread(values: Any) -> Spread:
    """Median and quartiles of some numbers."""
    return Spread(*np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75]).tolist())


def seconds_in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Time things in one process, each once a round, so that a noisy machine slows all alike.

    Args:
        runs: what to time, by name; each has been compiled before and run once here before the clock starts. What it
            returns is waited for.
        rounds: how often each is timed.

    Returns:
        Seconds of each, [round].
    """
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
