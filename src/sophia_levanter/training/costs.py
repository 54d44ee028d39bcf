"""What a step costs besides the model's own forward and backward pass: the curvature and work on whole matrices."""

from __future__ import annotations

import equinox as eqx
import jax

from sophia_levanter.config import TrainConfig
from sophia_levanter.models.gpt2 import Gpt2, matrix_axes
from sophia_levanter.optim.matrices import matrix_views
from sophia_levanter.optim.soap import turn_due
from sophia_levanter.training.config import MuonConfig, SoapConfig, SophiaConfig, SophiaGConfig, SophiaHConfig
from sophia_levanter.training.optimizers import build_optimizer, curvature_microbatches, curvature_share

NEWTON_SCHULZ_ITERATIONS = 5


def flops_per_step(config: TrainConfig, flops_per_token: float) -> float:
    """FLOPs of a step: forward, backward and, spread over all steps, refreshes and what is done to whole matrices.

    What optimizers do to each parameter by itself is not counted: the time tells it.

    Args:
        config: of the run; its batch size is that of all steps.
        flops_per_token: of the model's forward and backward pass.
    """
    tokens = config.trainer.batch_size * config.model.seq_len
    return flops_per_token * passes_per_step(config) * tokens + matrix_flops_per_step(config)


def passes_per_step(config: TrainConfig) -> float:
    """Forward and backward passes over the batch in a step, refreshes of the curvature spread over all steps.

    A refresh by GNB is one more backward pass over its part of the batch, two thirds of a gradient (the forward pass is
    shared); one by Hutchinson is a gradient and its derivative, two gradients for each probe.
    """
    optimizer = config.optimizer
    if not isinstance(optimizer, SophiaConfig):
        return 1.0
    gradients = 2.0 * optimizer.num_probes if isinstance(optimizer, SophiaHConfig) else 2 / 3
    return 1.0 + gradients * curvature_share(optimizer, config.trainer) * refreshes_per_step(config)


def refreshes_per_step(config: TrainConfig) -> float:
    """The share of a run's steps that refresh the curvature."""
    steps = config.trainer.num_train_steps
    optimizer = build_optimizer(config.optimizer, steps, None)
    return sum(map(optimizer.refresh_due, range(steps))) / steps


def matrix_flops_per_step(config: TrainConfig) -> float:
    """FLOPs of the products and decompositions of the blocks' matrices in a step, refreshes spread over all steps."""
    optimizer = config.optimizer
    kronecker = isinstance(optimizer, SophiaConfig) and optimizer.basis == "kronecker"
    if not kronecker and not isinstance(optimizer, MuonConfig | SoapConfig):
        return 0.0
    model = eqx.filter_eval_shape(Gpt2.init, config.model, vocab_size=1, key=jax.random.key(0))
    sizes = [view.sizes for view in matrix_views(matrix_axes, model) if view is not None]
    if isinstance(optimizer, MuonConfig):
        return sum(count * _newton_schulz_flops(*sorted(sides)) for count, *sides in sizes)
    if isinstance(optimizer, SoapConfig):
        # The gradient and the first moment in, the step out, and the moments of both sides at every step; v turns.
        step_changes, turn_changes = 4, 1
        steps = config.trainer.num_train_steps
        turns = sum(bool(turn_due(step, optimizer.interval)) for step in range(steps)) / steps
    else:
        assert isinstance(optimizer, SophiaConfig)
        # The momentum in and the step out, and for cautious steps the gradient; the estimate, the moments, h turns.
        step_changes = 3 if optimizer.cautious else 2
        turn_changes = _changes_of_an_estimate(config) + 2
        turns = refreshes_per_step(config)
    flops = 0.0
    for count, *sides in sizes:
        turning = [n for n in sides if n <= optimizer.basis_max_size]
        # One product with each side's square matrix: into the basis, or out of it.
        change = sum(2.0 * n * sides[0] * sides[1] for n in turning)
        # The iteration's product, its QR and the overlap.
        cubes = sum((2 + 8 / 3 + 2) * n**3 for n in turning)
        flops += count * (step_changes * change + turns * (turn_changes * change + cubes))
    return flops


def _changes_of_an_estimate(config: TrainConfig) -> int:
    """How often an estimate changes coordinates: Hutchinson's probe leaves the basis and its product enters it; GNB's
    gradient enters it, of every microbatch where they are squared apart."""
    optimizer = config.optimizer
    if isinstance(optimizer, SophiaHConfig):
        return 2 * optimizer.num_probes
    assert isinstance(optimizer, SophiaGConfig)
    apart = optimizer.curvature_reduce == "square_then_average"
    return curvature_microbatches(optimizer, config.trainer) if apart else 1


def _newton_schulz_flops(short: int, long: int) -> float:
    return NEWTON_SCHULZ_ITERATIONS * (4.0 * short**2 * long + 2.0 * short**3)
