"""Prints the speed-ups of evidence.md, with intervals that resample the tuning runs as well as the seeds.

Run it in the repository's root: python docs/evidence/headline.py
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sophia_levanter.studies.records import read_records
from sophia_levanter.studies.results import RESAMPLES, Cell, best, collect, flops_per_token, lengths, reach
from sophia_levanter.studies.study import plan, read_study

EVIDENCE = Path("docs/evidence")
# For each arm of `main`, the study and the arms that selected its settings on seed 0, and the length of their runs.
TUNING: dict[str, tuple[str, tuple[str, ...], float]] = {
    "adamw": ("tuning", ("adamw",), 2e6),
    "nadamw": ("tuning", ("nadamw",), 2e6),
    "sophia_g": ("tuning", ("sophia_g",), 2e6),
    "sophia_g_kronecker": ("turning", ("interval_and_memory", "rate_and_rho", "width_every_5"), 1e6),
    "both_sides": ("tuning", ("sophia_g_kronecker",), 2e6),
    "muon": ("tuning", ("muon",), 2e6),
    "soap": ("tuning", ("soap",), 2e6),
}
BASELINES = ("adamw", "nadamw")


def cells_of(study: str) -> list[Cell]:
    """The cells of a study, from its records."""
    runs = plan(read_study(EVIDENCE / "studies" / f"{study}.yaml"), {})
    return collect(runs, read_records(EVIDENCE / study / "study.json"))


def luck(arm: str, random: np.random.Generator) -> np.ndarray:
    """How much worse, in nats, the best of resampled tuning runs is than the best of all [RESAMPLES]."""
    study, arms, tokens = TUNING[arm]
    cells = [cell for cell in cells_of(study) if cell.arm in arms and cell.tokens == tokens]
    tried = np.array([*{repr(cell.records[0].config): cell.losses([0])[0] for cell in cells}.values()])
    return random.choice(tried, (RESAMPLES, tried.size)).min(axis=1) - tried.min()


def speed_up(cells: Sequence[Cell], arm: str, baseline: str, tokens: int, *, tuning: bool) -> tuple[float, str, str]:
    """s against the baseline's schedule of `tokens` tokens, whether that is a bound, and its 95 % interval as text."""
    target, *curve = [best(cells, baseline, tokens), *(best(cells, arm, length) for length in lengths(cells, arm))]
    assert target is not None
    found = [cell for cell in curve if cell is not None]
    seeds = sorted(set(target.seeds).intersection(*(cell.seeds for cell in found)))
    sizes = [cell.tokens for cell in found]
    means = [statistics.fmean(cell.losses(seeds)) for cell in found]
    length, bound = reach(statistics.fmean(target.losses(seeds)), sizes, means)
    random = np.random.default_rng(0)
    draws = random.choice(len(seeds), (RESAMPLES, len(seeds)))
    wanted, *losses = (np.array(cell.losses(seeds))[draws].mean(axis=1) for cell in (target, *found))
    if tuning:
        wanted = wanted + luck(baseline, random)
        worse = luck(arm, random)
        losses = [loss + worse for loss in losses]
    reached = [reach(loss, sizes, row) for loss, row in zip(wanted, np.transpose(losses), strict=True)]
    # A schedule that does not reach the loss has a speed-up below that of the longest, and the reverse.
    factors = sorted((tokens / length, {"<": 0, "": 1, ">": 2}[sign], sign) for length, sign in reached)
    low, high = (factors[round(q * (RESAMPLES - 1))] for q in (0.025, 0.975))
    return tokens / length, bound, f"{low[2]}{low[0]:.2f} to {high[2]}{high[0]:.2f}"


def flops(cells: Sequence[Cell], arm: str) -> float:
    """FLOPs per token of an arm in its longest schedule."""
    cell = best(cells, arm, lengths(cells, arm)[-1])
    assert cell is not None
    return flops_per_token(cell.records[cell.seeds[0]])


def table() -> Iterator[str]:
    """The lines of the table."""
    cells = cells_of("main")
    yield "| arm | baseline | tokens | s | over seeds | over seeds and tuning | s in FLOPs |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for baseline in BASELINES:
        for arm in (name for name in TUNING if name not in BASELINES):
            cost = flops(cells, arm) / flops(cells, baseline)
            for tokens in (length for length in lengths(cells, baseline) if length <= 2e6):
                factor, bound, over_seeds = speed_up(cells, arm, baseline, tokens, tuning=False)
                *_, over_both = speed_up(cells, arm, baseline, tokens, tuning=True)
                factors = f"{bound}{factor:.2f} | {over_seeds} | {over_both} | {bound}{factor / cost:.2f}"
                yield f"| {arm} | {baseline} | {tokens:,} | {factors} |"


if __name__ == "__main__":
    print("\n".join(table()))
