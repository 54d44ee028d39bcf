"""A run as its directory tells it: configuration, metrics, and what its newest checkpoint says."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sophia_levanter import checkpoint
from sophia_levanter.checkpoint import CheckpointError, Manifest
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import load_config
from sophia_levanter.config.optimizer import OptimizerConfig
from sophia_levanter.data.tokenizer import vocab_size_of
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.run.directory import RunDirectory
from sophia_levanter.run.summary import count_parameters
from sophia_levanter.tracking.jsonl import read_records
from sophia_levanter.training.costs import flops_per_step

# A run whose training loss is this many nats above its lowest, over as many steps, will not come back in time.
DIVERGED_NATS, DIVERGED_STEPS = 1.0, 50
FACTS = ("environment", "data", "validation")  # in the metadata of a training run's checkpoint


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
        parameters: of the model, the padding of the vocabulary included; None where neither tokenizer nor checkpoint
            tells the vocabulary's size.
        flops_per_token: of the model's forward and backward pass; None in the same case.
        written_at: when its metrics were last written to, in seconds since 1970.
    """

    name: str
    path: Path
    config: TrainConfig
    series: Mapping[str, Series]
    facts: Mapping[str, Any]
    checkpoint: str
    parameters: int | None
    flops_per_token: float | None
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

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Training tokens after so many steps, float64 [point]."""
        return self._spent(steps, [part.batch_size * self.config.model.seq_len for part in self.config.trainer.parts])

    def flops_at(self, steps: np.ndarray) -> np.ndarray | None:
        """FLOPs after so many steps, curvature and work on matrices counted, float64 [point]; None if not known."""
        return None if self._flops_of_steps is None else self._spent(steps, self._flops_of_steps)

    def seconds_at(self, steps: np.ndarray) -> np.ndarray | None:
        """Seconds of training after so many steps, float64 [point]; None if not known."""
        return None if self._clock is None else np.interp(steps, *self._clock)

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
        if self.flops_per_token is None:
            return None
        parts = self.config.trainer.parts
        return [flops_per_step(replace(self.config, trainer=part), self.flops_per_token) for part in parts]

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
    config_file = RunDirectory(path, "never").config_file
    if not config_file.is_file():
        raise InputError(f"{path} holds no config.yaml; name a run directory")
    run = read_files(name, path, load_config(config_file))
    if not run.series:
        raise InputError(f"{path / 'metrics.jsonl'} holds no step yet; wait for the run's first one")
    return run


def read_files(name: str, path: Path, config: TrainConfig) -> Run:
    """What a run of this configuration has left in its directory; it need not have logged a step.

    Raises:
        InputError: if its metrics are missing or damaged.
    """
    directory = RunDirectory(path, "never", config.trainer.checkpoint_dir)
    series = read_metrics(directory.metrics_file)
    manifest, found = _newest_manifest(directory)
    vocab_size = _vocab_size(config, manifest)
    model = None if vocab_size is None else abstract_model(config.model, vocab_size)
    return Run(
        name=name,
        path=path,
        config=config,
        series=series,
        facts={} if manifest is None else manifest.metadata,
        checkpoint=found,
        parameters=None if model is None else count_parameters(model),
        flops_per_token=None if model is None else model.flops_per_token,
        written_at=directory.metrics_file.stat().st_mtime,
    )


def read_metrics(path: Path) -> dict[str, Series]:
    """Reads a run's `metrics.jsonl`; a last line that is cut short, as a kill leaves it, is not there.

    Returns:
        A series for each name.

    Raises:
        InputError: if the file is missing or damaged.
    """
    steps: dict[str, array] = defaultdict(lambda: array("q"))
    values: dict[str, array] = defaultdict(lambda: array("d"))
    try:
        for record in read_records(path):
            done = record.pop("step") + 1
            for name, value in record.items():
                steps[name].append(done)
                values[name].append(math.nan if value is None else value)
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no metrics.jsonl; name the directory of a run that has begun") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    for name in steps:
        if np.any(np.diff(steps[name]) < 0):
            raise InputError(f"{path}: the steps of {name} are not ascending; the file mixes several runs")
    return {name: Series(np.array(steps[name], np.int64), np.array(values[name], np.float64)) for name in steps}


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the mean training loss of the last steps is far above the lowest mean before.

    A single step whose loss is not finite changes nothing, and many in a row end the run by themselves.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    means = [
        statistics.fmean(finite[i : i + DIVERGED_STEPS])
        for i in range(0, len(finite) - DIVERGED_STEPS + 1, DIVERGED_STEPS)
    ]
    return len(means) > 1 and means[-1] > min(means) + DIVERGED_NATS


def _newest_manifest(directory: RunDirectory) -> tuple[Manifest | None, str]:
    """The manifest of the newest checkpoint that is whole and a training run's; and in words, where it was found."""
    location = str(directory.checkpoints)
    if "://" in location:
        return None, f"not looked at: {location}"
    damaged: list[str] = []
    for step in reversed(checkpoint.steps(location)):
        try:
            manifest = checkpoint.read_step(location, step)
        except (CheckpointError, InputError):
            damaged.append(f"step {step} is damaged")
            continue
        if all(isinstance(manifest.metadata.get(name), dict) for name in FACTS):
            return manifest, "; ".join([*damaged, f"step {step}"])
        damaged.append(f"step {step} is not a training run's")
    return None, "; ".join(damaged) or "none yet"


def _vocab_size(config: TrainConfig, manifest: Manifest | None) -> int | None:
    """Of the model, perhaps with its padding; None where neither tokenizer nor checkpoint tells it."""
    for saved in manifest.arrays if manifest is not None else ():
        if saved.path == "model.wte.weight":
            return saved.shape[0]
    try:
        return vocab_size_of(config.data.tokenizer)
    except InputError:
        return None
