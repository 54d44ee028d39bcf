"""The training step as pure functions: gradient, curvature, update. The loop compiles it with and without a refresh."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import jmp
import optax
from haliax import NamedArray

from sophia_levanter.batch import Batch, count_targets
from sophia_levanter.models.gpt2 import Gpt2
from sophia_levanter.optim import Optimizer, Sophia, SophiaG, SophiaH
from sophia_levanter.optim.curvature import draw_probe, gnb_estimate, gnb_total, hessian_vector_product
from sophia_levanter.optim.protocol import differentiable, value_at

PyTree = Any


class TrainState(eqx.Module):
    """All that a step changes.

    Attributes:
        step: int32, steps taken.
        model: float32 parameters.
        optimizer_state: the optimizer's own state.
        refresh_pending: bool, a refresh was due and its estimate or gradient was not finite: try at the next step.
        skipped_steps: int32, steps whose loss or gradient was not finite; they changed nothing but counts.
        skipped_in_a_row: int32, such steps since the last good one.
        skipped_refreshes: int32, refreshes that did not happen because a number was not finite.
    """

    step: jax.Array
    model: Gpt2
    optimizer_state: PyTree
    refresh_pending: jax.Array
    skipped_steps: jax.Array
    skipped_in_a_row: jax.Array
    skipped_refreshes: jax.Array

    @staticmethod
    def init(model: Gpt2, optimizer: Optimizer) -> TrainState:
        """The state before step 0."""

        def zero() -> jax.Array:
            return jnp.zeros((), jnp.int32)

        return TrainState(zero(), model, optimizer.init(model), jnp.zeros((), bool), zero(), zero(), zero())


class StepOutput(NamedTuple):
    """What a step tells the host, apart from the state, whose buffers the next step takes over.

    Attributes:
        metrics: scalars by their names in metrics.jsonl; `train/loss` is the mean in nats, `train/grad_norm` is from
            before clipping; after a refresh the optimizer's own metrics as `optim/...`.
        refresh_pending: as in the state after the step.
        skipped_in_a_row: as in the state after the step.
    """

    metrics: dict[str, jax.Array]
    refresh_pending: jax.Array
    skipped_in_a_row: jax.Array


@dataclass(frozen=True)
class StepSettings:
    """What stays the same over a run.

    Attributes:
        optimizer: the optimizer.
        seed: of dropout and curvature samples.
        policy: parameters' and compute dtypes.
        max_grad_norm: global norm above which gradients are scaled down to it; None for no clipping.
        curvature_microbatches: how many of the first microbatches refresh the curvature; None for all.
        curvature_reduce: how GNB joins microbatches, see `optim.curvature.gnb_total`.
    """

    optimizer: Optimizer
    seed: int = 0
    policy: jmp.Policy = field(default_factory=lambda: jmp.get_policy("float32"))
    max_grad_norm: float | None = 1.0
    curvature_microbatches: int | None = None
    curvature_reduce: str = "square_then_average"


class _Sums(NamedTuple):
    """Sums over microbatches: loss in nats, number of targets, gradient of the loss, and of GNB's total."""

    loss: jax.Array
    targets: jax.Array
    grads: PyTree
    gnb: PyTree


class _Keys(NamedTuple):
    dropout: jax.Array
    curvature: jax.Array


