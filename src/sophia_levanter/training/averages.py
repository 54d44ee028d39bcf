"""Averages of the parameters over training steps: a moving average, or the mean of the latest snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.optim._trees import select, upcast

if TYPE_CHECKING:
    from sophia_levanter.training.step import StepSettings, TrainState

Snapshots = tuple[LanguageModel, ...]


def averages(
    settings: StepSettings, state: TrainState, model: LanguageModel, good: jax.Array
) -> tuple[LanguageModel | None, Snapshots]:
    """Return the average after a step, and the snapshots that it is computed from.

    `state` is the state before the step, `model` has the parameters after it, and `good` is False for a skipped step.
    """
    model = jax.tree.map(_as_stored, model)
    if settings.lawa_interval is not None:
        return _mean_of_latest(settings.lawa_interval, state, model)
    return _moving_average(settings.ema_decay, state, model, good), ()


def _moving_average(
    decay: float | None, state: TrainState, model: LanguageModel, good: jax.Array
) -> LanguageModel | None:
    """Update the moving average after a good step: average <- d average + (1 - d) parameters.

    The decay d is capped at (1 + step) / (10 + step), so that the initial weights are forgotten quickly.
    """
    if decay is None:
        return None
    d = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    mean = jax.tree.map(lambda a, p: d * a + (1 - d) * upcast(p), state.average, model)
    return select(good, mean, state.average)


def _mean_of_latest(interval: int, state: TrainState, model: LanguageModel) -> tuple[LanguageModel | None, Snapshots]:
    """Return the mean of the latest snapshots, taken every `interval` steps (LAWA; Kaddour 2022, arXiv 2209.14981).

    Before the first snapshot, the average equals the parameters. Skipped steps count toward the interval.
    """
    step, count = state.step + 1, len(state.snapshots)
    taken = step // interval

    def take() -> tuple[LanguageModel | None, Snapshots]:
        snapshots = tuple(select((taken - 1) % count == i, model, old) for i, old in enumerate(state.snapshots))
        # Count the snapshots that have been taken, because the interval may have changed. The others are still zeros.
        filled = sum(map(_is_taken, snapshots))
        mean = jax.tree.map(lambda *xs: sum(map(upcast, xs)) / filled, *snapshots)
        return mean, snapshots

    def keep() -> tuple[LanguageModel | None, Snapshots]:
        return select(taken > 0, state.average, jax.tree.map(upcast, model)), state.snapshots

    return jax.lax.cond(step % interval == 0, take, keep)


def _as_stored(x: jax.Array) -> jax.Array:
    """Round a parameter to its dtype. Without this, XLA may pass on a sum from before it is rounded to bfloat16."""
    precision = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, precision.nexp, precision.nmant)


def _is_taken(snapshot: LanguageModel) -> jax.Array:
    """Return 1 if the snapshot has been taken, or 0 if it is all zeros, as int32."""
    return jnp.any(jnp.stack([jnp.any(x != 0) for x in jax.tree.leaves(snapshot)])).astype(jnp.int32)
