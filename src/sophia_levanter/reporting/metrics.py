"""`metrics.jsonl` as arrays."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sophia_levanter.errors import InputError
from sophia_levanter.tracking.jsonl import read_records


@dataclass(frozen=True)
class Series:
    """What a run has logged under one name.

    Attributes:
        steps: steps done when each number was taken, int64 [point], ascending.
        values: the numbers, float64 [point]; NaN where one was not finite.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass
class _Column:
    steps: array = field(default_factory=lambda: array("q"))
    values: array = field(default_factory=lambda: array("d"))


def read_metrics(path: Path) -> dict[str, Series]:
    """Reads a run's metrics; a last line that is cut short, as a kill leaves it, is not there.

    Args:
        path: the file.

    Returns:
        A series for each name.

    Raises:
        InputError: if the file is missing, holds no step or is damaged.
    """
    columns: dict[str, _Column] = defaultdict(_Column)
    try:
        for record in read_records(path):
            done = record.pop("step") + 1
            for name, value in record.items():
                columns[name].steps.append(done)
                columns[name].values.append(math.nan if value is None else value)
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no metrics.jsonl; name the directory of a run that has begun") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not columns:
        raise InputError(f"{path} holds no step yet; wait for the run's first one")
    return {name: _series(path, name, column) for name, column in columns.items()}


def _series(path: Path, name: str, column: _Column) -> Series:
    steps = np.array(column.steps, np.int64)
    if np.any(np.diff(steps) < 0):
        raise InputError(f"{path}: the steps of {name} do not ascend; it is not the file of one run")
    return Series(steps, np.array(column.values, np.float64))
