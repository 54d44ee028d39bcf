"""Write and read metrics as JSON lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sophia_levanter.errors import InputError
from sophia_levanter.files import open_regular, write_atomically

MOST_LINE_BYTES = 1 << 24  # array statistics for 144 layers take 1.2 MB
MOST_STEPS = 2**31
LARGEST = 1e100  # far beyond the range of float32; plots cannot show much larger values


class JsonLines:
    """Appends metrics to a file, one JSON object per line. Non-finite numbers are written as null.

    Args:
        path: the file, which is created if it does not exist.
        first_step: the first step that will be logged. Lines for this step and later steps, left over from an attempt
            that died after its last checkpoint, are removed.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        if path.exists():
            kept = [line for line in lines_of(path) if _step_of(line) < first_step]
            write_atomically(path, b"".join(line.rstrip(b"\n") + b"\n" for line in kept))
        self._path = path
        self._file = path.open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step.

        Raises:
            OSError: if the metrics cannot be written, or the file has been removed or renamed.
        """
        self._check_not_removed()
        record = {"step": step} | {k: v if abs(v) <= LARGEST else None for k, v in metrics.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Block until all lines are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._check_not_removed()

    def close(self) -> None:
        with self._file:
            self.sync()

    def _check_not_removed(self) -> None:
        if not (os.fstat(self._file.fileno()).st_nlink and self._path.exists()):
            raise OSError(f"{self._path} was removed, renamed or replaced during the run")


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file written by `JsonLines`, with None for non-finite numbers.

    The last line is skipped if it is incomplete because the process was killed.

    Raises:
        InputError: if any other line is damaged.
        OSError: if the file cannot be read.
    """
    for number, line in enumerate(lines_of(path), start=1):
        try:
            record = _record_of(line)
        except ValueError:
            if not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES:
                return
            raise InputError(
                f"{path}: line {number} is damaged; remove that line, or restore the file from a backup"
            ) from None
        yield record


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a regular file, including their line endings. Lines longer than 16 MiB are split.

    Raises:
        OSError: if the file cannot be read.
    """
    with open_regular(path) as file:
        yield from iter(lambda: file.readline(MOST_LINE_BYTES), b"")


def _record_of(line: bytes) -> dict[str, Any]:
    """Parse a line. Raise `ValueError` if it is not a JSON object with a step and numbers."""
    try:
        record = json.loads(line)
        if type(record["step"]) is not int or not 0 <= record["step"] < MOST_STEPS:
            raise ValueError("the step is not a valid step number")
        found = {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}
        if any(value is not None and abs(value) > LARGEST for value in found.values()):
            raise ValueError("a number is too large")
        return found
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _step_of(line: bytes) -> float:
    """Return the step of a line, or infinity if the line cannot be parsed, for example because it is incomplete."""
    try:
        return _record_of(line)["step"]
    except ValueError:
        return math.inf
