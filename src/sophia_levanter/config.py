"""The whole configuration of a training run."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field

from sophia_levanter.data.config import DataConfig
from sophia_levanter.errors import InputError
from sophia_levanter.models.config import Gpt2Config
from sophia_levanter.training.config import OptimizerConfig, SophiaConfig, SophiaGConfig, SophiaHConfig, TrainerConfig


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
        own = self.optimizer.curvature_microbatch_size if isinstance(self.optimizer, SophiaHConfig) else None
        if own is not None and self.trainer.batch_size % own:
            raise InputError(
                f"optimizer.curvature_microbatch_size {own} does not divide "
                f"trainer.batch_size {self.trainer.batch_size}"
            )


def sections(optimizer: type[OptimizerConfig]) -> dict[str, type]:
    """The dataclass of each section of a TrainConfig, by name; `optimizer` is the chosen type's."""
    return typing.get_type_hints(TrainConfig) | {"optimizer": optimizer}
