"""Loss, gradient and Gauss-Newton-Bartlett curvature from one forward pass and two backward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from sophia_levanter.optim.checks import check_key, check_parameters, check_scalars, whole_number
from sophia_levanter.optim.gauss_newton import GaussNewtonBartlett
from sophia_levanter.optim.microbatch import num_microbatches, split_at, sum_over_microbatches
from sophia_levanter.optim.protocol import GradientSums
from sophia_levanter.optim.trees import widened

PyTree = Any
LossesFn = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def accumulate(
    losses_fn: LossesFn,
    model: PyTree,
    microbatches: PyTree = None,
    *,
    key: jax.Array,
    estimator: Any = None,
    start: GradientSums | None = None,
) -> GradientSums:
    """Sums of loss, gradient and, with an estimator, curvature over microbatches, one at a time.

    Args:
        losses_fn: as for `value_grad_and_curvature`; without an estimator its second result is not looked at.
        model: any pytree.
        microbatches: a pytree of arrays or NamedArrays [microbatch, ...].
        key: a jax random key.
        estimator: its `accumulated` gives what a microbatch adds to the curvature; None for no curvature.
        start: sums over other microbatches, to be added to; without curvature.
    """
    check_parameters(model)
    check_key(key)

    def one(*args: Any) -> GradientSums:
        def losses(model: PyTree) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            what = ("a scalar mean loss", "a scalar mean loss on sampled targets", "the number of targets")
            loss, sampled_loss, num_targets = check_scalars("losses_fn", losses_fn(model, *args), what)
            return (loss, sampled_loss), num_targets

        (loss, sampled_loss), pull, num_targets = eqx.filter_vjp(losses, model, has_aux=True)
        n = jnp.asarray(num_targets, jnp.promote_types(loss.dtype, jnp.float32))
        (grads,) = pull((n.astype(loss.dtype), jnp.zeros_like(sampled_loss)))
        curvature = None
        if estimator is not None:
            (sampled_grads,) = pull((jnp.zeros_like(loss), n.astype(sampled_loss.dtype)))
            curvature = estimator.accumulated(sampled_grads, n)
        return GradientSums(loss * n, n, jax.tree.map(widened, grads), curvature)

    if microbatches is None:
        return one(key)
    return sum_over_microbatches(lambda part, index: one(part, jax.random.fold_in(key, index)), microbatches, start)


def value_grad_and_curvature(
    losses_fn: LossesFn,
    model: PyTree,
    microbatches: PyTree = None,
    *,
    key: jax.Array,
    estimator: GaussNewtonBartlett,
    curvature_microbatches: int | None = None,
) -> tuple[jax.Array, PyTree, PyTree]:
    """The mean loss, its gradient, and a GNB estimate that costs one more backward pass and no forward pass.

    `GaussNewtonBartlett.losses` makes the three results of `losses_fn` from a model's outputs. That keeps two
    cotangents of the outputs; for a large vocabulary write a `losses_fn` that takes the final hidden states through
    the head in blocks, scoring true and sampled labels in one pass (as `sophia_levanter.models.loss` does), so that
    the forward pass is shared up to the hidden states and whole logits never exist.

    Args:
        losses_fn: (model, key) or (model, microbatch, key) -> (mean loss on the true targets, mean loss on targets
            drawn from the model's own distribution, their number B).
        model: any pytree.
        microbatches: a pytree of arrays or NamedArrays [microbatch, ...].
        key: a jax random key for the sampled targets; each microbatch has one of its own.
        estimator: how microbatches are joined; that of a `SophiaG` is `optimizer.estimator_at(state)`.
        curvature_microbatches: how many of the first microbatches the curvature is estimated on; None for all.

    Returns:
        A scalar, the gradient and the estimate, both like the model's differentiable part.

    Raises:
        ValueError: if a loss is no scalar, or there are fewer microbatches than wanted.
        TypeError: if the estimator is another one.
    """
    if not isinstance(estimator, GaussNewtonBartlett):
        raise TypeError(f"estimator is {estimator!r}; only a GaussNewtonBartlett can share the gradient's forward pass")
    if microbatches is None and curvature_microbatches is not None:
        raise ValueError(f"curvature_microbatches is {curvature_microbatches}, and there are no microbatches")
    if curvature_microbatches is None:
        sums = accumulate(losses_fn, model, microbatches, key=key, estimator=estimator)
        return *sums.mean(), estimator.finished(sums.curvature, sums.num_targets)
    total = num_microbatches(microbatches)
    curvature_microbatches = whole_number(curvature_microbatches)
    if type(curvature_microbatches) is not int or not 0 < curvature_microbatches <= total:
        raise ValueError(
            f"curvature_microbatches is {curvature_microbatches!r}; it must be a whole number between 1 and {total}"
        )
    first, rest = split_at(microbatches, curvature_microbatches)
    sums = accumulate(losses_fn, model, first, key=key, estimator=estimator)
    h_hat = estimator.finished(sums.curvature, sums.num_targets)
    if rest is not None:
        start = sums._replace(curvature=None)
        sums = accumulate(losses_fn, model, rest, key=jax.random.fold_in(key, total), start=start)
    return *sums.mean(), h_hat
