"""A run as its directory tells it: configuration, metrics, and what its newest checkpoint says."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sophia_levanter.checkpoint.manifest import Manifest
from sophia_levanter.comparison.runner import has_diverged
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import load_config
from sophia_levanter.config.optimizer import OptimizerConfig
from sophia_levanter.data.tokenizer import vocab_size_of
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.reporting.manifests import newest_manifest
from sophia_levanter.reporting.metrics import Series, read_metrics
from sophia_levanter.run.directory import RunDirectory
from sophia_levanter.run.summary import count_parameters
from sophia_levanter.training.costs import flops_per_step


@dataclass(frozen=True)
class Run:
    """A run that has begun.

    Attributes:
        name: for people.
        path: its directory.
        config: its configuration.
        series: what it has logged, by name.
        facts: of the newest checkpoint: `environment`, `data` and `validation`; empty without one.
        checkpoint: which that is, or why there is none.
        vocab_size: of the model, perhaps with its padding; None where neither tokenizer nor checkpoint tell.
        written_at: when its metrics were last written to, in seconds since 1970.
    """

    name: str
    path: Path
    config: TrainConfig
    series: Mapping[str, Series]
    facts: Mapping[str, Any]
    checkpoint: str
    vocab_size: int | None
    written_at: float

    @property
    def optimizer(self) -> str:
        return OptimizerConfig.get_choice_name(type(self.config.optimizer))

    @property
    def total_steps(self) -> int:
        return self.config.trainer.num_train_steps

    @cached_property
    def steps_done(self) -> int:
        return max(int(series.steps[-1]) for series in self.series.values())

    @property
    def is_finished(self) -> bool:
        return self.steps_done >= self.total_steps

    @cached_property
    def has_diverged(self) -> bool:
        """Whether its loss is far above where it was, or has not been finite for as long as a run may go on."""
        if "validation/loss" in self.series and not math.isfinite(self.series["validation/loss"].last):
            return True
        if "train/loss" not in self.series:
            return False
        losses = self.series["train/loss"].values
        recent = losses[-self.config.trainer.max_skipped_steps :]
        return not np.isfinite(recent).any() or has_diverged(losses.tolist())

    @property
    def seconds_since_written(self) -> float:
        return time.time() - self.written_at

    @cached_property
    def parameters(self) -> int | None:
        """Of the model, the padding of the vocabulary included."""
        if self.vocab_size is None:
            return None
        shapes = abstract_model(self.config.model, self.vocab_size)
        return count_parameters(shapes)

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Training tokens after so many steps, float64 [point]."""
        return self._spent(steps, [part.batch_size * self.config.model.seq_len for part in self.config.trainer.parts])

    def flops_at(self, steps: np.ndarray) -> np.ndarray | None:
        """FLOPs after so many steps, curvature and work on matrices counted, float64 [point]; None if not known."""
        return None if self._flops_of_steps is None else self._spent(steps, self._flops_of_steps)

    def seconds_at(self, steps: np.ndarray) -> np.ndarray | None:
        """Seconds of training after so many steps, float64 [point]; None if not known."""
        if self._clock is None:
            return None
        return np.interp(steps, *self._clock)

    @cached_property
    def rates(self) -> Series | None:
        """Tokens per second of the steps that took some time; None if there is none."""
        series = self.series.get("train/tokens_per_second")
        known = np.zeros(0, bool) if series is None else np.isfinite(series.values) & (series.values > 0)
        return Series(series.steps[known], series.values[known]) if series is not None and known.any() else None

    @cached_property
    def _clock(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Steps done, and the seconds that they took: without compiling, evaluations and saves."""
        rates = self.rates
        if rates is None:
            return None
        # Steps whose lines are missing, left on a disk that is gone, are taken for as fast as the next one.
        tokens = np.diff(self.tokens_at(np.append(0, rates.steps)))
        return np.append(0, rates.steps), np.append(0.0, np.cumsum(tokens / rates.values))

    @cached_property
    def _flops_of_steps(self) -> list[float] | None:
        """Of a step with each of the run's batch sizes."""
        if self.vocab_size is None:
            return None
        of_model = abstract_model(self.config.model, self.vocab_size).flops_per_token
        parts = self.config.trainer.parts
        return [flops_per_step(replace(self.config, trainer=part), of_model) for part in parts]

    def _spent(self, steps: np.ndarray, of_steps: Sequence[float]) -> np.ndarray:
        """The sum over the steps so far of what a step with each of the run's batch sizes takes."""
        changes = [step for step, _ in self.config.trainer.size_changes]
        starts = [0, *changes, max(self.total_steps, self.steps_done)]
        return np.interp(steps, starts, np.append(0.0, np.cumsum(np.array(of_steps) * np.diff(starts))))


def read_run(name: str, path: Path) -> Run:
    """Reads a run directory; a bucket that holds its checkpoints is not asked.

    Args:
        name: what to call the run.
        path: its directory.

    Raises:
        InputError: if it is no directory of a run that has begun.
    """
    directory = RunDirectory(path, "never")
    if not directory.config_file.is_file():
        raise InputError(f"{path} holds no config.yaml; name a run directory")
    config = load_config(directory.config_file)
    series = read_metrics(directory.metrics_file)
    manifest, found = newest_manifest(replace(directory, checkpoint_dir=config.trainer.checkpoint_dir))
    return Run(
        name=name,
        path=path,
        config=config,
        series=series,
        facts={} if manifest is None else manifest.metadata,
        checkpoint=found,
        vocab_size=_vocab_size(config, manifest),
        written_at=directory.metrics_file.stat().st_mtime,
    )


def _vocab_size(config: TrainConfig, manifest: Manifest | None) -> int | None:
    for array in manifest.arrays if manifest is not None else ():
        if array.path == "model.wte.weight":
            return array.shape[0]
    try:
        return vocab_size_of(config.data.tokenizer)
    except InputError:
        return None
