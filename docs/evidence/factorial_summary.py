"""Prints what the factorial of PROTOCOL.md has found so far, from the records alone, as the tables of results.md.

Run it in the repository's root: python docs/evidence/factorial_summary.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from factorial import CORE, EVIDENCE, HUTCHINSON, POWER, STEPS, STUDIES

from sophia_levanter.studies.records import find, read_records
from sophia_levanter.studies.report import mean_win_rate
from sophia_levanter.studies.results import RESAMPLES, Cell, collect
from sophia_levanter.studies.study import plan, read_study

NAMES = {
    "second": "second moment",
    "gnb": "GNB",
    "hutchinson": "Hutchinson",
    "second_power_1": "second moment, power 1",
}


def cells_at(batch: int) -> dict[str, tuple[list[Cell], Cell]]:
    """The tuning runs and the fresh runs of each cell that is complete at a batch size."""
    file = STUDIES / f"factorial_{batch}.yaml"
    if not file.exists():
        return {}
    records = read_records(EVIDENCE / f"factorial_{batch}" / "study.json")
    runs = plan(read_study(file), {})
    complete = [run for run in runs if find(records, run.config)]
    by_arm = {cell.arm: cell for cell in collect(complete, records)}
    found = {}
    for name in CORE + HUTCHINSON + POWER:
        tuning = [by_arm[f"{name}_{number}"] for number in range(6) if f"{name}_{number}" in by_arm]
        fresh = by_arm.get(f"{name}_fresh")
        if fresh is not None and len(fresh.records) == 2:
            found[name] = tuning, fresh
    return found


def resampled(tuning: list[Cell], fresh: Cell, random: np.random.Generator, draws: np.ndarray) -> np.ndarray:
    """Losses [RESAMPLES] of a cell: the fresh seeds drawn, plus how much worse the best of the drawn tuning runs is."""
    losses = np.array([cell.mean for cell in tuning])
    luck = random.choice(losses, (RESAMPLES, len(losses))).min(axis=1) - losses.min()
    return np.array(fresh.losses())[draws].mean(axis=1) + luck


def tables() -> Iterator[str]:
    """The lines of the tables."""
    batches = {batch: cells for batch in sorted(STEPS) if (cells := cells_at(batch))}
    yield "| batch | basis | divided by | best point | tuning runs | seeds 1, 2 | mean | win rate |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for batch, cells in batches.items():
        for name, (tuning, fresh) in cells.items():
            basis, _, kind = name.partition("_")
            point = ", ".join(f"{field.split('.')[-1]} {value:g}" for field, value in fresh.point.items())
            tried = ", ".join("diverged" if math.isinf(cell.mean) else f"{cell.mean:.4f}" for cell in tuning)
            seeds, rate = ", ".join(f"{loss:.4f}" for loss in fresh.losses()), mean_win_rate(fresh)
            results = [point, tried, seeds, f"{fresh.mean:.4f}", "" if rate is None else f"{rate:.2f}"]
            yield f"| {batch} | {basis} | {NAMES[kind]} | {' | '.join(results)} |"
    yield ""
    yield "| batch | basis | D: second moment minus GNB | 95% interval | decision |"
    yield "| --- | --- | --- | --- | --- |"
    for batch, cells in batches.items():
        for basis in ("parameters", "kronecker"):
            pair = [cells.get(f"{basis}_{kind}") for kind in ("second", "gnb")]
            if None in pair:
                continue
            random = np.random.default_rng(0)
            draws = random.integers(2, size=(RESAMPLES, 2))
            second, gnb = (resampled(*cell, random, draws) for cell in pair)
            difference = pair[0][1].mean - pair[1][1].mean
            low, high = np.quantile(second - gnb, (0.025, 0.975))
            wins, loses = difference > 0.01 and low > 0, difference < -0.01 and high < 0
            decision = "curvature wins" if wins else "curvature loses" if loses else "cannot be told"
            yield f"| {batch} | {basis} | {difference:+.4f} | {low:+.4f} to {high:+.4f} | {decision} |"


if __name__ == "__main__":
    print("\n".join(tables()))
