"""Sophia as an optax transformation, and optax transformations applied before and after an optimizer's update."""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from sophia_levanter.optim._checks import check_flag, check_real, check_same_structure
from sophia_levanter.optim._trees import all_finite, select, trainable

if TYPE_CHECKING:
    from sophia_levanter.optim._sophia import AbstractSophia

# As in the authors' code, scale up a step by at most 1000, even if very few coordinates agree.
SMALLEST_SHARE = 1e-3


def agreeing(step: Float[Array, "..."], grad: Float[Array, "..."]) -> Float[Array, "..."]:
    """Keep the coordinates of a step that descend the gradient, and scale them up to compensate for the others.

    u <- u [u g > 0] / max(mean [u g > 0], 1e-3), where the mean is over the array and u is subtracted from the
    parameters (cautious steps, Liang et al. 2024, arXiv 2411.16085). Momentum lags behind a gradient that changes sign.
    """
    agrees = step * grad > 0
    return jnp.where(agrees, step / jnp.maximum(jnp.mean(agrees), SMALLEST_SHARE), 0).astype(step.dtype)


def cautious(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply `agreeing` to the steps of an optax transformation, such as `optax.scale_by_adam()`."""

    def update(grads: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        steps, state = inner.update(grads, state, params)
        return jax.tree.map(agreeing, steps, grads), state

    return optax.GradientTransformation(inner.init, update)


def check_gradient_transform(value: Any) -> None:
    """Raise a TypeError unless the value is None or an optax transformation."""
    missing = not (hasattr(value, "init") and hasattr(value, "update")) or isinstance(value, type)
    # This package's optimizers have both methods, but would reverse the step.
    if value is not None and (missing or hasattr(value, "refresh_due")):
        raise TypeError(
            f"gradient_transform is {value!r}; "
            "it must be an optax transformation, such as optax.clip_by_global_norm(1.0)"
        )


def init_transform(transform: optax.GradientTransformation | None, params: PyTree) -> PyTree | None:
    """Return the initial state of the transformation, or None without a transformation."""
    return None if transform is None else transform.init(params)


def prepared_gradient(
    transform: optax.GradientTransformation | None,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    finite: Bool[Array, ""] | None,
) -> tuple[PyTree, PyTree, Bool[Array, ""]]:
    """Check the gradient, apply the transformation, if any, and return the gradient, the next state and a flag.

    The flag is True if the gradient is finite before and after the transformation; otherwise, the state does not
    change. `finite` is as for `Optimizer.update`.
    """
    check_same_structure("grads", grads, params)
    grads = trainable(grads)
    finite = all_finite(grads) if finite is None else check_flag("finite", finite)
    if transform is None:
        return grads, state, finite
    transformed, new_state = transform.update(grads, state, params)
    check_same_structure("the gradient after gradient_transform", transformed, params)
    finite = finite & all_finite(transformed)
    return transformed, select(finite, new_state, state), finite


def as_optax(optimizer: AbstractSophia) -> optax.GradientTransformationExtraArgs:
    """Return Sophia as an optax transformation.

    Pass an estimate to `update(grads, state, params, h_hat=None)` in steps where one is due. In
    `optax.multi_transform`, each group uses its part of the full `h_hat`. In `optax.MultiSteps`, only the estimate
    passed with the last micro-step is used, and `should_skip_update_fn=optax.skip_not_finite` is required: without it,
    one nan gradient makes all later updates zero.

    Without estimates, Sophia reduces to sign descent. When not traced, `update` warns once if it has received no
    estimate by the time a second refresh is due.
    """

    first_refresh = next(filter(optimizer.refresh_due, itertools.count()))
    settled = False  # whether an estimate was passed or the user was warned

    def warn_without_estimate(state: Any) -> None:
        nonlocal settled
        # A traced count has no value yet.
        if settled or isinstance(state.count, jax.core.Tracer):
            return
        if state.refresh_count > 0 or state.refresh_pending:
            settled = True
        elif state.count > first_refresh + optimizer.curvature.interval:
            settled = True
            warnings.warn(
                f"h_hat was None in all {int(state.count)} updates so far, so Sophia reduces to sign descent; "
                "pass an estimate when refresh_due(step) is True: update(grads, state, params, h_hat=h_hat)",
                stacklevel=3,
            )

    def init(params: PyTree) -> Any:
        check_real("params", params)
        return optimizer._init_params(trainable(params))

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        h_hat: PyTree | None = None,
        finite: Bool[Array, ""] | None = None,
        **_: Any,
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("params is None; Sophia's update requires the parameters: update(grads, state, params)")
        if h_hat is not None:
            h_hat = _masked_like(trainable(updates), h_hat)
        updates, state = optimizer.update(updates, state, params, h_hat, finite=finite)
        warn_without_estimate(state)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _masked_like(grads: PyTree, h_hat: PyTree) -> PyTree:
    """Mask the leaves of the estimate that optax masked in the gradient."""
    if not any(_is_masked(leaf) for leaf in jax.tree.leaves(grads, is_leaf=_is_masked)):
        return h_hat
    try:
        return jax.tree.map(lambda g, h: g if _is_masked(g) else h, grads, h_hat, is_leaf=_is_masked)
    except ValueError as error:
        raise ValueError(f"h_hat does not have the structure of the parameters: {error}") from error


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
