"""Estimate the memory, collectives and time of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np

from sophia_levanter.batch import batch_from_sequences
from sophia_levanter.config import TrainConfig
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.partition.mesh import Partition
from sophia_levanter.planning.collectives import collective_bytes
from sophia_levanter.planning.target import Target, node_of
from sophia_levanter.training.costs import (
    abstract_state,
    bytes_by_kind,
    lower_step,
    matrix_flops,
    passes_per_step,
    refreshes_per_step,
    step_bytes,
)
from sophia_levanter.training.step import StepSettings, TrainState


@dataclass(frozen=True)
class StepPlan:
    """The memory that a step uses on one device and the data that the device sends, in bytes.

    Attributes:
        arguments: the state and the batch; the next state reuses their memory.
        temporaries: everything else at peak memory (gradients, activations, workspace); None if the step does not fit.
        collectives: bytes sent by the device in each kind of collective.
        between_nodes: how many of these bytes are sent to other nodes.
    """

    arguments: int
    temporaries: int | None
    collectives: dict[str, float]
    between_nodes: float = 0.0

    def fits(self, memory: float) -> bool:
        """Return whether the arguments and temporaries fit in `memory` bytes."""
        return self.temporaries is not None and self.arguments + self.temporaries <= memory


def plan_step(config: TrainConfig, partition: Partition, vocab_size: int, *, refresh: bool) -> StepPlan:
    """Compile a step, and determine the memory and communication of the compiled program."""
    try:
        compiled = lower_step(config, partition, vocab_size, refresh=refresh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        state = abstract_state(config, partition, vocab_size)
        return StepPlan(sum(bytes_by_kind(state).values()), None, {})
    sizes = step_bytes(compiled)
    assert sizes is not None, "no memory analysis on this backend"
    hlo, nodes = compiled.as_text() or "", [node_of(device) for device in partition.mesh.devices.flat]
    between = collective_bytes(hlo, nodes) if len(set(nodes)) > 1 else {}
    return StepPlan(*sizes, collective_bytes(hlo), sum(between.values()))


COMPUTE, MEMORY = "compute", "memory traffic"
WITHIN, BETWEEN = "communication within a node", "communication between nodes"


@dataclass(frozen=True)
class StepTime:
    """The time of a step in seconds on the device with the most work, averaged over the run.

    Attributes:
        products: the matrix products in the model and the optimizer.
        qr: QR decompositions.
        newton_schulz: Newton-Schulz iterations.
        memory: reading and writing the parameters and optimizer state once, at the device's memory bandwidth.
        within: sending data within the node or slice, at the bandwidth of the device's links; None if the steps do not
            fit on the device.
        between: sending data to other nodes, at the device's network bandwidth.
    """

    products: float
    qr: float
    newton_schulz: float
    memory: float
    within: float | None
    between: float

    @property
    def compute(self) -> float:
        """Seconds for matrix products, QR decompositions and Newton-Schulz iterations, run sequentially."""
        return self.products + self.qr + self.newton_schulz

    @property
    def parts(self) -> dict[str, float]:
        """Seconds for each part; parts may overlap."""
        return {COMPUTE: self.compute, MEMORY: self.memory, WITHIN: self.within or 0.0, BETWEEN: self.between}

    @property
    def overlapped(self) -> float:
        """Seconds for a step with fully overlapping parts: the time of the longest part."""
        return max(self.parts.values())

    @property
    def serial(self) -> float:
        """Seconds for a step without overlap: the sum over all parts."""
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """The longest part, which bounds the overlapped step."""
        return max(self.parts, key=lambda part: self.parts[part])


def step_time(
    config: TrainConfig, partition: Partition, vocab_size: int, plans: dict[bool, StepPlan], target: Target, mfu: float
) -> StepTime:
    """Estimate the time of a step on a target from the rate of each kind of operation.

    The optimizer's matrices are distributed over the data axis of the mesh.

    Args:
        config: the run's configuration.
        partition: the partition of the target's devices.
        vocab_size: number of tokens in the tokenizer.
        plans: the plans for the plain step and for the refresh step, if there is one, keyed by `refresh`.
        target: the devices.
        mfu: the fraction of peak FLOP/s achieved by matrix products.
    """
    chip, tokens = target.chip, config.trainer.batch_size * config.model.seq_len
    model = (
        abstract_model(config.model, vocab_size).flops_per_token * tokens * passes_per_step(config) / target.num_devices
    )
    matrices = matrix_flops(config, partition.mesh.shape["data"])
    fits = all(plan.temporaries is not None for plan in plans.values())
    within, between = mean_bytes_sent(config, plans)
    return StepTime(
        products=(model + matrices.products) / (mfu * chip.peak_flops),
        qr=sum(flops / chip.qr_rate(side) for side, flops in matrices.qr.items()),
        newton_schulz=matrices.newton_schulz / chip.newton_schulz_flops,
        memory=2 * plans[False].arguments / chip.memory_bandwidth,
        within=within / chip.bandwidth if fits else None,
        between=between / chip.network,
    )


def mean_bytes_sent(config: TrainConfig, plans: dict[bool, StepPlan]) -> tuple[float, float]:
    """Return the bytes that a device sends per step within its node and to other nodes, averaged over the run."""
    refreshes = refreshes_per_step(config) if True in plans else 0.0
    weighted = [(refreshes if refresh else 1 - refreshes, plan) for refresh, plan in plans.items()]
    between = sum(weight * plan.between_nodes for weight, plan in weighted)
    return sum(weight * sum(plan.collectives.values()) for weight, plan in weighted) - between, between


def gradient_bytes(state: TrainState) -> int:
    """Return the size in bytes of the float32 gradient sum on one device."""
    leaves = [leaf for leaf in jax.tree.leaves(state.model) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in leaves)


def activation_bytes(config: TrainConfig, partition: Partition, vocab_size: int) -> int:
    """Return the bytes per device that the forward pass of a microbatch keeps for the backward pass.

    The count covers the device's rows and positions, and assumes that heads and the MLP are not sharded.
    """
    trainer, model_config = config.trainer, config.model
    rows = trainer.gradient_microbatch_size // partition.row_shards
    positions = model_config.seq_len // partition.mesh.shape["sequence"]
    policy = StepSettings.of(config).policy
    model = abstract_model(model_config, vocab_size)
    parameters, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def kept_bytes(rows: int) -> int:
        """Return the bytes of activations and of parameters converted to other dtypes and shapes."""

        def kept(parameters: Any) -> list[jax.Array]:
            end = 0 if config.data.mask_documents else None
            batch = batch_from_sequences(np.zeros((rows, positions + 1), np.int32), document_end=end)
            one = jax.tree.map(lambda x: x["microbatch", 0], batch, is_leaf=lambda x: hasattr(x, "axes"))
            cast = policy.cast_to_compute(eqx.combine(parameters, static))
            _, pull = jax.vjp(lambda p: eqx.combine(p, static).losses(one)[0], eqx.filter(cast, eqx.is_array))
            return jax.tree.leaves(pull)

        jaxpr = jax.make_jaxpr(kept)(parameters).jaxpr
        arrays: dict[int, Any] = {id(v): v.aval for v in jaxpr.outvars if hasattr(v, "aval")}
        return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in arrays.values())

    # Only activations grow with the number of rows, so the parameters cancel.
    return kept_bytes(2 * rows) - kept_bytes(rows)
