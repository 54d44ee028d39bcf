"""What a study's records say, arm by arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sophia_levanter.comparison.records import Record, find
from sophia_levanter.comparison.study import PlannedRun


@dataclass(frozen=True)
class Cell:
    """One point of an arm's grid at one schedule length.

    Attributes:
        arm: the arm's name.
        point: the grid's fields with their values.
        tokens: the schedule's length in training tokens.
        records: what was run, by seed.
    """

    arm: str
    point: dict[str, Any]
    tokens: int
    records: dict[int, Record] = field(default_factory=dict)

    def losses(self, seeds: Sequence[int] | None = None) -> list[float]:
        """Validation losses at the end, of all seeds or of these (as often as they are named); infinite if diverged."""
        chosen = list(self.records) if seeds is None else seeds
        return [math.inf if (loss := self.records[s].loss) is None else loss for s in chosen]

    @property
    def mean(self) -> float:
        """The mean validation loss over seeds, in nats per token."""
        return statistics.fmean(self.losses())

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None for fewer than two, or where one diverged."""
        losses = self.losses()
        return statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else None

    @property
    def diverged(self) -> int:
        """How many of the runs diverged."""
        return sum(record.loss is None for record in self.records.values())


def collect(runs: Sequence[PlannedRun], records: Sequence[Record]) -> list[Cell]:
    """The cells with at least one record, in the study's order."""
    cells: dict[tuple, Cell] = {}
    for run in runs:
        record = find(records, run.config)
        if record is not None:
            key = (run.arm, tuple(run.point.items()), run.tokens)
            cell = cells.setdefault(key, Cell(run.arm, run.point, run.tokens))
            cell.records[run.seed] = record
    return list(cells.values())


def best(cells: Sequence[Cell], arm: str, tokens: int) -> Cell | None:
    """The arm's point with the lowest mean loss at a length, of those with the most seeds."""
    candidates = [cell for cell in cells if cell.arm == arm and cell.tokens == tokens]
    if not candidates:
        return None
    seeds = max(len(cell.records) for cell in candidates)
    return min((cell for cell in candidates if len(cell.records) == seeds), key=lambda cell: cell.mean)


def lengths(cells: Sequence[Cell], arm: str) -> list[int]:
    """The schedule lengths of which an arm has results, shortest first."""
    return sorted({cell.tokens for cell in cells if cell.arm == arm})
