"""Plots of the curves of runs and studies. Only this module and `heat_maps` import matplotlib."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

from sophia_levanter.errors import one_line, shortened
from sophia_levanter.studies.panels import (
    ADVISED_WIN_RATES,
    AXES,
    STEPS,
    VALIDATION,
    WIN_RATE,
    Axis,
    Kind,
    Panel,
    curve_labels,
    curves_of,
)
from sophia_levanter.studies.results import Cell, as_run, best, finished, lengths
from sophia_levanter.studies.runs import Run

# Okabe and Ito's palette, which is safe for color-blind readers, without yellow, which is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
MOST_STYLES = len(COLOURS) * len(LINES)  # styles repeat after this many lines
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FAINTEST = 0.25  # opacity of a run's faintest curve in a panel
ADVISED_GREY = "0.93"  # background of the range of win rates recommended by the authors
MOST_MARKERS = 25  # maximum number of markers on a curve
SIZE = (5.2, 3.2)  # size of a panel, in inches
LETTERS, LINE_HEIGHT = 14, 0.19  # letters per inch and line height in inches, for legends
DPI = 220
SHORT_NAME = 40
MOST_POINTS = 2000
WINDOW = 0.05  # length of the smoothing window, as a fraction of the curve
SETTLED = 0.1  # fraction of a curve to skip at the beginning when choosing limits
MARGIN = 0.05
LOOK: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "grid.color": "0.9",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "xtick.color": "0.3",
    "ytick.color": "0.3",
    "legend.frameon": False,
    "svg.hashsalt": "report",
    # Dollar signs in the names of runs and arms are not math delimiters.
    "text.parse_math": False,
}


def svg(panel: Panel, runs: Sequence[Run], axis: Axis) -> str:
    """Draw a panel without a legend. Return an SVG image as a `data:` URL."""
    with _figure(1) as (figure, (axes,)):
        _draw(axes, panel, runs, axis)
        return as_url(figure)


def png(panels: Sequence[tuple[Panel, Axis]], runs: Sequence[Run]) -> bytes:
    """Draw panels with titles, two per row, and a legend for the runs and their curves. Return a PNG image."""
    with _figure(len(panels)) as (figure, places):
        drawn = {i: run.name for i, run in enumerate(runs) if any(curves_of(panel, run) for panel, _ in panels)}
        samples = _samples(drawn if len(runs) > 1 else {})
        colour = COLOURS[0] if len(runs) == 1 else "black"
        for axes, (panel, axis) in zip(places, panels, strict=True):
            _draw(axes, panel, runs, axis)
            axes.set_title(panel.title)
            labels = curve_labels(panel, runs)
            if "*" in panel.series:
                curves = _strengths(labels).items()
                samples += [_sample(labels[name], color=colour, alpha=strength) for name, strength in curves]
            if panel.key == "win_rate":
                samples.append(_sample("recommended range", color=ADVISED_GREY, linewidth=8))
        return as_png(figure, samples)


def study_pictures(cells: Sequence[Cell]) -> dict[str, bytes]:
    """Draw the results at the best point of each arm.

    Args:
        cells: the results of the study.

    Returns:
        PNG images, keyed by file name: `final_loss.png`, `curves.png` and, if a run has a win rate, `win_rate.png`.
    """
    records = {arm: finished(cells, arm) for arm in dict.fromkeys(cell.arm for cell in cells)}
    # Put arms without a finished run last, so that the others have the same style in all images.
    runs = [as_run(record, arm) for arm, record in records.items() if record is not None]
    others = [arm for arm, record in records.items() if record is None]
    pictures = {
        "final_loss.png": _final_losses(cells, [*(run.name for run in runs), *others]),
        "curves.png": png([(VALIDATION, axis) for axis in AXES], runs),
    }
    if any(curves_of(WIN_RATE, run) for run in runs):
        pictures["win_rate.png"] = png([(WIN_RATE, STEPS)], runs)
    return pictures


def _final_losses(cells: Sequence[Cell], arms: Sequence[str]) -> bytes:
    with _figure(1) as (figure, (axes,)):
        for number, arm in enumerate(arms):
            points = [cell for t in lengths(cells, arm) if (cell := best(cells, arm, t)) and math.isfinite(cell.mean)]
            axes.plot([c.tokens for c in points], [c.mean for c in points], marker=_marker(number), **style_of(number))
            for cell in points:
                losses = cell.losses()
                seeds: dict[str, Any] = {"color": style_of(number)["color"], "alpha": 0.4}
                axes.plot([cell.tokens] * len(losses), losses, ".", **seeds)
        axes.set_xscale("log")
        axes.set_xticks(sorted({cell.tokens for cell in cells}))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # the default formatter uses math text
        axes.set_xlabel("length of the whole schedule (training tokens)")
        axes.set_ylabel(VALIDATION.label)
        axes.set_title("Validation loss at the end of the schedule")
        return as_png(figure, _samples(dict(enumerate(arms))))


def style_of(number: int) -> dict[str, Any]:
    """Return Matplotlib arguments for the line with the given number, counted from 0."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number // len(COLOURS) % len(LINES)]}


