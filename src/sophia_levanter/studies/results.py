"""The results of a study, arm by arm, and the paper's speed-up.

The speed-up compares whole schedules. It is s if an arm with a schedule of T / s tokens reaches the loss that the
baseline has at the end of its own schedule of T tokens (arXiv 2305.14342, section 3.2). The loss after T / s tokens of
a longer schedule is not comparable, because the learning rate is still high at that point.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sophia_levanter.studies.records import Record, config_of, find
from sophia_levanter.studies.runs import Run, Series
from sophia_levanter.studies.sharing import SHARED_STEPS
from sophia_levanter.studies.study import PlannedRun
from sophia_levanter.training.costs import flops_per_step, refreshes_per_step

RESAMPLES = 2000


@dataclass(frozen=True)
class Cell:
    """One point of an arm's grid at one schedule length.

    Attributes:
        arm: the arm's name.
        point: the grid's fields with their values.
        tokens: the schedule's length in training tokens.
        records: the records, keyed by seed.
    """

    arm: str
    point: dict[str, Any]
    tokens: int
    records: dict[int, Record] = field(default_factory=dict)

    def losses(self, seeds: Sequence[int] | None = None) -> list[float]:
        """Final validation losses for all seeds, or for `seeds`, which may repeat; infinite for a diverged run."""
        chosen = list(self.records) if seeds is None else seeds
        return [math.inf if (loss := self.records[s].loss) is None else loss for s in chosen]

    @property
    def mean(self) -> float:
        """The mean validation loss over seeds, in nats per token."""
        return statistics.fmean(self.losses())

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None if there are fewer than two seeds or a run diverged."""
        losses = self.losses()
        return statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else None

    @property
    def diverged(self) -> int:
        """The number of runs that diverged."""
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
    """An arm's point with the lowest mean loss for a schedule length, among the points with the most seeds."""
    candidates = [cell for cell in cells if cell.arm == arm and cell.tokens == tokens]
    if not candidates:
        return None
    seeds = max(len(cell.records) for cell in candidates)
    return min((cell for cell in candidates if len(cell.records) == seeds), key=lambda cell: cell.mean)


def lengths(cells: Sequence[Cell], arm: str) -> list[int]:
    """The schedule lengths for which an arm has results, shortest first."""
    return sorted({cell.tokens for cell in cells if cell.arm == arm})


def finished(cells: Sequence[Cell], arm: str) -> Record | None:
    """The record of a finished run at an arm's best point, for the longest schedule with such a run."""
    for tokens in reversed(lengths(cells, arm)):
        cell = best(cells, arm, tokens)
        for record in () if cell is None else cell.records.values():
            if record.loss is not None:
                return record
    return None


def as_run(record: Record, name: str) -> Run:
    """Convert a record to a run with its curves and costs, for plots."""
    config, seconds = config_of(record), seconds_per_step(record)
    curves = {"validation/loss": record.validation, "optim/win_rate": record.win_rate}
    series = {key: _series(curve) for key, curve in curves.items() if curve}
    if seconds:
        # Use one rate for all steps, because the record has only the median times of steps.
        series["train/tokens_per_second"] = _series(
            [[config.trainer.num_train_steps, tokens_per_step(record) / seconds]]
        )
    return Run(name, Path(), config, series, record.facts, "", record.parameters, record.flops_per_token, 0.0)


def _series(curve: Sequence[Sequence[float | None]]) -> Series:
    steps, values = zip(*curve, strict=True)
    return Series(np.array(steps, np.int64), np.array(values, np.float64))


def flops_per_token(record: Record) -> float:
    """FLOPs per token for a whole step, including the curvature and work on matrices."""
    return flops_per_step(config_of(record), record.flops_per_token) / tokens_per_step(record)


