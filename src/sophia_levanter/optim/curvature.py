"""Unbiased estimates of a diagonal curvature: Hutchinson's and Gauss-Newton-Bartlett.

Sources: arXiv 2305.14342, Algorithms 1 (Hutchinson) and 2 (GNB); for GNB over microbatches see `gnb_total`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from sophia_levanter.optim.protocol import PyTree, differentiable

PROBES = ("rademacher", "gaussian")
REDUCTIONS = ("square_then_average", "average_then_square")


def draw_probe(key: jax.Array, model: PyTree, probe: str = "rademacher") -> PyTree:
    """A random direction u with E[u u^T] = 1, shaped like the model's differentiable part.

    Args:
        key: a jax random key.
        model: any pytree; each floating-point leaf gets a probe of its own shape and dtype.
        probe: `rademacher` (+1 or -1, the lower variance) or `gaussian` (the paper's).

    Raises:
        ValueError: if `probe` is neither, or a leaf is complex.
    """
    if probe not in PROBES:
        raise ValueError(f"probe is {probe!r}; it must be one of {', '.join(PROBES)}")
    draw = jax.random.rademacher if probe == "rademacher" else jax.random.normal
    leaves, structure = jax.tree.flatten(differentiable(model))
    if any(jnp.iscomplexobj(leaf) for leaf in leaves):
        raise ValueError("the model has complex leaves; split them into real and imaginary parts")
    keys = jax.random.split(key, max(len(leaves), 1))[: len(leaves)]
    drawn = [draw(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def hessian_vector_product(loss_fn: Callable[[Any], jax.Array], model: PyTree, vector: PyTree) -> PyTree:
    """H v of a scalar loss, by forward-over-reverse differentiation.

    Args:
        loss_fn: model -> scalar.
        model: where H is taken.
        vector: shaped like the model's differentiable part.
    """
    _, product = eqx.filter_jvp(eqx.filter_grad(loss_fn), (model,), (vector,))
    return product


def hutchinson(
    loss_fn: Callable[[Any], jax.Array], model: PyTree, *, key: jax.Array, probe: str = "rademacher"
) -> PyTree:
    """u * (H u): its mean over u is the diagonal of the Hessian; single entries may be negative.

    Args:
        loss_fn: model -> scalar mean loss.
        model: any pytree.
        key: a jax random key for u.
        probe: `rademacher` or `gaussian`.

    Raises:
        ValueError: if `probe` is neither.
    """
    u = draw_probe(key, model, probe)
    return jax.tree.map(jnp.multiply, u, hessian_vector_product(loss_fn, model, u))


def gauss_newton_bartlett(
    sampled_loss: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]], model: PyTree, *, key: jax.Array
) -> PyTree:
    """B * g^2 in at least float32: its mean is the diagonal of the Gauss-Newton matrix of the mean loss.

    Args:
        sampled_loss: (model, key) -> (mean loss on B targets drawn from the model's own distribution, B).
        model: any pytree.
        key: a jax random key for the targets.
    """
    (_, num_targets), g = eqx.filter_value_and_grad(sampled_loss, has_aux=True)(model, key)
    return jax.tree.map(lambda x: num_targets * jnp.square(x), _widened(g))


def gnb_total(grad_sum: PyTree, reduction: str) -> PyTree:
    """What one microbatch adds to the running total of a GNB estimate, in at least float32.

    With G_i the gradient of the *summed* sampled loss of microbatch i and B_i its number of targets, the estimate is
    `square_then_average`: sum_i G_i^2 / sum_i B_i, or `average_then_square`: (sum_i G_i)^2 / sum_i B_i. Both are
    unbiased, since the G_i are independent with mean zero; the first has up to n times less variance.

    Raises:
        ValueError: if `reduction` is neither.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    wide = _widened(grad_sum)
    return jax.tree.map(jnp.square, wide) if reduction == "square_then_average" else wide


def gnb_estimate(total: PyTree, num_targets: jax.Array, reduction: str) -> PyTree:
    """The GNB estimate from the sum of the microbatches' `gnb_total` and of their numbers of targets."""
    if reduction == "square_then_average":
        return jax.tree.map(lambda x: x / num_targets, total)
    return jax.tree.map(lambda x: jnp.square(x) / num_targets, total)


def _widened(grads: PyTree) -> PyTree:
    """In at least float32, since the square of a float16 gradient underflows."""
    return jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)
