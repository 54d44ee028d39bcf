"""The training step as pure functions. The loop compiles one step with a curvature refresh and one without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import jmp
import optax
from haliax import Axis, NamedArray
from jax.tree_util import Partial

from sophia_levanter.batch import Batch, count_targets
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.model import ModelConfig
from sophia_levanter.config.optimizer import build_optimizer
from sophia_levanter.config.registries import METRICS
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.models.attention import forward_differentiable
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.optim import Optimizer, RefreshStep
from sophia_levanter.optim._checks import value_at
from sophia_levanter.optim._gradients import LossesFn, num_microbatches, split_at
from sophia_levanter.optim._trees import is_named, norm, upcast
from sophia_levanter.partition.mesh import shard_params
from sophia_levanter.training.array_statistics import array_statistics
from sophia_levanter.training.averages import averages
from sophia_levanter.training.metrics import Metric, StepTrees, measure

PyTree = Any

RECENT_LOSS_DECAY = 0.98  # decay of the moving average of the loss, which is used to detect spikes


class TrainState(eqx.Module):
    """The state that a step updates.

    Attributes:
        step: int32, number of steps taken.
        model: the parameters.
        optimizer_state: the state of the optimizer.
        skipped_steps: int32, number of steps skipped because the loss or gradient was not finite or the loss spiked.
            A skipped step changes only the counts.
        skipped_in_a_row: int32, number of skipped steps since the last good step.
        recent_loss: float32, exponential moving average of the loss over good steps, in nats; initially infinite.
        skipped_windows: int32, number of sequences in the data order that the run has skipped because of rollbacks.
        average: an average of the parameters, in at least float32, or None.
        snapshots: the latest parameter snapshots, whose mean is `average`, in the dtypes of the parameters. Snapshots
            that have not been taken yet are zeros.
    """

    step: jax.Array
    model: LanguageModel
    optimizer_state: PyTree
    skipped_steps: jax.Array
    skipped_in_a_row: jax.Array
    recent_loss: jax.Array
    skipped_windows: jax.Array
    average: LanguageModel | None = None
    snapshots: tuple[LanguageModel, ...] = ()

    @staticmethod
    def init(
        model: LanguageModel,
        optimizer: Optimizer,
        policy: jmp.Policy | None = None,
        *,
        averaged: bool = False,
        num_snapshots: int = 0,
    ) -> TrainState:
        """Create the state before step 0, with parameters in the policy's dtype and, if `averaged`, their average."""

        def zero() -> jax.Array:
            return jnp.zeros((), jnp.int32)

        if policy is not None:
            model = policy.cast_to_param(model)
        infinite = jnp.full((), jnp.inf, jnp.float32)
        average = jax.tree.map(lambda x: upcast(x) + 0, model) if averaged else None
        snapshots = tuple(jax.tree.map(jnp.zeros_like, model) for _ in range(num_snapshots))
        return TrainState(zero(), model, optimizer.init(model), zero(), zero(), infinite, zero(), average, snapshots)

    @property
    def refresh_pending(self) -> jax.Array:
        """Whether the last refresh was skipped because of non-finite values, as a bool array. The next step retries."""
        return getattr(self.optimizer_state, "refresh_pending", jnp.zeros((), bool))


class StepOutput(NamedTuple):
    """The results of a step for the host. The state is separate, because its buffers are donated to the next step.

    Attributes:
        metrics: scalars keyed by their names in metrics.jsonl. `train/loss` is the mean in nats, and `train/grad_norm`
            is measured before clipping. A refresh adds `train/parameter_norm` and the optimizer's metrics as
            `optim/...`. Registered metrics are added as `METRIC/...`.
        refresh_pending: the value of this field in the state after the step.
        skipped_in_a_row: the value of this field in the state after the step.
        statistics: statistics of individual arrays from `array_statistics`; empty if they are not measured.
    """

    metrics: dict[str, jax.Array]
    refresh_pending: jax.Array
    skipped_in_a_row: jax.Array
    statistics: Mapping[str, jax.Array] = {}


