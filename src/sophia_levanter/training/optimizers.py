"""From the optimizer's settings to the optimizer."""

from __future__ import annotations

from typing import Any

import jmp
import optax

from sophia_levanter.optim import AdamW, Lion, Optimizer, SophiaG, SophiaH
from sophia_levanter.optim.protocol import WeightDecayMask
from sophia_levanter.optim.schedules import warmup_schedule
from sophia_levanter.training.config import (
    AdamWConfig,
    LionConfig,
    OptimizerConfig,
    SophiaConfig,
    SophiaGConfig,
    SophiaHConfig,
    TrainerConfig,
)
from sophia_levanter.training.step import StepSettings


def build_schedule(config: OptimizerConfig, num_train_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step."""
    return warmup_schedule(
        config.schedule,
        peak=config.learning_rate,
        final=config.final_learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=num_train_steps,
    )


def build_optimizer(config: OptimizerConfig, num_train_steps: int, mask: WeightDecayMask) -> Optimizer:
    """The optimizer of a run.

    Args:
        config: its settings.
        num_train_steps: where the schedule ends.
        mask: the leaves that weight decay applies to.
    """
    shared: dict[str, Any] = {
        "learning_rate": build_schedule(config, num_train_steps),
        "weight_decay": config.weight_decay,
        "weight_decay_mask": mask,
    }
    match config:
        case SophiaGConfig():
            return SophiaG(**shared, **_sophia_arguments(config))
        case SophiaHConfig():
            return SophiaH(**shared, **_sophia_arguments(config), probe=config.probe)
        case AdamWConfig():
            return AdamW(**shared, b1=config.b1, b2=config.b2, eps=config.eps)
        case LionConfig():
            return Lion(**shared, b1=config.b1, b2=config.b2)
    raise TypeError(f"no optimizer for {type(config).__name__}")


def _sophia_arguments(config: SophiaConfig) -> dict[str, Any]:
    names = ("b1", "b2", "rho", "eps", "interval", "bias_correct_momentum", "bias_correct_curvature")
    return {name: getattr(config, name) for name in names}


def curvature_microbatches(config: SophiaConfig, trainer: TrainerConfig) -> int:
    """How many whole microbatches come nearest to the wanted part of the batch; at least one."""
    return max(1, round(config.curvature_batch_fraction * trainer.num_microbatches))


def build_step_settings(config: OptimizerConfig, trainer: TrainerConfig, mask: WeightDecayMask) -> StepSettings:
    """What stays the same over the steps of a run."""
    return StepSettings(
        optimizer=build_optimizer(config, trainer.num_train_steps, mask),
        seed=trainer.seed,
        policy=jmp.get_policy(f"params=float32,compute={trainer.compute_dtype},output=float32"),
        max_grad_norm=trainer.max_grad_norm,
        curvature_microbatches=curvature_microbatches(config, trainer) if isinstance(config, SophiaConfig) else None,
        curvature_reduce=config.curvature_reduce if isinstance(config, SophiaGConfig) else "square_then_average",
    )
