"""The cost of a training step: FLOPs, memory per device, and the peak FLOP/s of the devices."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from sophia_levanter.accelerators import published_peak
from sophia_levanter.batch import Batch, batch_from_sequences
from sophia_levanter.config import TrainConfig
from sophia_levanter.models.language_model import matrix_axes
from sophia_levanter.optim._matrices import matrix_views
from sophia_levanter.partition.mesh import Partition
from sophia_levanter.training.step import StepSettings, TrainState, initial_state, train_step


@dataclass(frozen=True)
class MatrixFlops:
    """FLOPs per step that the optimizer spends on whole-matrix operations, averaged over the run.

    Attributes:
        products: changes of basis, second moments and the matrix products in the iteration that updates the basis.
        newton_schulz: Newton-Schulz iterations.
        qr: QR decompositions, keyed by the size of the square matrix.
    """

    products: float = 0.0
    newton_schulz: float = 0.0
    qr: dict[int, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """The total over all operation types."""
        return self.products + self.newton_schulz + sum(self.qr.values())


def flops_per_step(config: TrainConfig, flops_per_token: float) -> float:
    """Return the average FLOPs per step for the forward and backward pass, refreshes and whole-matrix operations.

    Elementwise optimizer operations are not counted. All steps are assumed to have the batch size of `config.trainer`.
    """
    tokens = config.trainer.batch_size * config.model.seq_len
    return flops_per_token * passes_per_step(config) * tokens + matrix_flops(config).total


def passes_per_step(config: TrainConfig) -> float:
    """Return the number of forward and backward passes per step, with refreshes averaged over all steps."""
    trainer = config.trainer
    curvature = config.optimizer.curvature_microbatches(trainer)
    if curvature is None:
        return 1.0
    count, size = curvature
    gradients = config.optimizer.build(trainer.num_train_steps).estimator.gradients
    return 1.0 + gradients * count * size / trainer.batch_size * refreshes_per_step(config)


def refreshes_per_step(config: TrainConfig) -> float:
    """Return the fraction of a run's steps that refresh the curvature."""
    steps = config.trainer.num_train_steps
    return sum(map(config.optimizer.build(steps).refresh_due, range(steps))) / steps


def matrix_flops(config: TrainConfig, num_shards: int = 1) -> MatrixFlops:
    """Return the FLOPs per step spent on the matrices in the model's blocks, averaged over the run.

    The matrices are distributed over `num_shards` devices, and the result is for the device with the most matrices.
    Matrices are not split, so their number per device is rounded up for each parameter and, for QR decompositions, for
    each matrix size.
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

    rotations = sum(map(work.turns_at, range(steps))) / steps
    products = newton_schulz = 0.0
    factors: Counter[int] = Counter()
    for count, *shape in sizes:
        rotated = [n for n in shape if n <= work.max_size]
        # Projecting into or out of the basis multiplies by one square matrix per side.
        change = sum(2.0 * n * math.prod(shape) for n in rotated)
        products += share(count) * (work.changes + rotations * work.turn_changes) * change
        newton_schulz += share(count) * work.newton_schulz * newton_schulz_flops(*sorted(shape))
        for n in rotated:
            factors[n] += count
    # Add the matrix product in the iteration, and the overlap of the new basis vectors with the old ones.
    products += sum(rotations * share(count) * 4.0 * n**3 for n, count in factors.items())
    qr = {n: rotations * share(count) * qr_flops(n) for n, count in factors.items()}
    return MatrixFlops(products, newton_schulz, qr)


def qr_flops(side: int) -> float:
    """Return the FLOPs of the QR decomposition of a square matrix: 4/3 n^3 for R and the same for Q."""
    return 8 / 3 * side**3


def newton_schulz_flops(short: int, long: int) -> float:
    """Return the FLOPs of one Newton-Schulz iteration on a `short` x `long` matrix."""
    return 4.0 * short**2 * long + 2.0 * short**3


UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def bytes_by_kind(state: TrainState) -> dict[str, int]:
    """Return the bytes of a state on one device, keyed by kind, such as `parameters`, `momentum` or `curvature`."""
    optimizer_state = state.optimizer_state
    kinds = {
        "parameters": device_bytes(state.model),
        "momentum": device_bytes(_named(optimizer_state, ("momentum", "mu", "mu_slow"))),
        "curvature": device_bytes(_named(optimizer_state, ("curvature",))),
        "average": device_bytes(state.average),
        "snapshots": device_bytes(state.snapshots),
    }
    others = device_bytes(state) - sum(kinds.values())
    return {kind: size for kind, size in {**kinds, "other optimizer state": others}.items() if size}


def _named(tree: Any, names: Sequence[str]) -> list[Any]:
    """Return the parts of an optimizer state with one of these names, also searching the nested states of optax."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        found = [getattr(tree, name) for name in names if name in tree._fields]
        return found or [part for child in tree for part in _named(child, names)]
    if isinstance(tree, tuple | list | dict):
        return [part for child in (tree.values() if isinstance(tree, dict) else tree) for part in _named(child, names)]
    return []


def device_bytes(tree: Any) -> int:
    """Return the number of bytes that a tree of `jax.ShapeDtypeStruct`s occupies on one device."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def step_bytes(compiled: jax.stages.Compiled) -> tuple[int, int] | None:
    """Return the bytes per device of the arguments, and of the temporaries and new outputs; None if unknown."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    outside = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes + max(0, outside)


def show_bytes(count: int) -> str:
    """Format a number of bytes in the largest suitable unit, such as `1.5 GiB`."""
    for name, unit in UNITS:
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} bytes"


def peak_flops(devices: list[jax.Device]) -> float:
    """Return the total peak FLOP/s of the devices: the published rate, or a measured rate for unlisted devices."""
    published = published_peak(devices[0].device_kind)
    if published is not None:
        return published * len(devices)
    # CPU devices on the same host share its cores.
    return _measured_matrix_rate() * (1 if devices[0].platform == "cpu" else len(devices))


def _measured_matrix_rate(size: int = 1024, repeats: int = 5) -> float:
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    product(matrix, matrix).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)


def abstract_state(config: TrainConfig, partition: Partition, vocab_size: int) -> TrainState:
    """Return a run's state as a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return partition.abstract(initial_state(config.model, StepSettings.of(config), vocab_size))


def lower_step(config: TrainConfig, partition: Partition, vocab_size: int, *, refresh: bool) -> jax.stages.Lowered:
    """Lower a training step, so that it can be compiled. The devices need not exist, and the text is not read."""
    settings = StepSettings.of(config)

    def batch() -> Batch:
        sequences = np.zeros((config.trainer.batch_size, config.model.seq_len + 1), np.int32)
        end = 0 if config.data.mask_documents else None
        return batch_from_sequences(sequences, num_microbatches=config.trainer.num_microbatches, document_end=end)

    step = jax.jit(partial(train_step, settings, refresh), donate_argnums=1)
    with partition.active():
        return step.lower(partition.abstract(batch), abstract_state(config, partition, vocab_size))
