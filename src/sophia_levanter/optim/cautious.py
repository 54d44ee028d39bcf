"""Cautious steps (Liang et al. 2024, arXiv 2411.16085): no coordinate moves up the gradient of the batch at hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any

# As in the authors' code: however few coordinates agree, a step grows by no more than this one's inverse.
SMALLEST_SHARE = 1e-3


def agreeing(step: jax.Array, grad: jax.Array) -> jax.Array:
    """The part of a step that goes down the gradient, scaled up by what is lost.

    u <- u [u g > 0] / max(mean [u g > 0], 1e-3), the mean over the array; u is subtracted from the parameters.

    Args:
        step: u, any shape.
        grad: g, of the same shape.
    """
    agrees = step * grad > 0
    return jnp.where(agrees, step / jnp.maximum(jnp.mean(agrees), SMALLEST_SHARE), 0).astype(step.dtype)


def cautious(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optax transformation, such as `optax.scale_by_adam()`, of whose result the agreeing part is left."""

    def update(grads: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        steps, state = inner.update(grads, state, params)
        return jax.tree.map(agreeing, steps, grads), state

    return optax.GradientTransformation(inner.init, update)
