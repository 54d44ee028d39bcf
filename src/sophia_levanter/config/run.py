"""The whole configuration of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.mesh import MeshConfig, check_divides
from sophia_levanter.config.model import Gpt2Config, ModelConfig, pad_vocab
from sophia_levanter.config.optimizer import OptimizerConfig, SophiaGConfig
from sophia_levanter.config.settings import setting
from sophia_levanter.config.tracking import TrackingConfig
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """What `python -m sophia_levanter.main` trains, and how.

    Raises:
        InputError: if the parts do not fit each other.
    """

    plugins: tuple[str, ...] = setting((), "Python modules to import first, for what they register")
    model: ModelConfig = field(default_factory=Gpt2Config)
    optimizer: OptimizerConfig = field(default_factory=SophiaGConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        self.optimizer.check_run(self.trainer)
        if self.mesh.coordinator is not None and self.trainer.run_dir is None:
            raise InputError("trainer.run_dir is missing; the processes of mesh.coordinator must agree on it")


def check_mesh(config: TrainConfig, num_devices: int, vocab_size: int | None = None) -> None:
    """Refuse a model or a batch that does not divide over the mesh.

    Args:
        config: the run.
        num_devices: that there are.
        vocab_size: of the tokenizer; None if it is not known yet.

    Raises:
        InputError: names the field, what it is split over and a size that would do.
    """
    check_parameters(config, num_devices, vocab_size)
    trainer, mesh = config.trainer, config.mesh
    sizes = mesh.sizes(num_devices)
    for part in trainer.parts:
        check_divides(sizes, mesh.compute_mapping, {"batch": ("trainer.batch_size", part.batch_size)})
    for part in trainer.parts:
        rows = [("trainer.microbatch_size", part.microbatch_size or part.batch_size)]
        if (curvature := config.optimizer.curvature_microbatches(part)) is not None:
            rows.append(("optimizer.curvature_microbatch_size", curvature[1]))
        for row in rows:
            check_divides(sizes, mesh.compute_mapping, {"batch": row}, of=("trainer.batch_size", part.batch_size))


def check_parameters(config: TrainConfig, num_devices: int, vocab_size: int | None = None) -> None:
    """`check_mesh` for the model alone."""
    model, mesh = config.model, config.mesh
    axes = model.axis_sizes()
    if vocab_size is not None:
        rows = model.embedding_rows(vocab_size)
        if model.vocab_rows not in (None, rows):
            raise InputError(
                f"model.vocab_rows {model.vocab_rows} is less than the {vocab_size} tokens of data.tokenizer "
                f"{config.data.tokenizer}; leave it out, or set {vocab_size} or more"
            )
        axes["vocab"] = (f"the vocabulary of data.tokenizer {config.data.tokenizer}, padded,", pad_vocab(rows))
    check_divides(mesh.sizes(num_devices), mesh.parameter_mapping, axes)
