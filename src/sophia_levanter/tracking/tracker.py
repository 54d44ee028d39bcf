"""What takes the numbers of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """A place that the numbers of a run's steps go to."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a step's metrics, by their names in metrics.jsonl; a step may come in several parts."""

    def close(self, *, failed: bool) -> None:
        """Return when all that was logged is where it belongs.

        Args:
            failed: whether the run ends with an error.
        """
