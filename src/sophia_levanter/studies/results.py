"""The results of a study for each arm, and the speed-up as defined in the Sophia paper.

The speed-up compares complete schedules. It is s if an arm with a schedule of T / s tokens reaches the loss that the
baseline reaches at the end of its own schedule of T tokens (arXiv 2305.14342, section 3.2). The loss after T / s tokens
of a longer schedule is not comparable, because the learning rate is still high at that point.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    """The results for one point in the grid of an arm at one schedule length.

    Attributes:
        arm: the name of the arm.
        point: the value of each field in the grid.
        tokens: the length of the schedule in training tokens.
        records: the records of the runs, keyed by seed.
        tuning_seed: the seed with which coordinate descent selected the best point; None if the grid was trained.
    """

    arm: str
    point: dict[str, Any]
    tokens: int
    records: dict[int, Record] = field(default_factory=dict)
    tuning_seed: int | None = None

    @property
    def seeds(self) -> list[int]:
        """The seeds whose losses count: those that did not select the point, if there are any."""
        return [seed for seed in self.records if seed != self.tuning_seed] or list(self.records)

    def losses(self, seeds: Sequence[int] | None = None) -> list[float]:
        """Return final validation losses (inf for diverged runs) of `seeds` (may repeat) or of the seeds that count."""
        chosen = self.seeds if seeds is None else seeds
        return [math.inf if (loss := self.records[s].loss) is None else loss for s in chosen]

    @property
    def tuning_loss(self) -> float:
        """The loss by which the arm's best point is selected."""
        return self.mean if self.tuning_seed is None else self.losses([self.tuning_seed])[0]

    @property
    def mean(self) -> float:
        """The mean validation loss over seeds, in nats per token."""
        return statistics.fmean(self.losses())

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds, or None if there are fewer than two seeds or a run diverged."""
        losses = self.losses()
        return statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else None

    @property
    def diverged(self) -> int:
        """The number of runs that diverged."""
        return sum(record.loss is None for record in self.records.values())


def collect(runs: Sequence[PlannedRun], records: Sequence[Record]) -> list[Cell]:
    """Return the cells with at least one record, in the order of the study."""
    cells: dict[tuple, Cell] = {}
    tuning_seeds = {(run.arm, run.tokens): run.seed for run in runs if run.tuning}
    for run in runs:
        record = find(records, run.config)
        if record is not None:
            key = (run.arm, repr(run.point), run.tokens)
            tuning_seed = tuning_seeds.get((run.arm, run.tokens))
            cells.setdefault(key, Cell(run.arm, run.point, run.tokens, {}, tuning_seed)).records[run.seed] = record
    return list(cells.values())


def best(cells: Sequence[Cell], arm: str, tokens: int) -> Cell | None:
    """Return the cell with the lowest mean loss for an arm and a length, among the cells with the most seeds."""
    candidates = [cell for cell in cells if cell.arm == arm and cell.tokens == tokens]
    if not candidates:
        return None
    seeds = max(len(cell.records) for cell in candidates)
    return min((cell for cell in candidates if len(cell.records) == seeds), key=lambda cell: cell.mean)


def lengths(cells: Sequence[Cell], arm: str) -> list[int]:
    """Return the schedule lengths for which an arm has results, in ascending order."""
    return sorted({cell.tokens for cell in cells if cell.arm == arm})


def finished(cells: Sequence[Cell], arm: str) -> Record | None:
    """Return the record of a finished run at an arm's best point, or None. Longer schedules take precedence."""
    for tokens in reversed(lengths(cells, arm)):
        cell = best(cells, arm, tokens)
        for record in () if cell is None else (cell.records[seed] for seed in cell.seeds):
            if record.loss is not None:
                return record
    return None


