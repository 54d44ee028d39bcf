"""The numbers of each run that a reader looks at first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sophia_levanter.checkpoint.report import age
from sophia_levanter.comparison.styles import ADVISED_WIN_RATES
from sophia_levanter.reporting.comparability import Comparability
from sophia_levanter.reporting.runs import Run

NOTHING = "–"
RECENT_SECONDS = 86_400.0


@dataclass(frozen=True)
class Cell:
    """An entry of a table.

    Attributes:
        text: what it shows.
        best: whether it is the best of its column.
        remark: a word beside it; empty for none.
    """

    text: str
    best: bool = False
    remark: str = ""


COLUMNS = (
    "run",
    "status",
    "optimizer",
    "parameters",
    "steps",
    "tokens",
    "last validation loss",
    "best validation loss",
    "bits per byte",
    "win rate",
    "tokens/s",
    "MFU",
    "skipped steps",
)


def headline(runs: Sequence[Run], comparability: Comparability) -> list[list[Cell]]:
    """A row for each run, with a cell for each of `COLUMNS`."""
    losses = [_last(run, "validation/loss") for run in runs]
    lowest = [_lowest(run) for run in runs]
    bits = [_last(run, "validation/bits_per_byte") for run in runs]
    compared = comparability.same_text and len(runs) > 1
    per_token = compared and comparability.same_tokenizer
    return [
        [
            Cell(run.name),
            Cell(status(run)),
            Cell(run.optimizer),
            Cell(NOTHING if run.parameters is None else short(run.parameters)),
            Cell(f"{run.steps_done:,} / {run.total_steps:,}"),
            Cell(short(float(run.tokens_at(np.array(run.steps_done))))),
            Cell(_decimals(losses[i]), best=per_token and _is_lowest(losses[i], losses)),
            Cell(_decimals(lowest[i]), best=per_token and _is_lowest(lowest[i], lowest)),
            Cell(_decimals(bits[i]), best=compared and _is_lowest(bits[i], bits)),
            _win_rate(run),
            Cell(_throughput(run)),
            Cell(_utilisation(run)),
            Cell(f"{_last(run, 'train/skipped_steps', 0.0):,.0f}"),
        ]
        for i, run in enumerate(runs)
    ]


def status(run: Run) -> str:
    """How a run stands."""
    if run.has_diverged:
        return "diverged" if run.is_finished else f"diverged, at step {run.steps_done:,}"
    if run.is_finished:
        return "finished"
    if run.seconds_since_written < RECENT_SECONDS:
        return f"at step {run.steps_done:,}, {age(run.written_at)}"
    return f"stopped at step {run.steps_done:,}"


def short(number: float) -> str:
    """Three digits and a unit: 860k, 1.56B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1))))}f}{unit}"
    return f"{number:,.0f}"


def _last(run: Run, name: str, otherwise: float = math.nan) -> float:
    return run.series[name].last if name in run.series else otherwise


def _lowest(run: Run) -> float:
    values = run.series["validation/loss"].values if "validation/loss" in run.series else np.array([])
    finite = values[np.isfinite(values)]
    return float(finite.min()) if finite.size else math.nan


def _is_lowest(value: float, values: Sequence[float]) -> bool:
    finite = [other for other in values if math.isfinite(other)]
    # As shown: of two that look the same neither is better.
    return len(finite) > 1 and _decimals(value) == _decimals(min(finite))


def _decimals(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else NOTHING


def _win_rate(run: Run) -> Cell:
    rate = _last(run, "optim/win_rate")
    if not math.isfinite(rate):
        return Cell(NOTHING)
    low, high = ADVISED_WIN_RATES
    return Cell(f"{rate:.2f}", remark="low" if rate < low else "high" if rate > high else "")


def _throughput(run: Run) -> str:
    seconds = run.seconds_at(np.array(run.steps_done))
    return NOTHING if seconds is None else short(float(run.tokens_at(np.array(run.steps_done)) / seconds))


def _utilisation(run: Run) -> str:
    """The mean over time: of the FLOPs that all steps together could have done."""
    if run.rates is None or "train/mfu" not in run.series:
        return NOTHING
    # A step takes as long as its rate is low; each has the same model FLOPs per token.
    shares = run.series["train/mfu"]
    steps, of_rates, of_shares = np.intersect1d(run.rates.steps, shares.steps, return_indices=True)
    seconds = np.diff(run.tokens_at(np.append(0, steps))) / run.rates.values[of_rates]
    share = np.sum(shares.values[of_shares] * seconds) / np.sum(seconds) if steps.size else math.nan
    return f"{share:.1%}" if math.isfinite(share) else NOTHING
