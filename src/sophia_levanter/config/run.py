"""The whole configuration of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.mesh import MeshConfig, check_divides
from sophia_levanter.config.model import Gpt2Config, pad_vocab
from sophia_levanter.config.optimizer import OptimizerConfig, SophiaConfig, SophiaGConfig
from sophia_levanter.config.tracking import TrackingConfig
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """What `python -m sophia_levanter.main` trains, and how.

    Raises:
        InputError: if the parts do not fit each other.
    """

    model: Gpt2Config = field(default_factory=Gpt2Config)
    optimizer: OptimizerConfig = field(default_factory=SophiaGConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.optimizer.warmup_steps > self.trainer.num_train_steps:
            raise InputError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is more than "
                f"trainer.num_train_steps {self.trainer.num_train_steps}"
            )
        if isinstance(self.optimizer, SophiaConfig) and self.optimizer.first_refresh >= self.trainer.num_train_steps:
            raise InputError(
                f"optimizer.first_refresh {self.optimizer.first_refresh} is never reached: "
                f"trainer.num_train_steps is {self.trainer.num_train_steps}"
            )
        if self.mesh.coordinator is not None and self.trainer.run_dir is None:
            raise InputError("trainer.run_dir is missing; the processes of mesh.coordinator must agree on it")
        own = self.optimizer.curvature_microbatch_size if isinstance(self.optimizer, SophiaConfig) else None
        for trainer in self.trainer.parts:
            if own is not None and trainer.batch_size % own:
                raise InputError(
                    f"optimizer.curvature_microbatch_size {own} does not divide trainer.batch_size {trainer.batch_size}"
                )


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
    own = config.optimizer.curvature_microbatch_size if isinstance(config.optimizer, SophiaConfig) else None
    for part in trainer.parts:
        for row in (
            ("trainer.microbatch_size", part.microbatch_size or part.batch_size),
            ("optimizer.curvature_microbatch_size", own or part.batch_size),
        ):
            check_divides(sizes, mesh.compute_mapping, {"batch": row}, of=("trainer.batch_size", part.batch_size))


def check_parameters(config: TrainConfig, num_devices: int, vocab_size: int | None = None) -> None:
    """`check_mesh` for the model alone."""
    model, mesh = config.model, config.mesh
    axes = {
        "embed": ("model.embed_dim", model.embed_dim),
        "heads": ("model.num_heads", model.num_heads),
        "mlp": ("model.embed_dim x model.mlp_ratio", model.embed_dim * model.mlp_ratio),
        "position": ("model.seq_len", model.seq_len),
        "layers": ("model.num_layers", model.num_layers),
    }
    if vocab_size is not None:
        rows = model.embedding_rows(vocab_size)
        if model.vocab_rows not in (None, rows):
            raise InputError(
                f"model.vocab_rows {model.vocab_rows} is less than the {vocab_size} tokens of data.tokenizer "
                f"{config.data.tokenizer}; leave it out, or set {vocab_size} or more"
            )
        axes["vocab"] = (f"the vocabulary of data.tokenizer {config.data.tokenizer}, padded,", pad_vocab(rows))
    check_divides(mesh.sizes(num_devices), mesh.parameter_mapping, axes)
