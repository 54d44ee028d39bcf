"""Heat maps of array statistics, with one row per layer of an array and one column per step with statistics."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from sophia_levanter.config.registries import STATISTICS
from sophia_levanter.studies.plots import LOOK, as_png, as_url, shown_name
from sophia_levanter.studies.runs import Run, Series

KINDS = {
    "weight_rms": "Weight RMS",
    "gradient_rms": "Gradient RMS",
    "update_ratio": "Update-to-weight ratio",
    "win_rate": "Win rate",
}
LINEAR = ("win_rate",)  # shown on a linear scale from 0 to 1; the others use logarithmic scales
CAPTION = (
    "Each array has one stripe per layer, with the first layer at the top. Gradients are measured before clipping. RMS "
    "is the root mean square; the update-to-weight ratio is a ratio of RMS values. Gray marks zeros and non-finite "
    "values."
)
MOST_COLUMNS = 400
WIDTH = 5.2  # width of a panel, in inches
ROW, LEAST_ARRAY, MOST_ROWS = 0.05, 0.14, 5.0  # height of a row, minimum per array, maximum for all rows, in inches
CAPTION_LETTERS = 18  # letters per inch
TITLE_HEIGHT, CAPTION_LINE_HEIGHT = 0.3, 0.13  # in inches


@dataclass(frozen=True)
class Statistics:
    """Statistics of the arrays in a run.

    Attributes:
        layers: the layers of each array, in ascending order; [None] for an array outside the stack of layers.
        steps: int64 [column], the steps with statistics, in ascending order, counted from 0.
        grids: float64 [row, column] for each kind of statistic, keyed by kind, with one row per layer of each array.
            Missing values are NaN and, for kinds with a logarithmic scale, so are zeros.
    """

    layers: Mapping[str, Sequence[int | None]]
    steps: np.ndarray
    grids: Mapping[str, np.ndarray]

    @cached_property
    def edges(self) -> np.ndarray:
        """The boundaries between rows, in inches from the top: float64 [row + 1]."""
        counts = np.array([len(layers) for layers in self.layers.values()])
        heights = np.maximum(min(ROW, MOST_ROWS / counts.sum()), LEAST_ARRAY / counts)
        return np.append(0.0, np.cumsum(np.repeat(heights, counts)))

    @cached_property
    def bounds(self) -> np.ndarray:
        """The boundaries between arrays, in inches from the top: float64 [array + 1]."""
        return self.edges[np.cumsum([0, *map(len, self.layers.values())])]


def statistics_of(run: Run) -> Statistics | None:
    """Collect statistics for heat maps, thinned to at most `MOST_COLUMNS` steps. Return None if the run has none."""
    kinds: dict[str, dict[tuple[str, int | None], Series]] = {kind: {} for kind in KINDS}
    for name, series in run.series.items():
        section, _, key = name.partition("/")
        place, _, kind = key.rpartition("/")
        if section == STATISTICS and kind in KINDS:
            array, _, last = place.rpartition("/")
            kinds[kind][(array, int(last)) if last.isdecimal() else (place, None)] = series
    measured = [series for found in kinds.values() for series in found.values()]
    if not measured:
        return None
    rows = sorted({row for found in kinds.values() for row in found}, key=lambda row: (row[0], row[1] or 0))
    layers: dict[str, list[int | None]] = defaultdict(list)
    for array, layer in rows:
        layers[array].append(layer)
    steps = np.unique(np.concatenate([series.steps for series in measured]))
    steps = steps[:: math.ceil(len(steps) / MOST_COLUMNS)]
    grids = {kind: np.array([_on(steps, found.get(row)) for row in rows]) for kind, found in kinds.items()}
    grids = {kind: np.where((grid > 0) | (kind in LINEAR), grid, np.nan) for kind, grid in grids.items()}
    grids = {kind: grid for kind, grid in grids.items() if np.isfinite(grid).any()}
    return Statistics(layers, steps - 1, grids) if grids else None


def _on(steps: np.ndarray, series: Series | None) -> np.ndarray:
    """Return the values of a series at `steps`, with NaN for steps without a value."""
    values = np.full(len(steps), np.nan)
    if series is not None:
        _, here, there = np.intersect1d(steps, series.steps, return_indices=True)
        values[here] = series.values[there]
    return values


def heat_map_svg(found: Statistics) -> str:
    """Draw a panel for each kind of statistic. Return an SVG image as a `data:` URL."""
    with mpl.rc_context(LOOK):
        return as_url(_figure(found))


def heat_map_png(found: Statistics, name: str) -> bytes:
    """Draw a panel for each kind of statistic. Return a standalone PNG with the name of the run and a caption."""
    with mpl.rc_context(LOOK):
        figure = _figure(found)
        caption = textwrap.wrap(CAPTION, int(figure.get_figwidth() * CAPTION_LETTERS))
        figure.set_figheight(figure.get_figheight() + TITLE_HEIGHT + CAPTION_LINE_HEIGHT * len(caption))
        figure.suptitle(f"{shown_name(name)}: arrays and layers", fontsize=11)
        figure.supxlabel("\n".join(caption), fontsize=7, color="0.3")
        return as_png(figure)


def _figure(found: Statistics) -> Figure:
    rows, columns = -(-len(found.grids) // 2), min(len(found.grids), 2)
    figure = Figure(figsize=(WIDTH * columns, (found.edges[-1] + 0.8) * rows), dpi=200, layout="constrained")
    labels = [_label(array, layers) for array, layers in found.layers.items()]
    for number, (kind, grid) in enumerate(found.grids.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        ticks = None if kind in LINEAR else LogLocator(subs=(1, 2, 5))
        bar = figure.colorbar(_draw(axes, found, kind, grid), ax=axes, pad=0.02, aspect=30, ticks=ticks)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.minorticks_off()
        axes.set_title(KINDS[kind])
        is_left = number % columns == 0
        axes.set_yticks((found.bounds[:-1] + found.bounds[1:]) / 2, labels if is_left else [""] * len(labels))
        axes.tick_params(axis="y", length=0, labelsize=6.5)
    return figure


def _draw(axes: Axes, found: Statistics, kind: str, grid: np.ndarray) -> Any:
    """Draw the cells and the lines between arrays. Each cell extends from its step to the next step with statistics."""
    steps = found.steps
    ends = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1))
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    norm = Normalize(0, 1) if kind in LINEAR else LogNorm(low, max(high, 1.01 * low))
    axes.grid(False)
    axes.set_facecolor("0.85")
    cells = axes.pcolormesh(ends, found.edges, grid, norm=norm, cmap="viridis", rasterized=True)
    axes.hlines(found.bounds[1:-1], ends[0], ends[-1], color="white", linewidth=0.8)
    axes.set_xlim(ends[0], ends[-1])
    axes.set_ylim(found.edges[-1], 0)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    return cells


def _label(array: str, layers: Sequence[int | None]) -> str:
    """Return the path of an array followed by the range of its layers."""
    return array if layers[0] is None else f"{array}  {layers[0]}–{layers[-1]}"