def sample_of_line(number: int) -> str:
    """Draw a short sample of the line with the given number. Return an SVG image as a `data:` URL."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(0.5, 0.16))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.plot([0, 1, 2], [0, 0, 0], marker=_marker(number), markevery=[1], **style_of(number))
        axes.set_axis_off()
        return as_url(figure)


@contextmanager
def _figure(panels: int) -> Iterator[tuple[Figure, list[Axes]]]:
    rows, columns = -(-panels // 2), min(panels, 2)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
        yield figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def as_url(figure: Figure) -> str:
    """Convert a figure to an SVG image, encoded as a `data:` URL."""
    content = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(content, format="svg", metadata=nothing, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def as_png(figure: Figure, samples: Sequence[Line2D] = ()) -> bytes:
    """Convert a figure to a PNG image, with a legend for `samples`."""
    if samples:
        longest = max(len(str(sample.get_label())) for sample in samples)
        columns = max(1, min(4, int(figure.get_figwidth() * LETTERS / (longest + 6))))
        # Enlarge the figure so that the panels keep their size.
        figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * -(-len(samples) // columns))
        figure.legend(handles=samples, loc="outside upper center", ncols=columns)
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Characters that are missing from matplotlib's font are drawn as boxes. A warning would not help the user.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


def _samples(names: Mapping[int, str]) -> list[Line2D]:
    """Create legend entries for names keyed by line number."""
    return [_sample(name, marker=_marker(number), **style_of(number)) for number, name in names.items()]


def _sample(name: str, **style: Any) -> Line2D:
    label = shown_name(name)
    # matplotlib omits labels that begin with an underscore.
    label = f" {label}" if label.startswith("_") else label
    return Line2D([], [], label=label, **style)


def shown_name(name: str) -> str:
    """Format a name for an image by putting it on one line and shortening it if necessary."""
    return shortened(one_line(name), SHORT_NAME)


def _strengths(names: Collection[str]) -> dict[str, float]:
    """Return the opacity of each series. It is the same in all runs."""
    return dict(zip(names, np.linspace(1, FAINTEST, len(names))[::-1].tolist(), strict=True))


def _marker(number: int) -> str:
    return MARKERS[number % len(COLOURS)]


def _draw(axes: Axes, panel: Panel, runs: Sequence[Run], axis: Axis) -> None:
    unit, label = axis.unit(runs)
    strengths = _strengths(curve_labels(panel, runs))
    drawn: list[tuple[Run, np.ndarray]] = []
    for number, run in enumerate(runs):
        for name, strength in strengths.items():
            x = axis.positions(run, run.series[name].steps) if name in run.series else None
            if x is not None:
                bins = thin(x / unit, run.series[name].values)
                drawn.append((run, _draw_curve(axes, panel, bins, number, strength)))
    if panel.key == "win_rate":
        axes.axhspan(*ADVISED_WIN_RATES, color=ADVISED_GREY, zorder=0)
    _set_limits(axes, panel, drawn)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel(panel.label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=axis.key == "steps"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}" if x < 1e6 else f"{x:,.0f}"))


def _draw_curve(axes: Axes, panel: Panel, bins: Bins, number: int, strength: float) -> np.ndarray:
    """Draw one curve of a run and return the values drawn."""
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
    # Diverged curves may extend beyond the plot, so that the other curves remain distinguishable.
    curves = [values for run, values in drawn if not run.has_diverged] or [values for _, values in drawn]
    found = limits(curves)
    if found is None:
        return
    if panel.series.endswith("/*") and not spans_decades(curves):
        return  # show registered metrics in full
    if panel.from_zero:
        top = max(float(np.nanmax(values)) for _, values in drawn if np.isfinite(values).any())
        axes.set_ylim(0, 1.05 * top or 1.0)
    elif panel.may_be_logarithmic and spans_decades(curves):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(*found)


class Bins(NamedTuple):
    """Bins of neighboring points.

    Attributes:
        x: float64 [bin], the mean position in each bin.
        mean, low, high: float64 [bin], the mean, minimum and maximum of the finite values in each bin; NaN if the bin
            has none.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> Bins:
    """Group points into at most `most` bins, whose sizes differ by at most one point.

    Args:
        x: positions [point].
        y: values [point]; NaN for gaps.
        most: the maximum number of bins.
    """
    if len(x) <= most:
        return Bins(x, y, y, y)
    edges = np.linspace(0, len(x), most + 1).astype(np.int64)
    starts, counts = edges[:-1], np.diff(edges)
    gap = np.isnan(y)
    finite = counts - np.add.reduceat(gap, starts, dtype=np.int64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean = np.add.reduceat(np.where(gap, 0.0, y), starts) / finite
    low = np.fmin.reduceat(y, starts)
    high = np.fmax.reduceat(y, starts)
    return Bins(np.add.reduceat(x.astype(np.float64), starts) / counts, mean, low, high)


def smooth(y: np.ndarray) -> np.ndarray:
    """Average the finite values in a window around each point: float64 [point]. The window is truncated at the ends.

    Args:
        y: values [point]; NaN for gaps, which remain gaps.
    """
    reach = int(len(y) * WINDOW / 2)
    window = np.ones(2 * reach + 1)
    gap = np.isnan(y)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        sums = np.convolve(np.where(gap, 0.0, y), window)
        means = sums / np.convolve(~gap, window)
    return np.where(gap, np.nan, means[reach : reach + len(y)])


def limits(curves: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Choose axis limits that show how curves end, ignoring steep beginnings and outlying curves.

    The first tenth of each curve is ignored. The upper limit also ignores the highest values of each curve; it covers
    the median curve, curves near it, and the ends of other curves that are descending.

    Args:
        curves: the values [point] of each curve; NaN for gaps.

    Returns:
        The lower and upper limits, or None if no value is finite.
    """
    settled = [_finite(curve[int(len(curve) * SETTLED) :]) for curve in curves]
    settled = [values for values in settled if values.size]
    if not settled:
        return None
    low = min(float(values.min()) for values in settled)
    tops = [float(np.quantile(values, 0.98)) for values in settled]
    near = low + 3 * (float(np.median(tops)) - low)
    ends = [float(values[-1]) for values, top in zip(settled, tops, strict=True) if values[-1] < top]
    high = max([*(top for top in tops if top <= near), *ends, low])
    room = (high - low) * MARGIN or abs(high) * MARGIN or 1.0
    return low - room, high + room


def spans_decades(curves: Sequence[np.ndarray]) -> bool:
    """Return whether all values are positive and their range is wide enough for a logarithmic axis."""
    finite = _finite(np.concatenate(list(curves)))
    return bool(finite.size) and finite.min() > 0 and math.log10(finite.max() / finite.min()) > 1.5


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
