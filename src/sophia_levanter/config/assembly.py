"""Build a run's optimizer: an optimizer of the selected type, with the wrappers requested by the shared settings."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sophia_levanter.config.groups import check_groups
from sophia_levanter.config.transfer import (
    curvature_scales,
    gradient_scales,
    matrix_sides,
    scale_matrix_rates,
    width_exponents,
)
from sophia_levanter.errors import InputError, one_line

if TYPE_CHECKING:
    from sophia_levanter.config import TrainConfig
    from sophia_levanter.config.model import ModelConfig
    from sophia_levanter.config.optimizer import OptimizerConfig
    from sophia_levanter.optim import Optimizer

_METHODS = ("init", "update", "refresh_due", "metrics", "estimator", "estimator_at", "matrix_work")


@lru_cache(maxsize=8)
def build_optimizer(config: OptimizerConfig, num_train_steps: int, model: ModelConfig | None = None) -> Optimizer:
    """Build the optimizer for a run of `num_train_steps` steps. Calls with equal arguments return the same object.

    Args:
        config: the optimizer's settings.
        num_train_steps: the number of steps covered by schedules.
        model: the model's settings, which include the `parametrization`; None for `standard`.

    Raises:
        InputError: if an optimizer from a plug-in cannot be built or lacks a required method, or if the optimizer does
            not support the parametrization.
    """
    from sophia_levanter.models.language_model import hyperball_matrices, parameter_roles
    from sophia_levanter.optim import CautiousWeightDecay, Hyperball, ParameterGroups
    from sophia_levanter.optim._groups import ScaledGradients

    growth = None if model is None or model.growth == (1, 1) else model.growth
    if model is not None and growth is not None:
        config = scale_matrix_rates(config, model, width_exponents(config, model, _build(config, num_train_steps)))
    if not config.cautious_weight_decay:
        optimizer = _build(config, num_train_steps)
    else:
        undecayed = replace(config, weight_decay=0.0, groups=())
        optimizer = CautiousWeightDecay(_build(undecayed, num_train_steps), **config.decay_arguments)
    if growth is not None:
        signed = getattr(optimizer.estimator, "signed", False)
        optimizer = ScaledGradients(optimizer, gradient_scales(growth), curvature_scales(growth, signed=signed))
    if config.groups:
        optimizer = ParameterGroups(optimizer, tuple(config.parameter_groups), parameter_roles)
    return Hyperball(optimizer, hyperball_matrices) if config.hyperball else optimizer


def _build(config: OptimizerConfig, num_train_steps: int) -> Any:
    """Build the optimizer without wrappers."""
    import optax

    kind = type(config).__qualname__
    try:
        optimizer = config.build(num_train_steps)
    except InputError:
        raise
    except Exception as error:
        raise InputError(one_line(f"optimizer: {kind}.build() failed: {type(error).__name__}: {error}")) from error
    missing = [name for name in _METHODS if not hasattr(optimizer, name)]
    if missing and isinstance(optimizer, optax.GradientTransformation):
        raise InputError(
            f"optimizer: {kind}.build() returns an optax transformation; subclass sophia_levanter.optim.OptaxOptimizer "
            "and return the optax transformation from its transformation() method"
        )
    if missing:
        raise InputError(f"optimizer: {type(optimizer).__qualname__} does not define {', '.join(missing)}")
    return optimizer


def check_optimizer(
    config: OptimizerConfig, model_config: ModelConfig, vocab_size: int, *, resumes: bool = False
) -> None:
    """Check that an optimizer's settings are valid for a model.

    Args:
        config: the optimizer's settings.
        model_config: the model's settings.
        vocab_size: number of tokens in the tokenizer.
        resumes: whether a run is being resumed. If so, a weight decay or a basis without effect is accepted.

    Raises:
        InputError: if a group matches no parameters, if `hyperball` is set but the model has no matrices, if a group
            sets a weight decay but contains only matrices with norms fixed by the hyperball, or if a Kronecker basis
            rotates no side of any matrix.
    """
    from sophia_levanter.models.language_model import abstract_model, paths_on_hyperball

    if (longest := config.longest_rotated_side) is not None and not resumes:
        shortest = min((side for sides in matrix_sides(model_config).values() for side in sides), default=0)
        if shortest > longest:
            raise InputError(
                f"optimizer.basis_max_size is {longest}, but the shortest side of a matrix is {shortest}, so the "
                f"Kronecker basis rotates nothing; set it to at least {shortest}"
            )
    if not (config.groups or config.hyperball):
        return
    model = abstract_model(model_config, vocab_size)
    found = check_groups(config.parameter_groups, model)
    if not config.hyperball:
        return
    kept = paths_on_hyperball(model)
    if not kept:
        raise InputError("optimizer.hyperball is true, but the model has no matrices; set it to false")
    if resumes:
        return
    for index, group in enumerate(config.groups):
        if group.weight_decay and kept.issuperset(path for path, number in found.items() if number == index):
            raise InputError(
                f"optimizer.groups[{index}].weight_decay is {group.weight_decay:g}, but optimizer.hyperball keeps the "
                "norms of all parameters in this group fixed; remove weight_decay from the group"
            )


def describe_transfer(config: TrainConfig) -> str | None:
    """Describe the effect of mup (`mup, 4 x the base width and 1 x the base depth, ...`); None if it has no effect."""
    growth, factors = config.model.growth, config.model.forward_factors()
    if growth == (1, 1) and set(factors.values()) <= {1.0}:
        return None
    parts = [f"mup, {growth.width:.4g} x the base width and {growth.depth:.4g} x the base depth"]
    parts += [f"{name} x {factor:.4g}" for name, factor in factors.items()]
    if growth != (1, 1):
        optimizer = _build(config.optimizer, config.trainer.num_train_steps)
        exponents = set(width_exponents(config.optimizer, config.model, optimizer).values())
        steps = " or ".join(f"{growth.width**exponent:.4g}" for exponent in sorted(exponents))
        parts.append(f"matrix learning rates x {steps}")
        parts.append(f"gradients x {growth.width:.4g} (x {growth.width * growth.depth:.4g} in blocks)")
    return ", ".join(parts)