@dataclass(frozen=True)
class StepSettings:
    """The settings of a run's steps.

    Attributes:
        seed: seed for dropout and curvature samples.
        policy: dtypes for parameters and computation.
        max_grad_norm: global norm to which larger gradients are clipped; None for no clipping.
        loss_spike_factor: skip a step if its loss exceeds the recent mean by this factor; None to never skip spikes.
        ema_decay: decay of the exponential moving average of the parameters; None for no moving average.
        lawa_interval: number of steps between the snapshots to average; None for no snapshots.
        lawa_snapshots: number of snapshots.
        curvature_microbatches: number of leading microbatches used to refresh the curvature; None for all.
        curvature_microbatch_size: rows per curvature microbatch; None for the same number as in gradient microbatches.
        metrics: registered metrics to compute, as (name, metric) pairs.
        statistics: whether to measure statistics of individual arrays. The loop compiles separate steps for this.
    """

    optimizer: Optimizer
    seed: int = 0
    policy: jmp.Policy = field(default_factory=lambda: jmp.get_policy("float32"))
    max_grad_norm: float | None = 1.0
    loss_spike_factor: float | None = None
    ema_decay: float | None = None
    lawa_interval: int | None = None
    lawa_snapshots: int = 0
    curvature_microbatches: int | None = None
    curvature_microbatch_size: int | None = None
    metrics: tuple[tuple[str, Metric], ...] = ()
    statistics: bool = False

    @staticmethod
    def of(config: TrainConfig, trainer: TrainerConfig | None = None) -> StepSettings:
        """Create the settings for a run's steps. `trainer` (by default, `config.trainer`) determines the batch size."""
        trainer = trainer or config.trainer
        curvature = config.optimizer.curvature_microbatches(trainer)
        optimizer = build_optimizer(config.optimizer, trainer.num_train_steps, config.model)
        own = None if curvature is None or curvature[1] == trainer.gradient_microbatch_size else curvature[1]
        return StepSettings(
            optimizer=optimizer,
            seed=trainer.seed,
            policy=jmp.get_policy(f"params={trainer.parameter_dtype},compute={trainer.compute_dtype},output=float32"),
            max_grad_norm=trainer.max_grad_norm,
            loss_spike_factor=trainer.loss_spike_factor,
            ema_decay=trainer.ema_decay,
            lawa_interval=trainer.lawa_interval,
            lawa_snapshots=0 if trainer.lawa_interval is None else trainer.lawa_snapshots,
            curvature_microbatches=None if curvature is None else curvature[0],
            curvature_microbatch_size=own,
            metrics=tuple((name, METRICS[name]) for name in trainer.metrics),
        )


def initial_state(config: ModelConfig, settings: StepSettings, vocab_size: int) -> Callable[[], TrainState]:
    """Return a function that creates the state before step 0, with random weights drawn using `settings.seed`.

    JAX compiles the function only once for equal arguments.
    """
    return Partial(_initial_state, config, settings, vocab_size)


def _initial_state(config: ModelConfig, settings: StepSettings, vocab_size: int) -> TrainState:
    model = config.build(vocab_size=vocab_size, key=jax.random.key(settings.seed))
    return first_state(settings, model)


def first_state(settings: StepSettings, model: LanguageModel) -> TrainState:
    """Create the state before step 0, with the weights of the given model."""
    averaged = settings.ema_decay is not None or settings.lawa_interval is not None
    return TrainState.init(
        model, settings.optimizer, settings.policy, averaged=averaged, num_snapshots=settings.lawa_snapshots
    )


