"""From the optimizer's settings to the optimizer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import jmp
import optax

from sophia_levanter.config.optimizer import (
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    SoapConfig,
    SophiaConfig,
    SophiaGConfig,
    SophiaHConfig,
)
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.models.gpt2 import matrix_axes
from sophia_levanter.optim import (
    AdamW,
    GaussNewtonBartlett,
    Hutchinson,
    KroneckerBasis,
    Lion,
    Muon,
    Optimizer,
    Soap,
    SophiaG,
    SophiaH,
    WinRateController,
)
from sophia_levanter.optim.schedules import warmup_schedule
from sophia_levanter.optim.trees import WeightDecayMask
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
        "momentum_dtype": jnp.dtype(config.momentum_dtype),
    }
    match config:
        case SophiaGConfig():
            gnb = GaussNewtonBartlett(reduction=config.curvature_reduce, max_grad_norm=config.curvature_max_grad_norm)
            return SophiaG(**shared, **_sophia_arguments(config), estimator=gnb)
        case SophiaHConfig():
            hutchinson = Hutchinson(config.probe, config.num_probes)
            return SophiaH(**shared, **_sophia_arguments(config), estimator=hutchinson)
        case AdamWConfig():
            return AdamW(
                **shared, b1=config.b1, b2=config.b2, eps=config.eps, nesterov=config.nesterov, cautious=config.cautious
            )
        case LionConfig():
            return Lion(**shared, b1=config.b1, b2=config.b2)
        case MuonConfig():
            coefficients = {name: getattr(config, name) for name in ("beta", "b1", "b2", "eps")}
            return Muon(**shared, **coefficients, matrices=matrix_axes, mesh_axis="data")
        case SoapConfig():
            coefficients = {name: getattr(config, name) for name in ("b1", "b2", "eps", "interval")}
            size = config.basis_max_size
            return Soap(**shared, **coefficients, matrices=matrix_axes, max_size=size, mesh_axis="data")
    raise TypeError(f"no optimizer for {type(config).__name__}")


def _sophia_arguments(config: SophiaConfig) -> dict[str, Any]:
    names = ("b1", "b2", "eps", "interval", "bias_correct_momentum", "bias_correct_curvature")
    switches = ("denominator", "refresh_order", "first_refresh", "initial_refreshes", "cautious")
    target = config.target_win_rate
    rho = config.rho if target is None else WinRateController(target=target, initial=config.rho)
    basis = None
    if config.basis == "kronecker":
        basis = KroneckerBasis(
            matrices=matrix_axes, b2=config.basis_b2, max_size=config.basis_max_size, mesh_axis="data"
        )
    return {
        "rho": rho,
        "basis": basis,
        "curvature_dtype": jnp.dtype(config.curvature_dtype),
        **{name: getattr(config, name) for name in (*names, *switches)},
    }


def curvature_microbatch_size(config: SophiaConfig, trainer: TrainerConfig) -> int:
    """Rows in a microbatch of the pass that estimates the curvature."""
    return config.curvature_microbatch_size or trainer.microbatch_size or trainer.batch_size


def curvature_microbatches(config: SophiaConfig, trainer: TrainerConfig) -> int:
    """How many whole microbatches come nearest to the wanted part of the batch; at least one."""
    return max(
        1, round(config.curvature_batch_fraction * trainer.batch_size / curvature_microbatch_size(config, trainer))
    )


def curvature_share(config: SophiaConfig, trainer: TrainerConfig) -> float:
    """The part of the batch that the curvature is estimated on."""
    return curvature_microbatches(config, trainer) * curvature_microbatch_size(config, trainer) / trainer.batch_size


def build_step_settings(config: OptimizerConfig, trainer: TrainerConfig, mask: WeightDecayMask) -> StepSettings:
    """What stays the same over the steps of a run."""
    return StepSettings(
        optimizer=build_optimizer(config, trainer.num_train_steps, mask),
        seed=trainer.seed,
        policy=jmp.get_policy(f"params={trainer.parameter_dtype},compute={trainer.compute_dtype},output=float32"),
        max_grad_norm=trainer.max_grad_norm,
        loss_spike_factor=trainer.loss_spike_factor,
        curvature_microbatches=curvature_microbatches(config, trainer) if isinstance(config, SophiaConfig) else None,
        curvature_microbatch_size=config.curvature_microbatch_size if isinstance(config, SophiaConfig) else None,
        curvature_labels=config.curvature_labels if isinstance(config, SophiaGConfig) else "sampled",
    )
