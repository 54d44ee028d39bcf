"""The paper's speed-up: how much shorter a whole schedule reaches the loss that the baseline's whole schedule reaches.

Sophia with T / s tokens, and a schedule made for T / s tokens, has the loss that the baseline has at the end of its own
schedule of T tokens (arXiv 2305.14342, section 3.2). A curve at T / s of a longer schedule would be another thing: its
learning rate is still high there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sophia_levanter.comparison.results import Cell, best, lengths

RESAMPLES = 2000


@dataclass(frozen=True)
class SpeedUp:
    """The factor s at one length of the baseline's schedule.

    Attributes:
        tokens: the baseline's length T.
        factor: s; above 1 the arm is faster.
        bound: "" for a value; ">" or "<" where the arm reaches the loss in less than its shortest schedule, or not in
            its longest, and `factor` is only a bound.
        low, high: 95 % interval over seeds, by bootstrap; None with fewer than two seeds in common.
        seeds: how many seeds both have.
    """

    tokens: int
    factor: float
    bound: str
    low: float | None
    high: float | None
    seeds: int


def speed_ups(cells: Sequence[Cell], arm: str, baseline: str) -> list[SpeedUp]:
    """The speed-up at each of the baseline's lengths. Every length has its own best point, for both arms.

    A length at which the baseline diverged is left out: it sets no loss to reach.
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
        # Seeds are resampled in pairs: one seed is the same data and initial weights for all optimizers.
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
    """The length of schedule that reaches a loss, linear in the logarithm of the length between those measured.

    Args:
        wanted: the loss to reach.
        tokens: the lengths measured, ascending.
        losses: the loss at the end of each.

    Returns:
        The length, and "" for a value; ">" where the shortest reaches it already, so that the speed-up is above what
        this length gives, and "<" where the longest does not.
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
