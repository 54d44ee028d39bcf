"""Series made ready for a picture: fewer points, smoother, and limits that a few wild values do not set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_POINTS = 2000
WINDOW = 0.05  # of the curve, that a smoothed point is the mean of
SETTLED = 0.1  # of a curve, after which its values set the limits
MARGIN = 0.05


class Bins(NamedTuple):
    """Runs of neighbouring points, each as one.

    Attributes:
        x: mean position of each, float64 [bin].
        mean, low, high: of its finite values, float64 [bin]; NaN where it has none.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> Bins:
    """At most so many bins of equally many points, give or take one.

    Args:
        x: positions [point].
        y: values [point]; NaN for gaps.
        most: bins.
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
    """The mean of the finite values around each point, float64 [point]; at the ends of those that are there.

    Args:
        y: values [point]; gaps stay gaps.
    """
    reach = int(len(y) * WINDOW / 2)
    window = np.ones(2 * reach + 1)
    gap = np.isnan(y)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        sums = np.convolve(np.where(gap, 0.0, y), window)
        means = sums / np.convolve(~gap, window)
    return np.where(gap, np.nan, means[reach : reach + len(y)])


def limits(curves: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Limits that show how curves end, and not the cliff that they begin with or one that flies off.

    A curve counts from a tenth of its length on, and for the upper limit without its highest values. The upper limit
    suits the middle one of the curves and those near it, and the ends of the others where they come down.

    Args:
        curves: values [point] of each; NaN for gaps.

    Returns:
        The lower and the upper limit; None where no value is finite.
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
    """Whether values are all positive, and so far apart that a logarithmic axis shows them better."""
    finite = _finite(np.concatenate(list(curves)))
    return bool(finite.size) and finite.min() > 0 and math.log10(finite.max() / finite.min()) > 1.5


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
