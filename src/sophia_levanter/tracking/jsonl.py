"""Metrics as JSON lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from sophia_levanter.files import write_atomically


class JsonLines:
    """Appends one JSON object a step to a file; a resumed run goes on where its checkpoint is.

    Non-finite numbers are written as null, since JSON has none.

    Args:
        path: the file; made if it is not there.
        first_step: lines of this step and later ones, left by a run that died after its last checkpoint, are dropped.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        if path.exists():
            kept = [
                line
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
                if _step_of(line) < first_step
            ]
            write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self._path = path
        self._file = path.open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step.

        Raises:
            OSError: if they cannot be written, or the file was removed or renamed: nobody would find them.
        """
        self._check_that_it_is_there()
        record = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Return when all lines are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._check_that_it_is_there()

    def close(self) -> None:
        with self._file:
            self.sync()

    def _check_that_it_is_there(self) -> None:
        if not (os.fstat(self._file.fileno()).st_nlink and self._path.exists()):
            raise OSError(f"{self._path} was removed, renamed or replaced while the run went on")


def _step_of(line: str) -> float:
    """The line's step; a line that a kill cut short is as good as from the future."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
