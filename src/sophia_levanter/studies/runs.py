"""Read a run from its directory: the configuration, the metrics, and the metadata of the newest checkpoint."""

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
from sophia_levanter.models.language_model import abstract_model, count_parameters
from sophia_levanter.run.directory import RunDirectory
from sophia_levanter.tracking.jsonl import read_records
from sophia_levanter.training.costs import flops_per_step

# A run has diverged if the mean loss over its last DIVERGED_STEPS steps is DIVERGED_NATS above the lowest such mean.
DIVERGED_NATS, DIVERGED_STEPS = 1.0, 50
FACTS = ("environment", "data", "validation")  # sections in the checkpoint metadata of a training run


@dataclass(frozen=True)
class Series:
    """The values that a run has logged for one metric.

    Attributes:
        steps: int64 [point], the number of completed steps when each value was logged, in ascending order.
        values: float64 [point], the logged values; NaN for values that were not finite.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class Run:
    """The configuration, metrics and metadata of a run that has started.

    Attributes:
        name: the display name of the run.
        path: the run directory.
        config: the run's configuration.
        series: the logged metrics, keyed by name.
        facts: metadata of the newest intact checkpoint, such as `environment`, `data` and `validation`; empty if there
            is none.
        checkpoint: a description of that checkpoint, or the reason why there is none.
        parameters: number of parameters, including vocabulary padding; None if the vocabulary size cannot be determined
            from a checkpoint or the tokenizer.
        flops_per_token: FLOPs per token for the forward and backward pass; None if `parameters` is None.
        written_at: the time at which the metrics were last written, in seconds since 1970.
        has_damaged_checkpoint: whether a checkpoint newer than the one described is damaged.
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
        """Whether the loss rose far above its minimum, or no loss in the last `max_skipped_steps` steps is finite."""
        if "validation/loss" in self.series and not math.isfinite(self.series["validation/loss"].last):
            return True
        if "train/loss" not in self.series:
            return False
        losses = self.series["train/loss"].values
        recent = losses[-self.config.trainer.max_skipped_steps :]
        return not np.isfinite(recent).any() or has_diverged(losses.tolist())

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Return the training tokens used after the given numbers of steps: float64 [point]."""
        return self._spent(steps, [part.batch_size * self.config.model.seq_len for part in self.config.trainer.parts])

    def flops_at(self, steps: np.ndarray) -> np.ndarray | None:
        """Return the FLOPs used after the given numbers of steps as float64 [point], or None if unknown.

        They include the curvature and whole-matrix operations.
        """
        return None if self._flops_of_steps is None else self._spent(steps, self._flops_of_steps)

    def seconds_at(self, steps: np.ndarray) -> np.ndarray | None:
        """Return the seconds of training after the given numbers of steps as float64 [point], or None if unknown."""
        return None if self._clock is None else np.interp(steps, *self._clock)

    @cached_property
    def rates(self) -> Series | None:
        """Tokens per second in steps with a finite, positive rate, or None if there are no such steps."""
        series = self.series.get("train/tokens_per_second")
        known = np.zeros(0, bool) if series is None else np.isfinite(series.values) & (series.values > 0)
        return Series(series.steps[known], series.values[known]) if series is not None and known.any() else None

    @cached_property
    def _clock(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Step counts and cumulative training times in seconds, excluding compilation, evaluations and saves."""
        rates = self.rates
        if rates is None:
            return None
        # A step whose rate is missing from the metrics is assumed to be as fast as the next step with a rate.
        tokens = np.diff(self.tokens_at(np.append(0, rates.steps)))
        return np.append(0, rates.steps), np.append(0.0, np.cumsum(tokens / rates.values))

    @cached_property
    def _flops_of_steps(self) -> list[float] | None:
        """FLOPs per step for each batch size of the run."""
        if self.flops_per_token is None:
            return None
        parts = self.config.trainer.parts
        return [flops_per_step(replace(self.config, trainer=part), self.flops_per_token) for part in parts]

    def _spent(self, steps: np.ndarray, of_steps: Sequence[float]) -> np.ndarray:
        """Return the total cost after the given numbers of steps, given the cost per step for each batch size."""
        changes = [step for step, _ in self.config.trainer.size_changes]
        starts = [0, *changes, max(self.total_steps, self.steps_done)]
        return np.interp(steps, starts, np.append(0.0, np.cumsum(np.array(of_steps) * np.diff(starts))))


def read_run(name: str, path: Path) -> Run:
    """Read a run directory. Checkpoints in a bucket are not read.

    Args:
        name: the display name of the run.
        path: the run directory.

    Raises:
        InputError: if `path` is not the directory of a run that has started.
    """
    config_file = RunDirectory(path, "never").config_file
    if not config_file.is_file():
        raise InputError(f"{path} contains no config.yaml; specify a run directory")
    run = read_files(name, path, load_config(config_file))
    if not run.series:
        raise InputError(f"{path / 'metrics.jsonl'} contains no steps yet; wait for the run's first step")
    return run


def read_files(name: str, path: Path, config: TrainConfig) -> Run:
    """Read the files of a run with the given configuration. The run need not have logged any steps.

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
    """Read the `metrics.jsonl` of a run. An incomplete last line, left over from a killed run, is ignored.

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
                    name = name.replace(".", "/")  # older versions separated the parts of array paths with dots
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
    """Return whether the mean training loss over the last steps is far above the lowest earlier mean.

    Non-finite losses are ignored, because a run ends by itself after many consecutive non-finite losses.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    means = [
        statistics.fmean(finite[i : i + DIVERGED_STEPS])
        for i in range(0, len(finite) - DIVERGED_STEPS + 1, DIVERGED_STEPS)
    ]
    return len(means) > 1 and means[-1] > min(means) + DIVERGED_NATS


def _newest_manifest(directory: RunDirectory) -> tuple[Manifest | None, str, bool]:
    """Return the manifest and a description of the newest intact checkpoint, and whether a newer one is damaged."""
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
    """Determine the vocabulary size, possibly padded, from the checkpoint or the tokenizer. Return None if unknown."""
    for saved in manifest.arrays if manifest is not None else ():
        if saved.path == "model.wte.weight":
            return saved.shape[0]
    try:
        return vocab_size_of(config.data.tokenizer)
    except InputError:
        return None
