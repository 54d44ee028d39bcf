"""Batches on their way from the corpus to the devices, ahead of the steps that need them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np

from sophia_levanter.batch import Batch, batch_from_windows
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.partition.mesh import Partition

READ_THREADS = 2
BATCHES_AHEAD = 2  # are on the devices, or on their way there


class Batches(Protocol):
    """Windows of a step; a pure function of the step."""

    def rows(self, step: int, wanted: np.ndarray, *, skipped_windows: int) -> np.ndarray:
        """int32 [batch, position + 1], in which only the `wanted` rows need be right."""
        ...


@dataclass(frozen=True)
class BatchLoader:
    """Puts batches on the devices; of several processes each reads only the rows that its own devices have.

    Attributes:
        batches: the windows.
        partition: the devices.
        config: the batch sizes, and into how many microbatches they fall.
        skipped_windows: of the order of the windows, that the run has passed over.
    """

    batches: Batches
    partition: Partition
    config: TrainerConfig
    skipped_windows: int = 0

    def load(self, step: int) -> Batch:
        """The batch of a step, [microbatch, batch, position], on the devices.

        Raises:
            InputError: if the corpus is damaged there.
        """
        trainer = self.config.at_step(int(step))
        size = trainer.batch_size // trainer.num_microbatches
        rows = self.partition.rows_of_this_process(size)
        wanted = (np.arange(trainer.num_microbatches)[:, None] * size + rows).ravel()
        windows = self.batches.rows(int(step), wanted, skipped_windows=self.skipped_windows)
        return self.partition.place(batch_from_windows(windows, num_microbatches=trainer.num_microbatches))

    def load_all(self, first: int, stop: int) -> Iterator[Batch]:
        """The batches of the steps in `[first, stop)`, of which the next few are loaded meanwhile."""
        steps = grain.MapDataset.range(first, stop).map(self.load)
        return iter(steps.to_iter_dataset(grain.ReadOptions(READ_THREADS, BATCHES_AHEAD)))