def seconds_per_step(record: Record) -> float:
    """Median seconds per step on the run's machine, with the refreshes averaged over all steps."""
    plain, refresh = record.seconds
    if refresh is None or plain is None:
        return plain or refresh or 0.0
    return plain + (refresh - plain) * refreshes_per_step(config_of(record))


def tokens_per_step(record: Record) -> int:
    """The number of training tokens in a step."""
    return record.config["trainer.batch_size"] * record.config["model.seq_len"]


def shared_steps(record: Record) -> int:
    """The number of steps that the run took over from a shorter run."""
    return record.facts.get(SHARED_STEPS, 0)


def steps_trained(record: Record) -> int:
    """The number of steps that the run itself trained, until it ended or was stopped."""
    last = int(record.training[-1][0] or 0) if record.training else 0
    return max(0, last - shared_steps(record))


@dataclass(frozen=True)
class SpeedUp:
    """The factor s at one length of the baseline's schedule.

    Attributes:
        tokens: the length T of the baseline's schedule.
        factor: s; the arm is faster if it is above 1.
        bound: "" if `factor` is exact. If `factor` is only a bound, ">" if the arm's shortest schedule already reaches
            the loss, or "<" if its longest does not.
        low, high: 95 % bootstrap interval over seeds; None if there are fewer than two common seeds.
        seeds: the number of common seeds.
    """

    tokens: int
    factor: float
    bound: str
    low: float | None
    high: float | None
    seeds: int


def speed_ups(cells: Sequence[Cell], arm: str, baseline: str) -> list[SpeedUp]:
    """The speed-up for each of the baseline's schedule lengths, using each arm's best point for each length.

    Lengths for which the baseline diverged are left out, because they give no loss to reach.
    """
    curve, targets = (
        [cell for tokens in lengths(cells, name) if (cell := best(cells, name, tokens)) is not None]
        for name in (arm, baseline)
    )
    return [_speed_up(curve, target) for target in targets if math.isfinite(target.mean)] if curve else []


def _speed_up(curve: Sequence[Cell], target: Cell) -> SpeedUp:
    seeds = sorted(set(target.records).intersection(*(cell.records for cell in curve)))
    factor, bound = _factor(curve, target, None)
    low = high = None
    if len(seeds) > 1:
        # Resample seeds, not runs: for each seed, arms share data and initial weights, so pairing cancels that noise.
        draws = np.random.default_rng(0).choice(seeds, (RESAMPLES, len(seeds)))
        factors = [_factor(curve, target, [int(s) for s in draw])[0] for draw in draws]
        low, high = (float(q) for q in np.quantile(factors, (0.025, 0.975)))
    return SpeedUp(target.tokens, factor, bound, low, high, len(seeds))


def _factor(curve: Sequence[Cell], target: Cell, seeds: Sequence[int] | None) -> tuple[float, str]:
    wanted = statistics.fmean(target.losses(seeds))
    losses = [statistics.fmean(cell.losses(seeds)) for cell in curve]
    tokens, bound = reach(wanted, [cell.tokens for cell in curve], losses)
    return target.tokens / tokens, bound


def reach(wanted: float, tokens: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    """The schedule length that reaches a loss, interpolated linearly in the logarithm of the length.

    Args:
        wanted: the loss to reach.
        tokens: the measured lengths, ascending.
        losses: the loss at the end of each schedule.

    Returns:
        The length, and "" if it is exact, ">" if the shortest schedule already reaches the loss (so the true length is
        shorter), or "<" if the longest schedule does not reach it.
    """
    if losses[0] <= wanted:
        return tokens[0], "" if losses[0] == wanted else ">"
    for (t0, l0), (t1, l1) in zip(
        zip(tokens, losses, strict=True), list(zip(tokens, losses, strict=True))[1:], strict=False
    ):
        if l1 <= wanted:
            share = (l0 - wanted) / (l0 - l1) if math.isfinite(l0) else 1.0
            return math.exp(math.log(t0) + share * (math.log(t1) - math.log(t0))), ""
    return tokens[-1], "<"
