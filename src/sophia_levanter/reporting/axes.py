"""What a curve is drawn against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from sophia_levanter.reporting.runs import Run

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
COUNTS = ((1.0, ""), (1e3, "thousands"), (1e6, "millions"), (1e9, "billions"), (1e12, "trillions"))
FLOPS = ((1.0, ""), (1e9, "10⁹"), (1e12, "10¹²"), (1e15, "10¹⁵"), (1e18, "10¹⁸"), (1e21, "10²¹"), (1e24, "10²⁴"))
TIMES = ((1.0, "seconds"), (MINUTE, "minutes"), (HOUR, "hours"), (DAY, "days"))
LEAST = 2.0  # of a unit, for it to be used


@dataclass(frozen=True)
class Axis:
    """A horizontal axis.

    Attributes:
        key: in names of files and in the page.
        title: of its button.
        label: beside the axis.
        units: sizes with their names, ascending.
        positions: of a run after so many steps [point]; None if it is not known for the run.
    """

    key: str
    title: str
    label: str
    units: tuple[tuple[float, str], ...]
    positions: Callable[[Run, np.ndarray], np.ndarray | None]

    def unit(self, runs: Iterable[Run]) -> tuple[float, str]:
        """The size of the unit that suits the runs, and the axis's label with its name."""
        ends = [self.positions(run, np.array([run.steps_done])) for run in runs]
        longest = max((float(end[0]) for end in ends if end is not None), default=0.0)
        size, name = [unit for unit in self.units if unit[0] * LEAST <= longest or unit == self.units[0]][-1]
        return size, f"{self.label} ({name})" if name else self.label


STEPS = Axis("steps", "Steps", "steps", ((1.0, ""),), lambda run, steps: steps)
AXES = (
    STEPS,
    Axis("tokens", "Tokens", "training tokens", COUNTS, Run.tokens_at),
    Axis("flops", "FLOPs", "FLOPs, curvature counted", FLOPS, Run.flops_at),
    Axis("time", "Time", "training time", TIMES, Run.seconds_at),
)