def train_step(
    settings: StepSettings,
    refresh: bool,
    batch: Batch,
    state: TrainState,
    *,
    curvature_batch: Batch | None = None,
    samples: NamedArray | None = None,
) -> tuple[TrainState, StepOutput]:
    """Take a step: compute the gradient over all microbatches, optionally refresh the curvature, and update the model.

    If the loss or gradient is not finite, or the loss is a spike, the parameters, momentum and curvature are left
    unchanged. If the curvature estimate is not finite, only the refresh is skipped, unless the estimate replaces a part
    of the gradient (`extra_pass=False`), which then is not finite either. The counts advance in both cases.

    Args:
        refresh: whether to refresh the curvature before the update, as decided on the host.
        batch: [microbatch, batch, position].
        curvature_batch: [microbatch, batch, position], the batch for estimating the curvature. By default, the first
            `curvature_microbatches` of `batch`, which share their forward pass with the gradient (Sophia-G).
        samples: [microbatch, batch, position], int labels for Gauss-Newton-Bartlett, with the same shape as the
            curvature microbatches. By default, an estimator that samples targets draws them from the model, seeded by
            (seed, step, row).
    """
    passes = _passes(settings, state, batch, curvature_batch, samples)
    if refresh:
        sums, h_hat = settings.optimizer.estimator_at(state.optimizer_state).gradient_and_estimate(passes)
    else:
        sums, h_hat = passes.gradient(), None
    loss, grads = sums.mean()
    grad_norm = optax.tree.norm(grads)
    clipped = grads
    if settings.max_grad_norm is not None:
        scale = jnp.minimum(1.0, settings.max_grad_norm / grad_norm)
        clipped = jax.tree.map(lambda g: g * scale, grads)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if settings.loss_spike_factor is not None:
        good &= loss <= settings.loss_spike_factor * state.recent_loss
    optimizer = settings.optimizer
    new_state, updates = _apply(settings, state, loss, clipped, h_hat, good)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/learning_rate": jnp.asarray(value_at("learning_rate", optimizer.learning_rate, state.step), jnp.float32),
        "train/skipped_steps": new_state.skipped_steps,
    }
    if refresh:
        metrics["train/parameter_norm"] = norm(new_state.model)
        own = optimizer.metrics(new_state.optimizer_state, sums.num_targets)
        metrics |= {f"optim/{name}": value for name, value in own.items()}
    trees = StepTrees(grads, updates, state, new_state)
    metrics |= measure(settings.metrics, trees)
    statistics = array_statistics(optimizer, trees) if settings.statistics else {}
    return new_state, StepOutput(metrics, new_state.refresh_pending, new_state.skipped_in_a_row, statistics)


def _passes(
    settings: StepSettings,
    state: TrainState,
    batch: Batch,
    curvature_batch: Batch | None,
    samples: NamedArray | None,
) -> RefreshStep:
    """Create the `RefreshStep` that an estimator uses to run its passes over the batch."""
    key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
    dropout_key, curvature_key = (jax.random.fold_in(key, purpose) for purpose in (0, 1))
    losses_fn = _losses_fn(settings, dropout_key)
    first, others = curvature_rows(settings, batch)
    source = first if curvature_batch is None else curvature_batch
    if samples is None and getattr(settings.optimizer.estimator, "samples_targets", False):
        samples = _row_uniforms(curvature_key, source)
    parts, offset = [], num_microbatches(first)
    for part in others:
        parts.append((part, None, offset + jnp.arange(num_microbatches(part))))
        offset += num_microbatches(part)

    def curvature_losses_fn(model: LanguageModel, microbatch: tuple, key: jax.Array) -> tuple:
        batch, _, index = microbatch
        with forward_differentiable():
            return losses_fn(model, (batch, None, index), key)

    return RefreshStep(
        losses_fn,
        state.model,
        curvature_key,
        batch=(batch, None, jnp.arange(num_microbatches(batch))),
        first=(source, samples, jnp.arange(num_microbatches(source))),
        others=tuple(parts) if curvature_batch is None else None,
        curvature_losses_fn=curvature_losses_fn,
    )


