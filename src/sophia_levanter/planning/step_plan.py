"""The memory, the collectives and the time of a step."""

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
from sophia_levanter.planning.target import Target
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
    """What a step takes on one device, in bytes.

    Attributes:
        arguments: the state and the batch; the next state takes the same place.
        temporaries: all else at the peak: gradients, activations, workspace; None if it does not fit the device.
        collectives: what goes through each kind of collective.
    """

    arguments: int
    temporaries: int | None
    collectives: dict[str, float]

    def fits(self, memory: float) -> bool:
        """Whether arguments and temporaries are within so many bytes."""
        return self.temporaries is not None and self.arguments + self.temporaries <= memory


def plan_step(config: TrainConfig, partition: Partition, vocab_size: int, *, refresh: bool) -> StepPlan:
    """Compile a step and read off what it takes."""
    try:
        compiled = lower_step(config, partition, vocab_size, refresh=refresh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        state = abstract_state(config, partition, vocab_size)
        return StepPlan(sum(bytes_by_kind(state).values()), None, {})
    sizes = step_bytes(compiled)
    assert sizes is not None, "no memory analysis on this backend"
    return StepPlan(*sizes, collective_bytes(compiled.as_text() or ""))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the device with the most work, averaged over the run.

    Attributes:
        products: the model's matrix products and those of an optimizer with its matrices.
        qr: QR decompositions.
        newton_schulz: Newton-Schulz iterations.
        communication: what the device sends, at the bandwidth of its links; None if the steps do not fit the device.
    """

    products: float
    qr: float
    newton_schulz: float
    communication: float | None

    @property
    def compute(self) -> float:
        """All but communication."""
        return self.products + self.qr + self.newton_schulz

    @property
    def overlapped(self) -> float:
        """Of a step whose communication overlaps fully with computation."""
        return max(self.compute, self.communication or 0.0)

    @property
    def serial(self) -> float:
        """Of a step whose communication does not overlap with computation."""
        return self.compute + (self.communication or 0.0)

    @property
    def bound(self) -> str:
        """What bounds the overlapped step."""
        return "compute" if self.overlapped == self.compute else "communication"


def step_time(
    config: TrainConfig, partition: Partition, vocab_size: int, plans: dict[bool, StepPlan], target: Target, mfu: float
) -> StepTime:
    """The time of a step on a target, from rates of each kind of operation.

    Matrices of the optimizer are divided over the mesh's data axis.

    Args:
        config: of the run.
        partition: of the target's devices.
        vocab_size: of the tokenizer.
        plans: of the plain step and, if there is one, of the refresh step.
        target: the devices.
        mfu: the share of the peak that matrix products reach.
    """
    chip, tokens = target.chip, config.trainer.batch_size * config.model.seq_len
    model = (
        abstract_model(config.model, vocab_size).flops_per_token * tokens * passes_per_step(config) / target.num_devices
    )
    matrices = matrix_flops(config, partition.mesh.shape["data"])
    fits = all(plan.temporaries is not None for plan in plans.values())
    return StepTime(
        products=(model + matrices.products) / (mfu * chip.peak_flops),
        qr=sum(flops / chip.qr_rate(side) for side, flops in matrices.qr.items()),
        newton_schulz=matrices.newton_schulz / chip.newton_schulz_flops,
        communication=mean_bytes_sent(config, plans) / chip.bandwidth if fits else None,
    )


def mean_bytes_sent(config: TrainConfig, plans: dict[bool, StepPlan]) -> float:
    """Bytes that a device sends in a step, averaged over the plain and the refresh steps of the run."""
    sent = {refresh: sum(plan.collectives.values()) for refresh, plan in plans.items()}
    if True not in sent:
        return sent[False]
    return sent[False] + (sent[True] - sent[False]) * refreshes_per_step(config)


def gradient_bytes(state: TrainState) -> int:
    """The float32 sum of the gradients on one device."""
    leaves = [leaf for leaf in jax.tree.leaves(state.model) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in leaves)


def activation_bytes(config: TrainConfig, partition: Partition, vocab_size: int) -> int:
    """What the forward pass over a microbatch keeps for the backward pass, on one device.

    Counted on one device's rows and positions, with heads and MLP whole.
    """
    trainer, model_config = config.trainer, config.model
    rows = (trainer.microbatch_size or trainer.batch_size) // partition.row_shards
    positions = model_config.seq_len // partition.mesh.shape["sequence"]
    policy = StepSettings.of(config).policy
    model = abstract_model(model_config, vocab_size)
    parameters, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def kept_bytes(rows: int) -> int:
        """Of activations, and of parameters in other dtypes and shapes."""

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

    # Activations grow with the rows, and nothing else does.
    return kept_bytes(2 * rows) - kept_bytes(rows)
