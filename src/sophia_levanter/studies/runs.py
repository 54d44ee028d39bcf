"""Read a run from its directory: the configuration, the metrics, and facts from the newest checkpoint."""

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
from sophia_levanter.config.registries import STATISTICS
from sophia_levanter.data.tokenizer import vocab_size_of
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.run.directory import RunDirectory
from sophia_levanter.run.summary import count_parameters
from sophia_levanter.tracking.jsonl import read_records
from sophia_levanter.training.costs import flops_per_step

# A run has diverged if its mean loss over DIVERGED_STEPS steps is more than DIVERGED_NATS above the lowest such mean.
DIVERGED_NATS, DIVERGED_STEPS = 1.0, 50
FACTS = ("environment", "data", "validation")  # in the metadata of a training run's checkpoint


@dataclass(frozen=True)
class Series:
    """The numbers that a run has logged under one name.

    Attributes:
        steps: the number of steps done when each number was logged, int64 [point], ascending.
        values: the numbers, float64 [point]; NaN for a number that was not finite.
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
        name: the run's name, for people.
        path: the run directory.
        config: the configuration.
        series: the logged numbers, keyed by name.
        facts: metadata of the newest checkpoint, such as `environment`, `data` and `validation`; empty without a
            checkpoint.
        checkpoint: a description of that checkpoint, or of why there is none.
        parameters: number of parameters, including the padding of the vocabulary; None if neither the tokenizer nor a
            checkpoint provides the vocabulary size.
        flops_per_token: FLOPs per token for the forward and backward pass; None in the same case.
        written_at: the time when the metrics were last written, in seconds since 1970.
        has_damaged_checkpoint: whether a newer checkpoint than that one is damaged.
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
    has_damaged_checkpoint: bool = False

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
        """Whether the loss is far above its lowest, or was not finite in the last `trainer.max_skipped_steps` steps."""
        if "validation/loss" in self.series and not math.isfinite(self.series["validation/loss"].last):
            return True
        if "train/loss" not in self.series:
            return False
        losses = self.series["train/loss"].values
        recent = losses[-self.config.trainer.max_skipped_steps :]
        return not np.isfinite(recent).any() or has_diverged(losses.tolist())

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Training tokens after the given numbers of steps: float64 [point]."""
        return self._spent(steps, [part.batch_size * self.config.model.seq_len for part in self.config.trainer.parts])

    def flops_at(self, steps: np.ndarray) -> np.ndarray | None:
        """FLOPs after the given numbers of steps: float64 [point]; None if unknown.

        They include the curvature and work on matrices.
        """
        return None if self._flops_of_steps is None else self._spent(steps, self._flops_of_steps)

    def seconds_at(self, steps: np.ndarray) -> np.ndarray | None:
        """Seconds of training after the given numbers of steps: float64 [point]; None if unknown."""
        return None if self._clock is None else np.interp(steps, *self._clock)

    @cached_property
    def rates(self) -> Series | None:
        """Tokens per second in the steps with a finite, positive rate; None if there are no such steps."""
        series = self.series.get("train/tokens_per_second")
        known = np.zeros(0, bool) if series is None else np.isfinite(series.values) & (series.values > 0)
        return Series(series.steps[known], series.values[known]) if series is not None and known.any() else None

    @cached_property
    def _clock(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Steps done, and the seconds that they took, excluding compilation, evaluations and saves."""
        rates = self.rates
        if rates is None:
            return None
        # Steps whose rate was not logged or was lost with a disk are assumed to be as fast as the next logged step.
        tokens = np.diff(self.tokens_at(np.append(0, rates.steps)))
        return np.append(0, rates.steps), np.append(0.0, np.cumsum(tokens / rates.values))

    @cached_property
    def _flops_of_steps(self) -> list[float] | None:
        """FLOPs per step for each of the run's batch sizes."""
        if self.flops_per_token is None:
            return None
        parts = self.config.trainer.parts
        return [flops_per_step(replace(self.config, trainer=part), self.flops_per_token) for part in parts]

    def _spent(self, steps: np.ndarray, of_steps: Sequence[float]) -> np.ndarray:
        """The total cost after the given numbers of steps. `of_steps` is the cost of a step for each batch size."""
        changes = [step for step, _ in self.config.trainer.size_changes]
        starts = [0, *changes, max(self.total_steps, self.steps_done)]
        return np.interp(steps, starts, np.append(0.0, np.cumsum(np.array(of_steps) * np.diff(starts))))


def read_run(name: str, path: Path) -> Run:
    """Read a run directory. Checkpoints in a bucket are not read.

    Args:
        name: the run's name, for people.
        path: the run directory.

    Raises:
        InputError: if `path` is not the directory of a run that has begun.
    """
    config_file = RunDirectory(path, "never").config_file
    if not config_file.is_file():
        raise InputError(f"{path} contains no config.yaml; specify a run directory")
    run = read_files(name, path, load_config(config_file))
    if not run.series:
        raise InputError(f"{path / 'metrics.jsonl'} contains no steps yet; wait for the run's first step")
    return run


def read_files(name: str, path: Path, config: TrainConfig) -> Run:
    """Read the files of a run with the given configuration. The run need not have logged a step.

    Raises:
        InputError: if the metrics are missing or damaged.
    """
    directory = RunDirectory(path, "never", config.trainer.checkpoint_dir)
    series = read_metrics(directory.metrics_file)
    manifest, found, has_damaged = _newest_manifest(directory)
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
        has_damaged_checkpoint=has_damaged,
    )