def as_run(record: Record, name: str) -> Run:
    """Convert a record to a `Run`, so that its curves and costs can be plotted."""
    config, seconds = config_of(record), seconds_per_step(record)
    curves = {"validation/loss": record.validation, "optim/win_rate": record.win_rate}
    series = {key: _series(curve) for key, curve in curves.items() if curve}
    if seconds:
        # Use the same rate for all steps, because the record contains only the median durations of steps.
        series["train/tokens_per_second"] = _series(
            [[config.trainer.num_train_steps, tokens_per_step(record) / seconds]]
        )
    return Run(name, Path(), config, series, record.facts, "", record.parameters, record.flops_per_token, 0.0)


def _series(curve: Sequence[Sequence[float | None]]) -> Series:
    steps, values = zip(*curve, strict=True)
    return Series(np.array(steps, np.int64), np.array(values, np.float64))


def flops_per_token(record: Record) -> float:
    """Return the FLOPs per token of a complete step, including the curvature and whole-matrix operations."""
    return flops_per_step(config_of(record), record.flops_per_token) / tokens_per_step(record)


def seconds_per_step(record: Record) -> float:
    """Return the median seconds per step on the run's machine, with refreshes averaged over all steps."""
    plain, refresh = record.seconds
    if refresh is None or plain is None:
        return plain or refresh or 0.0
    return plain + (refresh - plain) * refreshes_per_step(config_of(record))


def tokens_per_step(record: Record) -> int:
    """Return the number of training tokens in a step."""
    return record.config["trainer.batch_size"] * record.config["model.seq_len"]


def shared_steps(record: Record) -> int:
    """Return the number of steps that the run reused from a shorter run."""
    return record.facts.get(SHARED_STEPS, 0)


def steps_trained(record: Record) -> int:
    """Return the number of steps that the run itself trained before it ended or was stopped."""
    last = int(record.training[-1][0] or 0) if record.training else 0
    return max(0, last - shared_steps(record))


@dataclass(frozen=True)
class SpeedUp:
    """The speed-up s for one schedule length of the baseline.

    Attributes:
        tokens: the length T of the baseline's schedule, in training tokens.
        factor: the speed-up s. The arm is faster than the baseline if s is above 1.
        bound: "" if `factor` is exact; ">" if `factor` is a lower bound, because even the arm's shortest schedule
            reaches the loss; "<" if `factor` is an upper bound, because even its longest schedule does not.
        low, high: 95% interval over seeds and tuning; None if there are fewer than two common seeds.
        seeds: the number of common seeds.
        low_bound, high_bound: like `bound`, for `low` and `high`.
    """

    tokens: int
    factor: float
    bound: str
    low: float | None
    high: float | None
    seeds: int
    low_bound: str = ""
    high_bound: str = ""


def speed_ups(cells: Sequence[Cell], arm: str, baseline: str) -> list[SpeedUp]:
    """Compute the speed-up for each schedule length of the baseline, using the best point of each arm at each length.

    Lengths at which the baseline diverged are excluded, because they provide no target loss.
    """
    curve, targets = ([_tuned(cells, name, tokens) for tokens in lengths(cells, name)] for name in (arm, baseline))
    return [_speed_up(curve, target) for target in targets if math.isfinite(target.cell.mean)] if curve else []


@dataclass(frozen=True)
class _Tuned:
    """The best cell of an arm at one length, and the losses by which it was selected from all points tried."""

    cell: Cell
    tried: list[float]


def _tuned(cells: Sequence[Cell], arm: str, tokens: int) -> _Tuned:
    cell = best(cells, arm, tokens)
    assert cell is not None
    return _Tuned(cell, [c.tuning_loss for c in cells if c.arm == arm and c.tokens == tokens])


