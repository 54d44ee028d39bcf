"""Pictures of a study. Of this package only this module imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sophia_levanter.comparison.costs import flops_per_token, seconds_per_step, tokens_per_step
from sophia_levanter.comparison.records import Record
from sophia_levanter.comparison.results import Cell, best, lengths
from sophia_levanter.comparison.styles import ADVISED_WIN_RATES, Style, style_of

DPI = 130
LOSS = "validation loss (nats per token)"


def write_plots(cells: Sequence[Cell], out: Path) -> list[str]:
    """PNGs of the arms' best points.

    Args:
        cells: the study's results.
        out: the directory they go to.

    Returns:
        The names of the files: `final_loss.png`, `curves.png`, and `win_rate.png` if a run has a curvature.
    """
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    styles = {arm: style_of(number) for number, arm in enumerate(arms)}
    with mpl.rc_context({"text.parse_math": False}):  # arms' names are names, whatever dollar signs they hold
        return _written(cells, styles, out)


def _written(cells: Sequence[Cell], styles: dict[str, Style], out: Path) -> list[str]:
    names = ["final_loss.png", "curves.png"]
    _final_losses(cells, styles, out / names[0])
    _curves(cells, styles, out / names[1])
    longest = {arm: _longest(cells, arm) for arm in styles}
    with_curvature = {arm: record for arm, record in longest.items() if record is not None and record.win_rate}
    if with_curvature:
        names.append("win_rate.png")
        _win_rates(with_curvature, styles, out / names[-1])
    return names


def _final_losses(cells: Sequence[Cell], styles: dict[str, Style], path: Path) -> None:
    figure, (axes,) = _figure(1, (8.5, 4.5))
    for arm, style in styles.items():
        points = [cell for t in lengths(cells, arm) if (cell := best(cells, arm, t)) and math.isfinite(cell.mean)]
        axes.plot([c.tokens for c in points], [c.mean for c in points], marker="o", markersize=4, label=arm, **style)
        for cell in points:
            losses = cell.losses()
            axes.plot([cell.tokens] * len(losses), losses, ".", color=style["color"], alpha=0.4, markersize=4)
    axes.set_xscale("log")
    axes.set_xlabel("length of the whole schedule (training tokens)")
    axes.set_ylabel(LOSS)
    _save(figure, path)


def _curves(cells: Sequence[Cell], styles: dict[str, Style], path: Path) -> None:
    figure, panels = _figure(4, (16, 3.8))
    scales: dict[str, Callable[[Record], float]] = {
        "steps": lambda record: 1,
        "training tokens": tokens_per_step,
        "FLOPs, all counted": lambda record: flops_per_token(record) * tokens_per_step(record),
        "seconds": seconds_per_step,
    }
    records = {arm: _longest(cells, arm) for arm in styles}
    for axes, (title, scale) in zip(panels, scales.items(), strict=True):
        for arm, record in records.items():
            if record is not None:
                axes.plot(*_xy(record.validation, scale(record)), label=arm, **styles[arm])
        axes.set_xlabel(title)
    panels[0].set_ylabel(LOSS)
    _save(figure, path)


def _win_rates(records: dict[str, Record], styles: dict[str, Style], path: Path) -> None:
    figure, (axes,) = _figure(1, (8.5, 4))
    for arm, record in records.items():
        axes.plot(*_xy(record.win_rate, 1), label=arm, **styles[arm])
    axes.axhspan(*ADVISED_WIN_RATES, color="0.92", zorder=0)
    axes.set_ylim(0, 1)
    axes.set_xlabel("steps (grey: the range that the authors advise)")
    axes.set_ylabel("win rate: share of steps that are not clipped")
    _save(figure, path)


def _longest(cells: Sequence[Cell], arm: str) -> Record | None:
    """A finished run of the arm's best point at its longest schedule."""
    for tokens in reversed(lengths(cells, arm)):
        cell = best(cells, arm, tokens)
        done = [] if cell is None else [r for r in cell.records.values() if r.loss is not None]
        if done:
            return done[0]
    return None


def _xy(series: Sequence[Sequence[float | None]], scale: float) -> tuple[list[float], list[float]]:
    pairs = [(x * scale, y) for x, y in series if x is not None and y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _figure(panels: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path)