def train_step(
    settings: StepSettings,
    refresh: bool,
    batch: Batch,
    state: TrainState,
    *,
    curvature_batch: Batch | None = None,
    samples: NamedArray | None = None,
) -> tuple[TrainState, StepOutput]:
    """One step: gradient over all microbatches, if `refresh` the curvature, then the update.

    A non-finite loss or gradient leaves parameters, momentum and curvature as they were; a non-finite estimate skips
    the refresh. Counts advance in both cases.

    Args:
        settings: what stays the same over the run.
        refresh: whether the curvature is estimated before the update; decided on the host.
        batch: [microbatch, batch, position].
        state: the state before the step.
        curvature_batch: [microbatch, batch, position] to estimate the curvature on; if not given, the first
            `curvature_microbatches` of the batch, which then share their forward pass with the gradient (Sophia-G).
        samples: [microbatch, batch, position] int labels for GNB, like the microbatches it is estimated on; if not
            given they are drawn from the model, by (seed, step, row).

    Returns:
        The state after the step, and what the host may want to know of it.
    """
    keys = _step_keys(settings.seed, state.step)
    sums, h_hat = _gradient_and_curvature(settings, refresh, state.model, batch, curvature_batch, samples, keys)
    loss = sums.loss / sums.targets
    grads = jax.tree.map(lambda g: g / sums.targets, sums.grads)
    grad_norm = optax.tree.norm(grads)
    if settings.max_grad_norm is not None:
        scale = jnp.minimum(1.0, settings.max_grad_norm / grad_norm)
        grads = jax.tree.map(lambda g: g * scale, grads)
    new_state = _apply(settings.optimizer, state, grads, h_hat, jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    optimizer = settings.optimizer
    metrics = {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/learning_rate": jnp.asarray(value_at(optimizer.learning_rate, state.step), jnp.float32),
        "train/skipped_steps": new_state.skipped_steps,
    }
    if refresh:
        metrics |= {f"optim/{name}": value for name, value in optimizer.metrics(new_state.optimizer_state).items()}
        metrics["optim/skipped_refreshes"] = new_state.skipped_refreshes
    return new_state, StepOutput(metrics, new_state.refresh_pending, new_state.skipped_in_a_row)


def _step_keys(seed: int, step: jax.Array) -> _Keys:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return _Keys(*(jax.random.fold_in(key, purpose) for purpose in range(len(_Keys._fields))))


def _gradient_and_curvature(
    settings: StepSettings,
    refresh: bool,
    model: Gpt2,
    batch: Batch,
    curvature_batch: Batch | None,
    samples: NamedArray | None,
    keys: _Keys,
) -> tuple[_Sums, PyTree | None]:
    """The gradient's sums over the whole batch and, on a refresh, the estimate of the curvature's diagonal."""
    if not refresh:
        return _accumulate(settings, model, batch, keys), None
    optimizer = settings.optimizer
    total = batch.tokens.resolve_axis("microbatch").size
    first, rest = _split(batch, settings.curvature_microbatches or total)
    if isinstance(optimizer, SophiaH):
        return _accumulate(settings, model, batch, keys), _hutchinson(settings, model, curvature_batch or first, keys)
    assert isinstance(optimizer, SophiaG), f"{type(optimizer).__name__} has no curvature to refresh"
    source = curvature_batch or first
    if samples is None:
        samples = _row_uniforms(keys.curvature, source)
    curved = _accumulate(settings, model, source, keys, samples=samples)
    h_hat = gnb_estimate(curved.gnb, curved.targets, settings.curvature_reduce)
    if curvature_batch is not None:
        return _accumulate(settings, model, batch, keys), h_hat
    curved = curved._replace(gnb=None)
    if rest is None:
        return curved, h_hat
    offset = first.tokens.resolve_axis("microbatch").size
    return jax.tree.map(jnp.add, curved, _accumulate(settings, model, rest, keys, offset=offset)), h_hat


def _accumulate(
    settings: StepSettings,
    model: Gpt2,
    batch: Batch,
    keys: _Keys,
    *,
    samples: NamedArray | None = None,
    offset: int = 0,
) -> _Sums:
    """Sums over microbatches, one at a time; with samples also GNB's total, from the same forward pass.

    Args:
        offset: index of the first of these microbatches in the step's batch, for dropout.
    """

    def one(microbatch: Batch, samples: NamedArray | None, index: jax.Array) -> _Sums:
        def losses(model: Gpt2) -> tuple[jax.Array, jax.Array]:
            key = jax.random.fold_in(keys.dropout, index) if model.config.dropout > 0 else None
            return settings.policy.cast_to_compute(model).losses(microbatch, samples=samples, key=key)

        (loss, sampled_loss), pull = eqx.filter_vjp(losses, model)
        (grads,) = pull((jnp.ones_like(loss), jnp.zeros_like(sampled_loss)))
        gnb = None
        if samples is not None:
            (sampled_grads,) = pull((jnp.zeros_like(loss), jnp.ones_like(sampled_loss)))
            gnb = gnb_total(sampled_grads, settings.curvature_reduce)
        return _Sums(loss, count_targets(microbatch), grads, gnb)

    return _sum_over_microbatches(one, (batch, samples), offset)


def _sum_over_microbatches(one: Any, xs: Any, offset: int = 0) -> Any:
    """The sum of `one(*slice of xs, index)` over the axis `microbatch`, in a scan that holds one slice at a time."""
    batch = xs[0]
    num_microbatches = batch.tokens.resolve_axis("microbatch").size

    def at(index: int | jax.Array) -> Any:
        slices = jax.tree.map(
            lambda x: hax.auto_sharded(x["microbatch", index]), xs, is_leaf=lambda x: isinstance(x, NamedArray)
        )
        return one(*slices, index + offset)

    if num_microbatches == 1:
        return at(0)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(at, 0))
    total, _ = jax.lax.scan(
        lambda carry, index: (jax.tree.map(jnp.add, carry, at(index)), None), start, jnp.arange(num_microbatches)
    )
    return total