def _speed_up(curve: Sequence[_Tuned], target: _Tuned) -> SpeedUp:
    tokens = [tuned.cell.tokens for tuned in curve]
    seeds = sorted(set(target.cell.seeds).intersection(*(tuned.cell.seeds for tuned in curve)))
    # With common seeds, compare on these alone; they share data and initial weights.
    losses = [tuned.cell.losses(seeds or None) for tuned in (target, *curve)]
    wanted, *means = map(statistics.fmean, losses)
    reached, bound = reach(wanted, tokens, means)
    speed_up = SpeedUp(target.cell.tokens, target.cell.tokens / reached, bound, None, None, len(seeds))
    if len(seeds) > 1:
        random = np.random.default_rng(0)
        drawn = draw_means(np.array(losses), random)
        drawn += np.stack([draw_luck(tuned.tried, random) for tuned in (target, *curve)])
        (low, low_bound), (high, high_bound) = speed_up_interval(drawn[0], drawn[1:], tokens, target.cell.tokens)
        speed_up = replace(speed_up, low=low, high=high, low_bound=low_bound, high_bound=high_bound)
    return speed_up


def draw_means(losses: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw mean losses of several arms, given the losses of a few seeds.

    The draws have a multivariate t distribution around the measured means. With the same seed, arms share data and
    initial weights; what a seed does to all of them alike cancels in differences. A bootstrap over seeds would be far
    too narrow: with three seeds, it ends at the smallest and the largest loss.

    Args:
        losses: the losses [arms, seeds] in nats; inf if a run diverged.
        random: the source of randomness.

    Returns:
        Means [arms, RESAMPLES]. If some of an arm's runs diverged, so do as many of its draws as would in a bootstrap.
    """
    num_seeds = losses.shape[1]
    finite = np.isfinite(losses)
    known = np.where(finite, losses, 0.0)
    means = known.sum(axis=1, keepdims=True) / np.maximum(finite.sum(axis=1, keepdims=True), 1)
    deviations = np.where(finite, known - means, 0.0) @ random.standard_normal((num_seeds, RESAMPLES))
    draws = means + deviations / np.sqrt(num_seeds * random.chisquare(num_seeds - 1, RESAMPLES))
    seeds = random.integers(num_seeds, size=(RESAMPLES, num_seeds))
    return np.where(finite[:, seeds].all(axis=2), draws, math.inf)


def draw_luck(tried: Sequence[float], random: np.random.Generator) -> np.ndarray:
    """Draw by how much the best points of two searches differ, from the losses of the points that were tried.

    Each search draws as many points at random as were tried. Points that diverged are excluded.

    Returns:
        Differences [RESAMPLES] in nats, distributed symmetrically around 0.
    """
    points = [loss for loss in tried if math.isfinite(loss)]
    if not points:
        return np.zeros(RESAMPLES)
    first, second = random.choice(points, (2, RESAMPLES, len(points))).min(axis=2)
    return first - second


def speed_up_interval(
    wanted: np.ndarray, losses: np.ndarray, tokens: Sequence[int], target_tokens: int
) -> tuple[tuple[float, str], tuple[float, str]]:
    """Return the ends of the central 95% of speed-ups. Each has its bound, as in `SpeedUp`.

    Args:
        wanted: draws [RESAMPLES] of the loss at the end of the baseline's schedule of `target_tokens` tokens.
        losses: draws [lengths, RESAMPLES] of the losses at the end of schedules of `tokens` tokens.
        tokens: the schedule lengths, in ascending order.
        target_tokens: the length of the baseline's schedule.
    """
    found = [reach(loss, tokens, row) for loss, row in zip(wanted, losses.T, strict=True)]
    order = {"<": 0, "": 1, ">": 2}
    factors = sorted((target_tokens / length, order[sign], sign) for length, sign in found)
    low, high = (factors[round(q * (RESAMPLES - 1))] for q in (0.025, 0.975))
    return (low[0], low[2]), (high[0], high[2])


def reach(wanted: float, tokens: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    """Find the schedule length that reaches a loss, by linear interpolation in the logarithm of the length.

    Args:
        wanted: the loss to reach.
        tokens: the measured schedule lengths, in ascending order.
        losses: the loss at the end of each schedule.

    Returns:
        The length, and "" if it is exact, ">" if even the shortest schedule reaches the loss (so the true length is
        shorter), or "<" if even the longest schedule does not reach it.
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
