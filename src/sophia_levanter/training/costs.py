"""What a step costs besides the model's own forward and backward pass: the curvature and work on whole matrices."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import equinox as eqx
import jax

from sophia_levanter.config import TrainConfig
from sophia_levanter.models.language_model import matrix_axes
from sophia_levanter.optim._matrices import matrix_views


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
    """Forward and backward passes over the batch in a step, refreshes of the curvature spread over all steps."""
    trainer = config.trainer
    curvature = config.optimizer.curvature_microbatches(trainer)
    if curvature is None:
        return 1.0
    count, size = curvature
    gradients = config.optimizer.build(trainer.num_train_steps).estimator.gradients
    return 1.0 + gradients * count * size / trainer.batch_size * refreshes_per_step(config)


def refreshes_per_step(config: TrainConfig) -> float:
    """The share of a run's steps that refresh the curvature."""
    steps = config.trainer.num_train_steps
    return sum(map(config.optimizer.build(steps).refresh_due, range(steps))) / steps


def matrix_flops(config: TrainConfig, num_shards: int = 1) -> MatrixFlops:
    """FLOPs of the work on the blocks' matrices in a step, averaged over the run.

    Args:
        config: of the run.
        num_shards: devices that the matrices are divided over. The result is that of the device with the most matrices:
            each device has whole matrices, so the number of a parameter's is rounded up. QR decompositions of one side
            are divided together.
    """
    steps = config.trainer.num_train_steps
    num_microbatches, _ = config.optimizer.curvature_microbatches(config.trainer) or (0, 0)
    work = config.optimizer.build(steps).matrix_work(num_microbatches)
    if not work.changes and not work.newton_schulz:
        return MatrixFlops()
    model = eqx.filter_eval_shape(config.model.build, vocab_size=1, key=jax.random.key(0))
    sizes = [view.sizes for view in matrix_views(matrix_axes, model) if view is not None]

    def share(count: int) -> int:
        return -(-count // num_shards)

    turns = sum(map(work.turns_at, range(steps))) / steps
    products = newton_schulz = 0.0
    factors: Counter[int] = Counter()
    for count, *shape in sizes:
        rotated = [n for n in shape if n <= work.max_size]
        # One product with each side's square matrix: into the basis, or out of it.
        change = sum(2.0 * n * math.prod(shape) for n in rotated)
        products += share(count) * (work.changes + turns * work.turn_changes) * change
        newton_schulz += share(count) * work.newton_schulz * newton_schulz_flops(*sorted(shape))
        for n in rotated:
            factors[n] += count
    # The iteration's product and the overlap of the new vectors with the old.
    products += sum(turns * share(count) * 4.0 * n**3 for n, count in factors.items())
    qr = {n: turns * share(count) * qr_flops(n) for n, count in factors.items()}
    return MatrixFlops(products, newton_schulz, qr)


def qr_flops(side: int) -> float:
    """FLOPs of the QR decomposition of a square matrix: 4/3 n^3 for R and as many to form Q."""
    return 8 / 3 * side**3


def newton_schulz_flops(short: int, long: int) -> float:
    """FLOPs of a Newton-Schulz iteration on a matrix."""
    return 4.0 * short**2 * long + 2.0 * short**3
