"""What a step costs besides the model's own forward and backward pass: the curvature and work on whole matrices."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import equinox as eqx
import jax

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.optimizer import MuonConfig, SoapConfig, SophiaConfig, SophiaGConfig, SophiaHConfig
from sophia_levanter.models.gpt2 import Gpt2, matrix_axes
from sophia_levanter.optim.matrices import matrix_views
from sophia_levanter.optim.muon import ITERATIONS
from sophia_levanter.optim.soap import turn_due
from sophia_levanter.training.optimizers import build_optimizer, curvature_microbatches, curvature_share


@dataclass(frozen=True)
class MatrixFlops:
    """FLOPs of an optimizer's work on whole matrices in a step, averaged over the run.

    Attributes:
        products: changes of basis, second moments and the products of the basis's iteration.
        newton_schulz: Newton-Schulz iterations.
        qr: QR decompositions, by the side of the square matrix.
    """

    products: float = 0.0
    newton_schulz: float = 0.0
    qr: dict[int, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All of them."""
        return self.products + self.newton_schulz + sum(self.qr.values())


def flops_per_step(config: TrainConfig, flops_per_token: float) -> float:
    """FLOPs of a step: forward, backward and, spread over all steps, refreshes and what is done to whole matrices.

    What optimizers do to each parameter by itself is not counted: the time tells it.

    Args:
        config: of the run; its batch size is that of all steps.
        flops_per_token: of the model's forward and backward pass.
    """
    tokens = config.trainer.batch_size * config.model.seq_len
    return flops_per_token * passes_per_step(config) * tokens + matrix_flops(config).total


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


def matrix_flops(config: TrainConfig, num_shards: int = 1) -> MatrixFlops:
    """FLOPs of the work on the blocks' matrices in a step, averaged over the run.

    Args:
        config: of the run.
        num_shards: devices that the matrices are divided over. The result is that of the device with the most matrices:
            each device has whole matrices, so the number of a parameter's is rounded up. QR decompositions of one side
            are divided together.
    """
    optimizer = config.optimizer
    kronecker = isinstance(optimizer, SophiaConfig) and optimizer.basis == "kronecker"
    if not kronecker and not isinstance(optimizer, MuonConfig | SoapConfig):
        return MatrixFlops()
    model = eqx.filter_eval_shape(Gpt2.init, config.model, vocab_size=1, key=jax.random.key(0))
    sizes = [view.sizes for view in matrix_views(matrix_axes, model) if view is not None]

    def share(count: int) -> int:
        return -(-count // num_shards)

    if isinstance(optimizer, MuonConfig):
        return MatrixFlops(
            newton_schulz=sum(share(count) * newton_schulz_flops(*sorted(shape)) for count, *shape in sizes)
        )
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
    products = 0.0
    factors: Counter[int] = Counter()
    for count, *shape in sizes:
        turning = [n for n in shape if n <= optimizer.basis_max_size]
        # One product with each side's square matrix: into the basis, or out of it.
        change = sum(2.0 * n * math.prod(shape) for n in turning)
        products += share(count) * (step_changes + turns * turn_changes) * change
        for n in turning:
            factors[n] += count
    # The iteration's product and the overlap of the new vectors with the old.
    products += sum(turns * share(count) * 4.0 * n**3 for n, count in factors.items())
    return MatrixFlops(products, qr={n: turns * share(count) * qr_flops(n) for n, count in factors.items()})


def _changes_of_an_estimate(config: TrainConfig) -> int:
    """How often an estimate changes coordinates: Hutchinson's probe leaves the basis and its product enters it; GNB's
    gradient enters it, of every microbatch where they are squared apart."""
    optimizer = config.optimizer
    if isinstance(optimizer, SophiaHConfig):
        return 2 * optimizer.num_probes
    assert isinstance(optimizer, SophiaGConfig)
    apart = optimizer.curvature_reduce == "square_then_average"
    return curvature_microbatches(optimizer, config.trainer) if apart else 1


def qr_flops(side: int) -> float:
    """FLOPs of the QR decomposition of a square matrix: 4/3 n^3 for R and as many to form Q."""
    return 8 / 3 * side**3


def newton_schulz_flops(short: int, long: int) -> float:
    """FLOPs of orthogonalising a matrix by Newton-Schulz iterations."""
    return ITERATIONS * (4.0 * short**2 * long + 2.0 * short**3)