def read_metrics(path: Path) -> dict[str, Series]:
    """Read a run's `metrics.jsonl`. An incomplete last line, as left by a killed run, is ignored.

    Returns:
        The series, keyed by name.

    Raises:
        InputError: if the file is missing or damaged.
    """
    steps: dict[str, array] = defaultdict(lambda: array("q"))
    values: dict[str, array] = defaultdict(lambda: array("d"))
    try:
        for record in read_records(path):
            done = record.pop("step") + 1
            for name, value in record.items():
                if name.startswith(f"{STATISTICS}/"):
                    name = name.replace(".", "/")  # older versions joined the parts of an array's path with dots
                steps[name].append(done)
                values[name].append(math.nan if value is None else value)
    except FileNotFoundError:
        raise InputError(
            f"{path.parent} contains no metrics.jsonl; specify the directory of a run that has started"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    for name in steps:
        if np.any(np.diff(steps[name]) < 0):
            raise InputError(f"{path}: the steps of {name} are not ascending; the file mixes metrics from several runs")
    return {name: Series(np.array(steps[name], np.int64), np.array(values[name], np.float64)) for name in steps}


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the mean training loss over the last steps is far above the lowest earlier mean.

    Losses that are not finite are ignored, because a run ends on its own after many of them in a row.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    means = [
        statistics.fmean(finite[i : i + DIVERGED_STEPS])
        for i in range(0, len(finite) - DIVERGED_STEPS + 1, DIVERGED_STEPS)
    ]
    return len(means) > 1 and means[-1] > min(means) + DIVERGED_NATS


def _newest_manifest(directory: RunDirectory) -> tuple[Manifest | None, str, bool]:
    """The manifest of a run's newest intact checkpoint, a description of it, and whether a newer one is damaged."""
    location = str(directory.checkpoints)
    if "://" in location:
        return None, f"not checked: {location}", False
    skipped: list[str] = []
    has_damaged = False
    for step in reversed(checkpoint.steps(location)):
        try:
            manifest = checkpoint.read_step(location, step)
        except (CheckpointError, InputError):
            skipped.append(f"step {step} is damaged")
            has_damaged = True
            continue
        if all(isinstance(manifest.metadata.get(name), dict) for name in FACTS):
            return manifest, "; ".join([*skipped, f"step {step}"]), has_damaged
        skipped.append(f"step {step} was not saved by a training run")
    return None, "; ".join(skipped) or "none yet", has_damaged


def _vocab_size(config: TrainConfig, manifest: Manifest | None) -> int | None:
    """The vocabulary size, possibly with padding; None if neither the checkpoint nor the tokenizer provides it."""
    for saved in manifest.arrays if manifest is not None else ():
        if saved.path == "model.wte.weight":
            return saved.shape[0]
    try:
        return vocab_size_of(config.data.tokenizer)
    except InputError:
        return None
