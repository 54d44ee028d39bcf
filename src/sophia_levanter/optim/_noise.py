"""Metrics of Sophia's state, and the noise of the gradient from the curvature that Gauss-Newton-Bartlett estimates."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sophia_levanter.optim._averages import Curvature, Momentum, SophiaState
from sophia_levanter.optim._trees import norm, num_coordinates, total, upcast


def state_metrics(state: SophiaState) -> dict[str, Any]:
    """Scalars of a state alone; see `Sophia.metrics`."""
    nonpositive = total(jax.tree.map(lambda h: h <= 0, state.curvature))
    return {
        "curvature_nonpositive": nonpositive / num_coordinates(state.curvature),
        "curvature_norm": norm(state.curvature),
        "momentum_norm": norm(state.momentum),
        "skipped_updates": state.skipped_updates,
        "skipped_refreshes": state.skipped_refreshes,
        "steps_since_refresh": state.steps_since_refresh,
    }


def gradient_noise(momentum: Momentum, curvature: Curvature, state: SophiaState, num_targets: Any) -> dict[str, Any]:
    """The critical batch, and the signal-to-noise ratio of each array.

    A target drawn from the model has the expected squared gradient h. So far as the model is right about the data, the
    gradient of the mean loss of B targets has the variance h / B in each coordinate. The bias-corrected average m of t
    such gradients has the variance (h / B) (1 - b1) (1 + b1^t) / ((1 + b1) (1 - b1^t)), which is taken off |m|^2:

        |G|^2 = max(0, |m|^2 - trace(variance of m))
        critical_batch_tokens = sum(h) / |G|^2                 where signal and noise are equal
        signal_to_noise/ARRAY = |G|^2 / (sum(h) / B)           of that array

    The critical batch is the simple noise scale of McCandlish et al. 2018 (arXiv 1812.06162); it is infinite where no
    signal is found. The gradient is assumed to change little over 1 / (1 - b1) steps; where it is clipped before m, |G|
    is too small.

    Args:
        momentum, curvature: those of the optimizer; h must be the curvature of the likelihood's mean loss.
        state: a state after an update; before the first refresh all is nan.
        num_targets: B, the number of targets in a batch.
    """
    corrected = dataclasses.replace(momentum, bias_correct=True), dataclasses.replace(curvature, bias_correct=True)
    count = state.count - state.skipped_updates
    decayed = momentum.b1 ** jnp.maximum(count, 1)
    left = (1 - momentum.b1) * (1 + decayed) / ((1 + momentum.b1) * (1 - decayed))
    squares = jax.tree.map(lambda m: total(jnp.square(corrected[0].corrected(upcast(m), count))), state.momentum)
    known = jnp.where(state.refresh_count > 0, 1, jnp.nan)
    noises = jax.tree.map(
        lambda h: known * total(corrected[1].corrected(h, state.refresh_count)) / num_targets, state.curvature
    )

    def signal(square: Any, noise: Any) -> Any:
        return jnp.maximum(square - left * noise, 0)

    by_array = {
        f"signal_to_noise/{jax.tree_util.keystr(path, simple=True, separator='/')}": signal(square, noise) / noise
        for (path, square), noise in zip(
            jax.tree_util.tree_leaves_with_path(squares), jax.tree.leaves(noises), strict=True
        )
    }
    noise = total(noises)
    return {"critical_batch_tokens": num_targets * noise / signal(total(squares), noise)} | by_array
