"""Prints the speed-ups of evidence.md, with intervals that resample the tuning runs as well as the seeds.

Run it in the repository's root: python docs/evidence/headline.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from sophia_levanter.config import TrainConfig
from sophia_levanter.studies.records import find, read_records
from sophia_levanter.studies.results import (
    Cell,
    best,
    collect,
    draw_luck,
    draw_means,
    flops_per_token,
    lengths,
    reach,
    speed_up_interval,
)
from sophia_levanter.studies.study import plan, read_study

EVIDENCE = Path("docs/evidence")
# For each arm: the runs on seed 0 at 2M tokens around its settings, by study and arm. These are not always the best of
# them: b2 0.95 was 0.005 better for NAdamW, and 1e-3 was 0.018 better for the basis of both sides.
TUNING: dict[str, dict[str, tuple[str, ...]]] = {
    "adamw": {"tuning": ("adamw",)},
    "nadamw": {"tuning": ("nadamw",)},
    "sophia_g": {"tuning": ("sophia_g",), "edges": ("sophia_g",)},
    "sophia_g_kronecker": {"turning": ("rate_and_rho_longer",), "edges": ("width",)},
    "both_sides": {"tuning": ("sophia_g_kronecker",), "edges": ("both_sides_rate", "both_sides_rho")},
    "muon": {"tuning": ("muon",)},
    "soap": {"tuning": ("soap",), "edges": ("soap",)},
}
TUNING |= {f"{arm}_before": TUNING[arm] for arm in ("adamw", "nadamw")}
BASELINES = {"main": ("adamw", "nadamw"), "baselines": ("adamw", "adamw_before", "nadamw_before")}


@cache
def cells_of(study: str) -> list[Cell]:
    """The cells of a study, from its records."""
    records = read_records(EVIDENCE / study / "study.json")

    def loss_of(config: TrainConfig) -> float | None:
        record = find(records, config)
        return None if record is None else math.inf if record.loss is None else record.loss

    return collect(plan(read_study(EVIDENCE / "studies" / f"{study}.yaml"), {}, loss_of), records)


def tried(cells: Sequence[Cell], arm: str) -> list[float]:
    """The losses of an arm's tuning runs."""
    if searched := [cell.tuning_loss for cell in cells if cell.arm == arm and cell.tuning_seed is not None]:
        return searched
    found = {}
    for study, arms in TUNING[arm].items():
        cells = [cell for cell in cells_of(study) if cell.arm in arms and cell.tokens == 2e6]
        found |= {repr(cell.records[0].config): cell.losses([0])[0] for cell in cells}
    return [*found.values()]


def speed_up(cells: Sequence[Cell], arm: str, baseline: str, tokens: int) -> tuple[float, str, list[str]]:
    """s against the baseline's schedule of `tokens` tokens, and whether it is a bound.

    Its intervals, over seeds alone and over seeds and tuning, follow as text.
    """
    sizes = lengths(cells, arm)
    found = [
        cell for cell in (best(cells, baseline, tokens), *(best(cells, arm, n) for n in sizes)) if cell is not None
    ]
    seeds = sorted(set.intersection(*(set(cell.seeds) for cell in found)))
    losses = np.array([cell.losses(seeds) for cell in found])
    wanted, *means = losses.mean(axis=1)
    length, bound = reach(wanted, sizes, means)
    random = np.random.default_rng(0)
    draws = draw_means(losses, random)
    luck = [draw_luck(tried(cells, baseline), random), *[draw_luck(tried(cells, arm), random)] * len(sizes)]
    intervals = []
    for drawn in (draws, draws + np.array(luck)):
        ends = speed_up_interval(drawn[0], drawn[1:], sizes, tokens)
        intervals.append(" to ".join(f"{sign}{factor:.2f}" for factor, sign in ends))
    return tokens / length, bound, intervals


def flops(cells: Sequence[Cell], arm: str) -> float:
    """FLOPs per token of an arm in its longest schedule."""
    cell = best(cells, arm, lengths(cells, arm)[-1])
    assert cell is not None
    return flops_per_token(cell.records[cell.seeds[0]])


def table() -> Iterator[str]:
    """The lines of the table."""
    yield "| study | arm | baseline | tokens | s | over seeds | over seeds and tuning | s in FLOPs |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for study, baselines in BASELINES.items():
        cells = cells_of(study)
        for baseline in baselines:
            for arm in (name for name in TUNING if name != baseline and lengths(cells, name)):
                cost = flops(cells, arm) / flops(cells, baseline)
                for tokens in lengths(cells, baseline):
                    factor, bound, intervals = speed_up(cells, arm, baseline, tokens)
                    factors = [f"{bound}{factor:.2f}", *intervals, f"{bound}{factor / cost:.2f}"]
                    yield f"| {study} | {arm} | {baseline} | {tokens:,} | {' | '.join(factors)} |"


if __name__ == "__main__":
    print("\n".join(table()))
