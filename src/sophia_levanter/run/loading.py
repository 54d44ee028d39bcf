"""Load a trained model from a run directory, checkpoints, a folder saved by transformers, or nanoGPT's ckpt.pt."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jmp
import numpy as np

from sophia_levanter import checkpoint
from sophia_levanter.checkpoint import CheckpointError, Manifest
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import build_config
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.files import Layer, Setting, flatten, read_layers
from sophia_levanter.config.model import ModelConfig
from sophia_levanter.config.run import check_parameters
from sophia_levanter.config.settings import free_settings
from sophia_levanter.data.bpe import bpe_file, ranks_of
from sophia_levanter.data.tokenizer import TRAINED_TOKENIZER, Tokenizer, load_tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.files import write_atomically
from sophia_levanter.interop.architectures import WeightsError
from sophia_levanter.interop.pretrained import check_vocabulary, read_pretrained
from sophia_levanter.interop.saved_weights import TOKENIZER_FILE, open_model
from sophia_levanter.kvstore import read_file, write_file
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.partition.mesh import Partition, partition_of
from sophia_levanter.partition.processes import check_agreement
from sophia_levanter.tracking.console import Console
from sophia_levanter.training.checkpoints import is_of_training

Overrides = Sequence[tuple[str, str]]
Report = Callable[[str], None]


@dataclass(frozen=True)
class LoadedModel:
    """A trained model on the devices.

    Attributes:
        model: the model, sharded by the partition, in `config.trainer.parameter_dtype`.
        config: the run's configuration with overrides; for models not from a run, the defaults with the model's shape.
        tokenizer: the tokenizer that the model was trained with.
        partition: the devices, and how arrays are sharded over them.
        source: a description of where the model was read from, for messages.
        step: the training step, or None if it is unknown.
    """

    model: LanguageModel
    config: TrainConfig
    tokenizer: Tokenizer
    partition: Partition
    source: str
    step: int | None

    @property
    def policy(self) -> jmp.Policy:
        """The dtypes of parameters and computations, the same as in training."""
        trainer = self.config.trainer
        return jmp.get_policy(f"params={trainer.parameter_dtype},compute={trainer.compute_dtype},output=float32")


def load_model(
    place: str, *, step: int | None = None, averaged: bool = False, overrides: Overrides = (), report: Report
) -> LoadedModel:
    """Load a model, sharded as specified by the `--mesh` overrides. By default, each device holds the whole model.

    Args:
        place: a run directory, a path or URL of checkpoints, a folder saved by transformers, or nanoGPT's `ckpt.pt`.
        step: the step of the checkpoint to load; by default, the newest intact checkpoint.
        averaged: whether to load the averaged weights of a run with `trainer.ema_decay` or `trainer.lawa_every`.
        overrides: dotted field paths and values, applied to the run's configuration after removing its mesh settings.
        report: prints a line for the user.

    Raises:
        InputError: if `place` contains no model, or the overrides do not fit the model.
        CheckpointError: if the requested checkpoint is damaged, or if all checkpoints are damaged.
    """
    if "://" not in place:
        place = os.path.abspath(os.path.expanduser(place))
        if not os.path.exists(place):
            raise InputError(
                f"{place} does not exist; specify a run directory, a folder saved by transformers, or nanoGPT's ckpt.pt"
            )
        if os.path.isfile(os.path.join(place, "config.yaml")):
            return _from_run(Path(place), Saved(step, averaged), overrides, report)
    if ("://" in place or os.path.isdir(place)) and checkpoint.steps(place):
        return _from_checkpoints(place, Saved(step, averaged), overrides, report)
    if "://" in place:
        raise InputError(f"{place} contains no checkpoint (no step-* folder)")
    if os.path.isdir(place) and not any(os.path.exists(os.path.join(place, n)) for n in ("config.json", "ckpt.pt")):
        raise InputError(
            f"{place} contains no model; expected a run's config.yaml, step-* checkpoints or a transformers config.json"
        )
    if step is not None:
        raise InputError(f"--step {step} cannot be combined with {place}, which is not a run directory")
    if averaged:
        raise InputError(f"--averaged cannot be combined with {place}, which is not a run directory")
    return _from_file(Path(place), overrides, report)


class Saved(NamedTuple):
    """The weights to load: the step of the checkpoint (None for the newest), and whether to load the average."""

    step: int | None
    averaged: bool


def _check_overrides(place: str, overrides: Overrides, allowed: Sequence[str]) -> None:
    for name, _ in overrides:
        if name.startswith("model.") and name not in allowed:
            raise InputError(f"--{name} cannot be combined with {place}, which determines the model's shape")


def _from_run(run_dir: Path, wanted: Saved, overrides: Overrides, report: Report) -> LoadedModel:
    config = _config(read_layers(run_dir / "config.yaml"), overrides)
    directory = config.trainer.checkpoint_dir or run_dir / "checkpoints"
    if not checkpoint.steps(directory):
        raise InputError(f"{run_dir}: the run has not saved a checkpoint (no step-* folder in {directory})")
    return _restored(directory, str(run_dir), config, wanted, overrides, report)


def _from_checkpoints(directory: str, wanted: Saved, overrides: Overrides, report: Report) -> LoadedModel:
    manifest = newest_manifest(directory, wanted.step)
    if manifest is None or not is_of_training(manifest.metadata):
        raise InputError(f"{directory} contains checkpoints that were not saved by a training run")
    saved: Any = manifest.metadata["config"]
    config = _config([flatten(saved, Path(directory))], overrides)
    return _restored(directory, directory, config, wanted, overrides, report)


def _restored(
    directory: Path | str, shown: str, config: TrainConfig, wanted: Saved, overrides: Overrides, report: Report
) -> LoadedModel:
    _check_overrides(shown, overrides, free_settings(config.model))
    if "data.tokenizer" not in dict(overrides):
        data = with_kept_tokenizer(config.data, directory, resuming=False)
        config = dataclasses.replace(config, data=data)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if wanted.averaged and not config.trainer.keeps_average:
        raise InputError(
            f"--averaged: {shown} has no averaged weights; only runs with trainer.ema_decay or trainer.lawa_every "
            "keep them"
        )
    _check_tokenizer(directory, shown, tokenizer, wanted.step)
    partition = _partition(config, tokenizer)
    policy = jmp.get_policy("float32" if wanted.averaged else config.trainer.parameter_dtype)

    def made() -> LanguageModel:
        model = config.model.build(vocab_size=tokenizer.vocab_size, key=jax.random.key(0))
        return policy.cast_to_param(model)

    part = "average" if wanted.averaged else "model"
    like = {part: partition.abstract(made)}
    restored = checkpoint.restore(directory, like, report=report, step=wanted.step, cast=True, partial=True)
    source = f"step {restored.step:,} of {shown}" + (", averaged weights" if wanted.averaged else "")
    return LoadedModel(restored.tree[part], config, tokenizer, partition, source, restored.step)


def _check_tokenizer(directory: Path | str, shown: str, tokenizer: Tokenizer, step: int | None) -> None:
    """Check the tokenizer before restoring anything, because a wrong tokenizer may have the same vocabulary size."""
    manifest = newest_manifest(directory, step)
    if manifest is not None and not is_of_training(manifest.metadata):
        raise InputError(f"{directory} contains checkpoints that were not saved by a training run")
    trained_with: Any = None if manifest is None else manifest.metadata["validation"]
    if trained_with is not None and trained_with["tokenizer"] != tokenizer.fingerprint:
        raise InputError(
            f"data.tokenizer {tokenizer.name} differs from the one that {shown} was trained with; "
            "specify the original tokenizer with --data.tokenizer"
        )


def newest_manifest(directory: Path | str, step: int | None = None) -> Manifest | None:
    """Return the manifest of `step` or, by default, the newest readable manifest. Return None if it cannot be read."""
    for candidate in reversed(checkpoint.steps(directory)) if step is None else [step]:
        try:
            return checkpoint.read_step(directory, candidate)
        except CheckpointError:
            continue
    return None


def _from_file(path: Path, overrides: Overrides, report: Report) -> LoadedModel:
    saved = open_model(path)
    kind = ModelConfig.get_choice_name(saved.architecture.config_class)
    fields = {"type": kind, "seq_len": saved.seq_len, **saved.fields}
    shape = {f"model.{name}": Setting(value, path) for name, value in fields.items()}
    config = _config([shape, {"data.tokenizer": Setting(saved.tokenizer or "gpt2", path)}], overrides)
    free = {"model.seq_len", "model.vocab_rows"} - {f"model.{name}" for name in saved.fields}
    _check_overrides(str(path), overrides, [*free_settings(config.model), *free])
    tokenizer = load_tokenizer(config.data.tokenizer)
    weights = read_pretrained(str(path), config.model, tokenizer, dtype=config.trainer.parameter_dtype, report=report)
    check_vocabulary(str(path), tokenizer)
    config = dataclasses.replace(config, model=weights.config)
    partition = _partition(config, tokenizer)
    return LoadedModel(partition.place(weights), config, tokenizer, partition, str(path), None)


def _config(layers: Sequence[Layer], overrides: Overrides) -> TrainConfig:
    """Build a configuration with overrides, dropping the mesh and `trainer.best_by`, which may not apply here."""
    kept = [
        {name: value for name, value in layer.items() if not name.startswith("mesh.") and name != "trainer.best_by"}
        for layer in layers
    ]
    return build_config(kept, {name: Setting(value) for name, value in overrides})


def _partition(config: TrainConfig, tokenizer: Tokenizer) -> Partition:
    partition = partition_of(config.mesh)
    check_parameters(config, partition.mesh.size, tokenizer.vocab_size)
    return partition


def keep_tokenizer(checkpoints: Path | str, tokenizer: Tokenizer, *, is_saved: bool) -> None:
    """Copy the tokenizer to the checkpoint folder if the tokenizer is a file. Other tokenizers need no copy.

    Args:
        checkpoints: the path or URL of the checkpoint folder.
        tokenizer: the run's tokenizer.
        is_saved: whether checkpoints exist. If so, an existing copy is kept; otherwise, it is replaced.

    Raises:
        InputError: if the copy cannot be written.
    """
    if not tokenizer.name.endswith(TRAINED_TOKENIZER):
        return
    try:
        if not is_saved or read_file(checkpoints, TOKENIZER_FILE) is None:
            write_file(checkpoints, TOKENIZER_FILE, bpe_file(ranks_of(tokenizer)))
    except Exception as error:  # the bucket client raises many kinds of errors
        raise _unusable(checkpoints, error) from error


def with_kept_tokenizer(data: DataConfig, checkpoints: Path | str, *, resuming: bool) -> DataConfig:
    """Return the configuration with the tokenizer file replaced by its copy in the checkpoint folder, if one exists.

    Args:
        data: the data configuration. Its tokenizer file may no longer exist.
        checkpoints: the path or URL of the checkpoint folder. A copy in a bucket is downloaded to a temporary folder.
        resuming: whether a run is resuming. If so, the original file must be unchanged.

    Raises:
        InputError: if the original has changed, or the copy cannot be read.
    """
    if not data.tokenizer.endswith(TRAINED_TOKENIZER):
        return data
    try:
        content = read_file(checkpoints, TOKENIZER_FILE)
    except Exception as error:  # the bucket client raises many kinds of errors
        raise _unusable(checkpoints, error) from error
    if content is None:
        return data
    copy = Path(checkpoints, TOKENIZER_FILE)
    if "://" in str(checkpoints):
        copy = Path(_temporary_folder().name, TOKENIZER_FILE)
        write_atomically(copy, content)
    if resuming and os.path.exists(data.tokenizer):
        then, now = (load_tokenizer(str(file)).fingerprint for file in (copy, data.tokenizer))
        if then != now:
            raise InputError(
                f"data.tokenizer {data.tokenizer} differs from the one that the run began with, saved as "
                f"{checkpoints}/{TOKENIZER_FILE}; restore the original file, or move this one elsewhere to use the copy"
            )
    return dataclasses.replace(data, tokenizer=str(copy))


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Create a folder that is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="sophia_levanter-")


def _unusable(checkpoints: Path | str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(
        f"data.tokenizer: {checkpoints}/{TOKENIZER_FILE} cannot be used: {reason}; check that its folder is accessible"
    )


def read_initial_weights(config: TrainConfig, console: Console) -> LanguageModel | None:
    """Read a run's initial weights into host memory. Return None if the run starts from random weights.

    Raises:
        InputError: if the weights cannot be read, do not fit the model, or differ between processes.
    """
    path = config.trainer.initial_weights
    if path is None:
        return None
    tokenizer = load_tokenizer(config.data.tokenizer)
    try:
        weights = read_pretrained(
            path, config.model, tokenizer, dtype=config.trainer.parameter_dtype, report=console.line
        )
        check_vocabulary(path, tokenizer)
    except WeightsError as error:
        raise InputError(f"trainer.initial_weights {error}") from None
    console.line(f"initial weights: {path}")
    if jax.process_count() > 1:
        check_agreement("trainer.initial_weights", _digest(weights))
    return weights


def _digest(weights: LanguageModel) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in jax.tree.leaves(weights):
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
