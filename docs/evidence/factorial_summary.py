"""Prints what the factorial of PROTOCOL.md has found so far, from the records alone, and draws it in factorial.png.

Run it in the repository's root: python docs/evidence/factorial_summary.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from factorial import CORE, EVIDENCE, HUTCHINSON, POWER, STEPS, STUDIES
from matplotlib.figure import Figure

from sophia_levanter.studies.plots import LOOK, MARKERS, as_png, style_of
from sophia_levanter.studies.records import find, read_records
from sophia_levanter.studies.report import mean_win_rate
from sophia_levanter.studies.results import RESAMPLES, Cell, collect, draw_luck
from sophia_levanter.studies.study import plan, read_study

PREDICTED = {  # D by basis and batch, from PROTOCOL.md
    "parameters": {1: 0.0, 4: -0.03, 16: -0.04, 64: -0.05},
    "kronecker": {1: 0.0, 4: 0.0, 16: 0.01, 64: 0.02},
}
BASES = {"parameters": "parameters' own basis", "kronecker": "Kronecker basis"}
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


@dataclass(frozen=True)
class Difference:
    """D, the loss with the second moment minus the loss with GNB, at one batch size and in one basis."""

    batch: int
    basis: str
    value: float
    low: float
    high: float
    pooled: tuple[float, float]  # the interval of Change 2

    @property
    def decision(self) -> str:
        if self.value > 0.01 and self.low > 0:
            return "curvature wins"
        return "curvature loses" if self.value < -0.01 and self.high < 0 else "cannot be told"


def differences(batches: dict[int, dict[str, tuple[list[Cell], Cell]]]) -> list[Difference]:
    """D at the batch sizes and in the bases whose two cells are complete."""
    pairs = {
        (batch, basis): (cells[f"{basis}_second"], cells[f"{basis}_gnb"])
        for batch, cells in batches.items()
        for basis in BASES
        if {f"{basis}_second", f"{basis}_gnb"} <= cells.keys()
    }
    by_seed = {key: np.subtract(second[1].losses(), gnb[1].losses()) for key, (second, gnb) in pairs.items()}
    error = math.sqrt(np.mean([difference.var(ddof=1) for difference in by_seed.values()]) / 2) if pairs else 0.0
    found = []
    for (batch, basis), pair in pairs.items():
        random = np.random.default_rng(0)
        draws = random.integers(2, size=(RESAMPLES, 2))
        second, gnb = (resampled(*cell, random, draws) for cell in pair)
        low, high = np.quantile(second - gnb, (0.025, 0.975))
        value = by_seed[batch, basis].mean()
        luck = [draw_luck([cell.mean for cell in tuning], random) for tuning, _ in pair]
        wide = value + error * random.standard_t(len(pairs), RESAMPLES) + luck[0] - luck[1]
        found.append(Difference(batch, basis, value, low, high, tuple(np.quantile(wide, (0.025, 0.975)))))
    return found


def tables(batches: dict[int, dict[str, tuple[list[Cell], Cell]]]) -> Iterator[str]:
    """The lines of the tables."""
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
    yield "| batch | basis | D: second moment minus GNB | predicted | 95% interval | decision | pooled interval |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for d in differences(batches):
        intervals = [f"{low:+.4f} to {high:+.4f}" for low, high in ((d.low, d.high), d.pooled)]
        results = [f"{d.value:+.4f}", f"{PREDICTED[d.basis][d.batch]:+.2f}", intervals[0], d.decision, intervals[1]]
        yield f"| {d.batch} | {d.basis} | {' | '.join(results)} |"
    yield ""
    yield "| batch | gain of the Kronecker basis, second moment | GNB |"
    yield "| --- | --- | --- |"
    for batch, cells in batches.items():
        if set(CORE) <= cells.keys():
            means = {name: fresh.mean for name, (_, fresh) in cells.items()}
            gains = [means[f"parameters_{kind}"] - means[f"kronecker_{kind}"] for kind in ("second", "gnb")]
            yield f"| {batch} | {gains[0]:+.4f} | {gains[1]:+.4f} |"


def picture(found: list[Difference]) -> bytes:
    """D against the batch size, with its interval and, hollow, its prediction."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color="0.4", linewidth=0.8)
        for number, (basis, label) in enumerate(BASES.items()):
            look = {"color": style_of(number)["color"], "marker": MARKERS[number]}
            shift = 1.06 ** (2 * number - 1)  # keeps the intervals apart
            here = [d for d in found if d.basis == basis]
            x, y = [d.batch * 1024 * shift for d in here], np.array([d.value for d in here])
            bars = np.abs(np.transpose([d.pooled for d in here]) - y)
            axes.errorbar(x, y, bars, label=label, capsize=3, linestyle="none", elinewidth=1.4, **look)
            expected = PREDICTED[basis]
            x = [batch * 1024 * shift for batch in expected]
            axes.plot(x, [*expected.values()], ":", markerfacecolor="white", linewidth=1, alpha=0.7, **look)
        axes.set_xscale("log", base=2)
        sizes = sorted(STEPS)
        axes.set_xticks([size * 1024 for size in sizes], [f"{size * 1024:,}" for size in sizes])
        axes.set_xlabel("tokens per batch")
        axes.set_ylabel("gain of GNB over the second moment\n(nats per byte)")
        axes.legend()
        return as_png(figure)


if __name__ == "__main__":
    batches = {batch: cells for batch in sorted(STEPS) if (cells := cells_at(batch))}
    print("\n".join(tables(batches)))
    (EVIDENCE / "factorial.png").write_bytes(picture(differences(batches)))