def _hutchinson(settings: StepSettings, model: Gpt2, batch: Batch, keys: _Keys) -> PyTree:
    """u * (H u) of the mean loss; one u for all microbatches, so that they only split the work."""
    optimizer = settings.optimizer
    assert isinstance(optimizer, SophiaH)
    probe = draw_probe(keys.curvature, model, optimizer.probe)

    def one(microbatch: Batch, index: jax.Array) -> tuple[PyTree, jax.Array]:
        def loss(model: Gpt2) -> jax.Array:
            key = jax.random.fold_in(keys.dropout, index) if model.config.dropout > 0 else None
            return settings.policy.cast_to_compute(model).losses(microbatch, key=key)[0]

        return hessian_vector_product(loss, model, probe), count_targets(microbatch)

    product, targets = _sum_over_microbatches(one, (batch,))
    return jax.tree.map(lambda u, hu: u * hu / targets, probe, product)


def _split(batch: Batch, first: int) -> tuple[Batch, Batch | None]:
    """The first microbatches, and the rest if any."""

    def part(where: slice) -> Batch:
        return jax.tree.map(lambda x: x[{"microbatch": where}], batch, is_leaf=lambda x: isinstance(x, NamedArray))

    total = batch.tokens.resolve_axis("microbatch").size
    return part(slice(0, first)), part(slice(first, total)) if first < total else None


def _row_uniforms(key: jax.Array, batch: Batch) -> NamedArray:
    """float32 [microbatch, batch, position] in [0, 1), by row of the step's batch: the same on any mesh."""
    axes = batch.tokens.axes
    rows = jnp.arange(axes[0].size * axes[1].size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    uniforms = jax.vmap(lambda k: jax.random.uniform(k, (axes[2].size,)))(keys)
    return hax.auto_sharded(NamedArray(uniforms.reshape([a.size for a in axes]), axes))


def _apply(
    optimizer: Optimizer, state: TrainState, grads: PyTree, h_hat: PyTree | None, finite: jax.Array
) -> TrainState:
    """Refresh and update where the numbers are finite; count either way."""
    optimizer_state, pending = state.optimizer_state, state.refresh_pending
    skipped_refreshes = state.skipped_refreshes
    if h_hat is not None:
        assert isinstance(optimizer, Sophia)
        refreshed = finite & _all_finite(h_hat)
        optimizer_state = _where(refreshed, optimizer.refresh(optimizer_state, h_hat), optimizer_state)
        pending = ~refreshed
        skipped_refreshes = skipped_refreshes + ~refreshed
    updates, updated = optimizer.update(grads, optimizer_state, state.model)
    new_model = _where(finite, eqx.apply_updates(state.model, updates), state.model)
    # Integer leaves are counts, and those advance even where nothing else changes.
    updated = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old) if eqx.is_inexact_array(new) else new, updated, optimizer_state
    )
    return TrainState(
        step=state.step + 1,
        model=new_model,
        optimizer_state=updated,
        refresh_pending=pending,
        skipped_steps=state.skipped_steps + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        skipped_refreshes=skipped_refreshes,
    )


def _where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Arrays of `new` where the condition holds, of `old` elsewhere; leaves that are no arrays are those of `old`."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o) if eqx.is_array(n) else o, new, old)


def _all_finite(tree: PyTree) -> jax.Array:
    leaves = jax.tree.leaves(differentiable(tree))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
