"""Medians with quartiles, and Markdown tables: what the benchmarks print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def spread(values: ArrayLike) -> str:
    """The median of some numbers, and their quartiles."""
    low, median, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table, each row as soon as it is measured."""
    for cells in (header, ["---"] * len(header)):
        _print_row(cells)
    for row in rows:
        _print_row(row)


def _print_row(cells: Sequence[object]) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
