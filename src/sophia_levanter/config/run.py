"""The complete configuration of a training run, including its `tracking` section. This module does not import jax."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, ClassVar

import sophia_levanter.config.baselines  # noqa: F401  # registers the baseline optimizers
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.mesh import MeshConfig, check_divides, nearest_multiple
from sophia_levanter.config.model import Gpt2Config, ModelConfig, pad_vocab
from sophia_levanter.config.optimizer import OptimizerConfig, SophiaGConfig
from sophia_levanter.config.settings import Settings, setting, steps_of
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError, Problems

# wandb's restrictions on project names.
_NOT_IN_A_PROJECT = "/\\#?%:"
_LONGEST_NAME = 128


@dataclass(frozen=True)
class TrackingConfig(Settings):
    """Where to log metrics in addition to metrics.jsonl, which is always written.

    Raises:
        InputError: if a value is invalid.
    """

    section: ClassVar[str] = "tracking"

    wandb: str | None = setting(
        None,
        "log to Weights & Biases; offline writes to RUN_DIR/wandb for a later `wandb sync`",
        choices=("online", "offline"),
    )
    wandb_project: str = setting("sophia_levanter", "W&B project")
    wandb_entity: str | None = setting(None, "W&B user or team; defaults to the account's default entity")
    wandb_name: str | None = setting(None, "W&B run name; defaults to the run directory's name")
    wandb_group: str | None = setting(None, "W&B group for the run")
    tensorboard: bool = setting(False, "write TensorBoard event files to RUN_DIR/tensorboard")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("wandb_project", "wandb_entity", "wandb_name", "wandb_group"):
            value = getattr(self, name)
            if value is not None and not 0 < len(value.strip()) <= len(value) <= _LONGEST_NAME:
                raise InputError(f"tracking.{name} is {value!r}; it must be 1 to {_LONGEST_NAME} characters long")
        if found := [char for char in self.wandb_project if char in _NOT_IN_A_PROJECT]:
            raise InputError(
                f"tracking.wandb_project is {self.wandb_project!r}; a project name cannot contain {found[0]!r}"
            )


def check_installed(config: TrackingConfig) -> None:
    """Check that the packages required by the tracking settings are installed.

    Raises:
        InputError: if a package is missing.
    """
    if config.wandb is not None:
        _check_package("wandb", f"tracking.wandb is {config.wandb!r}", "wandb")
    if config.tensorboard:
        _check_package("tensorboardX", "tracking.tensorboard is true", "tensorboard")


def _check_package(package: str, setting: str, extra: str) -> None:
    spec = find_spec(package)
    # wandb creates a folder named wandb in the working directory. `find_spec` also finds it, but without an origin.
    if spec is None or spec.origin is None:
        raise InputError(f"{setting}, but {package} is not installed; run pip install 'sophia-levanter[{extra}]'")


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a training run.

    Raises:
        InputError: if the sections are inconsistent with each other.
    """

    plugins: tuple[str, ...] = setting((), "Python modules to import first, such as those that register models")
    model: ModelConfig = field(default_factory=Gpt2Config)
    optimizer: OptimizerConfig = field(default_factory=SophiaGConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        self.optimizer.check_run(self.trainer)
        sets, best_by = self.data.validation_sets, self.trainer.best_by
        if best_by is not None and best_by not in sets:
            named = [name for name in sets if name]
            hint = f"valid sets are {', '.join(named)}" if named else "specify sets as NAME: SOURCE, or omit best_by"
            raise InputError(f"trainer.best_by is {best_by!r}, which is not a set in data.validation; {hint}")
        if self.mesh.coordinator is not None and self.trainer.run_dir is None:
            raise InputError("trainer.run_dir is missing; with mesh.coordinator, all processes must use the same one")


def with_steps(config: TrainConfig) -> TrainConfig:
    """Replace the fractions in a configuration with the resulting step counts and final learning rate."""
    trainer, optimizer = config.trainer, config.optimizer
    intervals: dict[str, Any] = {
        "evaluate_every": trainer.evaluation_interval,
        "tasks_every": trainer.tasks_interval,
        "checkpoint_every": trainer.checkpoint_interval,
        "log_every": trainer.log_interval,
        "lawa_every": trainer.lawa_interval,
        "statistics_every": trainer.statistics_interval,
    }
    schedule: dict[str, Any] = {
        "warmup": steps_of(optimizer.warmup, trainer.num_train_steps),
        "final_learning_rate": optimizer.last_learning_rate,
        "final_fraction": type(optimizer).final_fraction,
    }
    return replace(config, trainer=replace(trainer, **intervals), optimizer=replace(optimizer, **schedule))


def check_mesh(config: TrainConfig, num_devices: int, vocab_size: int | None = None) -> None:
    """Check that the model's axes and the batches can be sharded over the mesh. All problems are reported together.

    Args:
        config: the run's configuration.
        num_devices: the number of devices.
        vocab_size: number of tokens in the tokenizer; None if not known yet.

    Raises:
        InputError: if a size is not divisible; the message names each field, its mesh axes and a valid size.
    """
    trainer, mesh, problems = config.trainer, config.mesh, Problems()
    sizes = mesh.sizes(num_devices)
    with problems:
        check_parameters(config, num_devices, vocab_size)
    for part in trainer.parts:
        batch = ("trainer.batch_size", part.batch_size)
        rows = {"trainer.microbatch_size": part.gradient_microbatch_size}
        if (curvature := config.optimizer.curvature_microbatches(part)) is not None:
            rows["optimizer.curvature_microbatch_size"] = curvature[1]
        with problems:
            check_divides(sizes, mesh.compute_mapping, {"batch": batch})
        fitting = (batch[0], nearest_multiple(batch[1], sizes["replica"] * sizes["data"]))
        seen = {part.batch_size}
        for row in rows.items():
            if row[1] not in seen:
                with problems:
                    check_divides(sizes, mesh.compute_mapping, {"batch": row}, of=fitting)
            seen.add(row[1])
    problems.report()


def check_parameters(config: TrainConfig, num_devices: int, vocab_size: int | None = None) -> None:
    """Run only the checks in `check_mesh` that concern the model."""
    model, mesh = config.model, config.mesh
    axes = model.axis_sizes()
    if vocab_size is not None:
        rows = model.embedding_rows(vocab_size)
        if model.vocab_rows not in (None, rows):
            raise InputError(
                f"model.vocab_rows {model.vocab_rows} is less than the {vocab_size} tokens in data.tokenizer "
                f"{config.data.tokenizer}; omit it, or set it to at least {vocab_size}"
            )
        axes["vocab"] = (f"padded vocabulary size (data.tokenizer {config.data.tokenizer})", pad_vocab(rows))
    check_divides(mesh.sizes(num_devices), mesh.parameter_mapping, axes)