def _losses_fn(settings: StepSettings, dropout_key: jax.Array) -> LossesFn:
    """Return a function that computes the mean losses on true and sampled labels, and the number of labels."""

    def losses(model: LanguageModel, microbatch: tuple, _: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        batch, samples, index = microbatch
        batch, samples = hax.auto_sharded((batch, samples))
        key = jax.random.fold_in(dropout_key, index)
        loss, sampled_loss = settings.policy.cast_to_compute(model).losses(batch, samples=samples, key=key)
        num_targets = count_targets(batch)
        divisor = jnp.where(num_targets > 0, num_targets, 1)
        return loss / divisor, sampled_loss / divisor, num_targets

    return losses


def curvature_rows(settings: StepSettings, batch: Batch) -> tuple[Batch, list[Batch]]:
    """Split a batch into microbatches that refresh the curvature, and microbatches of the remaining rows."""
    size, count = settings.curvature_microbatch_size, settings.curvature_microbatches
    if size is None:
        first, rest = split_at(batch, count or num_microbatches(batch))
        return first, [] if rest is None else [rest]
    num, gradient_size = (batch.tokens.resolve_axis(name).size for name in ("microbatch", "batch"))
    end = num * gradient_size
    used = end if count is None else count * size
    # The remainder of a partly used gradient microbatch becomes a separate microbatch.
    whole = used + -used % gradient_size

    def part(start: int, stop: int, rows: int) -> Batch:
        return jax.tree.map(lambda x: _regroup(x, slice(start, stop), rows), batch, is_leaf=is_named)

    others = [part(used, whole, whole - used)] if used < whole else []
    return part(0, used, size), others + ([part(whole, end, gradient_size)] if whole < end else [])


def _regroup(x: NamedArray, rows: slice, size: int) -> NamedArray:
    """Select rows of an array [microbatch, batch, ...], and regroup them into microbatches of a different size."""
    flat = x.flatten_axes(("microbatch", "batch"), "batch")["batch", rows]
    count = flat.resolve_axis("batch").size // size
    return flat.unflatten_axis("batch", (Axis("microbatch", count), Axis("batch", size)))


def _row_uniforms(key: jax.Array, batch: Batch) -> NamedArray:
    """Draw uniform samples in [0, 1) for each row, regardless of the mesh: float32 [microbatch, batch, position]."""
    axes = batch.tokens.axes
    rows = jnp.arange(axes[0].size * axes[1].size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    uniforms = jax.vmap(lambda k: jax.random.uniform(k, (axes[2].size,)))(keys)
    return hax.auto_sharded(NamedArray(uniforms.reshape([a.size for a in axes]), axes))


def _apply(
    settings: StepSettings,
    state: TrainState,
    loss: jax.Array,
    grads: PyTree,
    h_hat: PyTree | None,
    good: jax.Array,
) -> tuple[TrainState, PyTree]:
    """Refresh and update if the step is good, and advance the counts. Return the new state and the updates."""
    updates, optimizer_state = settings.optimizer.update(grads, state.optimizer_state, state.model, h_hat, finite=good)
    model = eqx.apply_updates(state.model, updates)
    average, snapshots = averages(settings, state, model, good)
    is_first = jnp.isinf(state.recent_loss)
    recent = jnp.where(is_first, loss, RECENT_LOSS_DECAY * state.recent_loss + (1 - RECENT_LOSS_DECAY) * loss)
    after = TrainState(
        step=state.step + 1,
        model=model,
        optimizer_state=optimizer_state,
        skipped_steps=state.skipped_steps + ~good,
        skipped_in_a_row=jnp.where(good, 0, state.skipped_in_a_row + 1),
        recent_loss=jnp.where(good, recent, state.recent_loss),
        skipped_windows=state.skipped_windows,
        average=average,
        snapshots=snapshots,
    )
    return shard_params(after), updates
