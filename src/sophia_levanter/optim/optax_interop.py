"""Sophia as an optax transformation."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import jax
import optax

from sophia_levanter.optim.checks import check_real
from sophia_levanter.optim.trees import differentiable

if TYPE_CHECKING:
    from sophia_levanter.optim.sophia import Sophia

PyTree = Any


def as_optax(optimizer: Sophia) -> optax.GradientTransformationExtraArgs:
    """A Sophia as an optax transformation.

    Its `update(grads, state, params, h_hat=None)` takes an estimate on the steps where one is due. Under
    `optax.multi_transform` every group takes its part of the whole `h_hat`; under `optax.MultiSteps` the one given
    with the last micro step of each counts, and `should_skip_update_fn=optax.skip_not_finite` is needed: without it
    one nan gradient makes every later update zero.

    Without any estimate Sophia is sign descent. Where `update` is not traced, it warns once if none was given by the
    time a second refresh is due.

    Args:
        optimizer: any `Sophia`.
    """

    settled = False  # whether an estimate was given, or the user was warned

    def warn_without_estimate(state: Any) -> None:
        nonlocal settled
        # A traced count has no value yet.
        if settled or isinstance(state.count, jax.core.Tracer):
            return
        if state.refresh_count > 0 or state.refresh_pending:
            settled = True
        elif state.count > optimizer.first_refresh + optimizer.interval:
            settled = True
            warnings.warn(
                f"h_hat is None in all {int(state.count)} updates so far, so Sophia is sign descent; "
                "give an estimate where refresh_due(step) is True: update(grads, state, params, h_hat=h_hat)",
                stacklevel=3,
            )

    def init(params: PyTree) -> Any:
        check_real("params", params)
        return optimizer._init_params(differentiable(params))

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        h_hat: PyTree | None = None,
        finite: jax.Array | None = None,
        **_: Any,
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("params is None; Sophia's update needs the parameters, as in update(grads, state, params)")
        if h_hat is not None:
            h_hat = _masked_like(differentiable(updates), h_hat)
        updates, state = optimizer.update(updates, state, params, h_hat, finite=finite)
        warn_without_estimate(state)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _masked_like(grads: PyTree, h_hat: PyTree) -> PyTree:
    """The estimate without what optax masked in the gradient."""
    if not any(_is_masked(leaf) for leaf in jax.tree.leaves(grads, is_leaf=_is_masked)):
        return h_hat
    try:
        return jax.tree.map(lambda g, h: g if _is_masked(g) else h, grads, h_hat, is_leaf=_is_masked)
    except ValueError as error:
        raise ValueError(f"h_hat is not a tree like the parameters: {error}") from error


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
