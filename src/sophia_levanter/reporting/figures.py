"""The pictures of a report. Of this package only this module imports matplotlib."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from sophia_levanter.comparison.styles import ADVISED_WIN_RATES, COLOURS, style_of
from sophia_levanter.printing import one_line, shortened
from sophia_levanter.reporting.axes import Axis
from sophia_levanter.reporting.curves import Bins, limits, smooth, spans_decades, thin
from sophia_levanter.reporting.panels import Kind, Panel, curves_of
from sophia_levanter.reporting.runs import Run

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FAINTEST = 0.25  # of a run's curves in one panel
MOST_MARKERS = 25  # on a curve
SIZE = (5.2, 3.2)  # of a panel, in inches
DPI = 220
SHORT_NAME = 40
LOOK: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "xtick.color": "0.3",
    "ytick.color": "0.3",
    "legend.frameon": False,
    "svg.hashsalt": "report",
    # Names of runs are names, whatever dollar signs they hold.
    "text.parse_math": False,
}


def svg(panel: Panel, runs: Sequence[Run], axis: Axis) -> str:
    """A panel without a legend, as a `data:` URL."""
    with _figure(1) as (figure, (axes,)):
        _draw(axes, panel, runs, axis)
        return _as_url(figure)


def png(panels: Sequence[Panel], runs: Sequence[Run], axis: Axis) -> bytes:
    """Panels side by side, two in a row, with a legend above them."""
    with _figure(len(panels)) as (figure, places):
        for axes, panel in zip(places, panels, strict=True):
            _draw(axes, panel, runs, axis)
        if len(runs) > 1:
            figure.legend(handles=[_sample(run, i) for i, run in enumerate(runs)], loc="outside upper center", ncols=4)
        content = io.BytesIO()
        with warnings.catch_warnings():
            # A name in a script that matplotlib's font lacks shows as boxes, which is no news to its owner.
            warnings.filterwarnings("ignore", "Glyph", UserWarning)
            figure.savefig(content, format="png", dpi=DPI)
        return content.getvalue()


def sample_of_line(number: int) -> str:
    """What a run's curves look like, as a `data:` URL of a small picture."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(0.5, 0.16))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.plot([0, 1, 2], [0, 0, 0], marker=_marker(number), markevery=[1], **style_of(number))
        axes.set_axis_off()
        return _as_url(figure)


@contextmanager
def _figure(panels: int) -> Iterator[tuple[Figure, list[Axes]]]:
    rows, columns = -(-panels // 2), min(panels, 2)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
        yield figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def _as_url(figure: Figure) -> str:
    content = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(content, format="svg", metadata=nothing, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def _draw(axes: Axes, panel: Panel, runs: Sequence[Run], axis: Axis) -> None:
    unit, label = axis.unit(runs)
    drawn: list[tuple[Run, np.ndarray]] = []
    for number, run in enumerate(runs):
        curves = curves_of(panel, run)
        for strength, series in zip(np.linspace(1, FAINTEST, len(curves))[::-1], curves, strict=True):
            x = axis.positions(run, series.steps)
            if x is not None:
                bins = thin(x / unit, series.values)
                drawn.append((run, _draw_curve(axes, panel, bins, number, strength)))
    if panel.key == "win_rate":
        axes.axhspan(*ADVISED_WIN_RATES, color="0.93", zorder=0)
    _set_limits(axes, panel, drawn)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel(panel.label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=axis.key == "steps"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}" if x < 1e6 else f"{x:,.0f}"))


def _draw_curve(axes: Axes, panel: Panel, bins: Bins, number: int, strength: float) -> np.ndarray:
    """Draws one curve of a run; the values that it goes through."""
    style: dict[str, Any] = {**style_of(number), "zorder": 3, "alpha": strength}
    if panel.kind is Kind.POINTS:
        markers: dict[str, Any] = {"marker": _marker(number), "markevery": max(1, len(bins.x) // MOST_MARKERS)}
        axes.plot(bins.x, bins.mean, **markers, **style)
        return bins.mean
    if panel.kind is Kind.LINE:
        axes.plot(bins.x, bins.mean, marker="." if len(bins.x) == 1 else None, **style)
        return bins.mean
    faint: dict[str, Any] = {"color": style["color"], "linewidth": 0.6, "zorder": 2}
    if bins.low is bins.high:
        axes.plot(bins.x, bins.mean, alpha=0.3, **faint)
    else:
        axes.fill_between(bins.x, bins.low, bins.high, alpha=0.15, **(faint | {"linewidth": 0}))
    smoothed = smooth(bins.mean)
    axes.plot(bins.x, smoothed, marker="." if len(bins.x) == 1 else None, **style)
    return smoothed


def _set_limits(axes: Axes, panel: Panel, drawn: Sequence[tuple[Run, np.ndarray]]) -> None:
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
        return
    # One that has diverged leaves the picture, and the others can still be told apart.
    curves = [values for run, values in drawn if not run.has_diverged] or [values for _, values in drawn]
    found = limits(curves)
    if found is None:
        return
    if panel.series.endswith("/") and not spans_decades(curves):
        return  # of a registered metric all is shown
    if panel.from_zero:
        top = max(float(np.nanmax(values)) for _, values in drawn if np.isfinite(values).any())
        axes.set_ylim(0, 1.05 * top or 1.0)
    elif panel.may_be_logarithmic and spans_decades(curves):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(*found)


def _sample(run: Run, number: int) -> Line2D:
    name = shortened(one_line(run.name), SHORT_NAME)
    # matplotlib leaves out labels that begin with an underscore.
    label = f" {name}" if name.startswith("_") else name
    return Line2D([], [], label=label, marker=_marker(number), **style_of(number))


def _marker(number: int) -> str:
    return MARKERS[number % len(COLOURS)]
