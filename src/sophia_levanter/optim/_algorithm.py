"""Sophia's update and curvature refresh (arXiv 2305.14342, Algorithm 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from sophia_levanter.optim._averages import SophiaState
from sophia_levanter.optim._checks import value_at
from sophia_levanter.optim._kronecker import Coordinates
from sophia_levanter.optim._optax import agreeing
from sophia_levanter.optim._trees import all_finite, decay_mask_tree, num_coordinates, select, total, upcast

if TYPE_CHECKING:
    from sophia_levanter.optim._sophia import AbstractSophia


def updated(
    sophia: AbstractSophia, grads: PyTree, state: SophiaState, params: PyTree, finite: Bool[Array, ""]
) -> tuple[PyTree, SophiaState]:
    """Return the step to add to the parameters, and the next state. P projects into the basis of h.

    m     <- b1 m + (1 - b1) g
    u     <- clip(P m / max(rho h, eps), -1, 1)                            m and h bias-corrected
    theta <- theta - lr (P^-1 u + wd theta)

    If the gradient is not finite, theta and m do not change.
    """
    momentum = jax.tree.map(sophia.momentum.next, state.momentum, grads)
    after = state._replace(
        count=state.count + 1,
        momentum=select(finite, momentum, state.momentum),
        skipped_updates=state.skipped_updates + ~finite,
        steps_since_refresh=state.steps_since_refresh + 1,
    )
    coordinates = coordinates_of(sophia, state)
    direction = jax.tree.map(lambda m, d: jnp.clip(m / d, -1, 1), *ratio(sophia, after))
    if sophia.cautious:
        direction = jax.tree.map(agreeing, direction, coordinates.project(grads))
    direction = coordinates.project_back(direction)

    learning_rate = value_at("learning_rate", sophia.learning_rate, state.count)
    decay = learning_rate * value_at("weight_decay", sophia.weight_decay.rate, state.count)

    def step(p: Array, u: Array, decayed: bool | float) -> Array:
        rate = decay if decayed is True else decayed * decay
        change = learning_rate * u + rate * p if decayed else learning_rate * u
        return jnp.where(finite, -change, 0).astype(p.dtype)

    return jax.tree.map(step, params, direction, decay_mask_tree(sophia.weight_decay.mask, params)), after


def refreshed(sophia: AbstractSophia, state: SophiaState, h_hat: PyTree, finite: Bool[Array, ""]) -> SophiaState:
    """Return the state after a refresh, which is skipped unless the estimate and the gradient of the step are finite.

    h <- b2 h + (1 - b2) h_hat. Then the basis, if any, is rotated along with h, and the controller, if any, sets rho.
    """
    averaged = jax.tree.map(sophia.curvature.next, state.curvature, h_hat)
    # Check h instead of the estimate, to also detect values that overflow the dtype of h.
    sound = finite & all_finite(averaged)
    curvature = select(sound, averaged, state.curvature)
    basis = state.basis
    if sophia.basis is not None:
        rotated = sophia.basis.rotated(sophia.basis.update_moments(basis, state.momentum), curvature)
        basis, curvature = select(sound, rotated, (basis, state.curvature))
    after = state._replace(
        refresh_count=state.refresh_count + sound,
        curvature=curvature,
        basis=basis,
        refresh_pending=~sound,
        skipped_refreshes=state.skipped_refreshes + ~sound,
        steps_since_refresh=jnp.where(sound, 0, state.steps_since_refresh),
    )
    if after.rho is None:
        return after
    # Before the first update, m is 0 and the win rate is meaningless.
    measured = sound & (state.count > 0)
    return after._replace(rho=select(measured, sophia.rho.next(state.rho, win_rate(sophia, after)), state.rho))


def coordinates_of(sophia: AbstractSophia, state: SophiaState) -> Coordinates:
    """Return the coordinates in which h is diagonal."""
    return Coordinates() if sophia.basis is None else sophia.basis.at(state.basis)


def last_rho(sophia: AbstractSophia, state: SophiaState) -> Any:
    """Return the rho used by the update that produced this state."""
    return sophia.rho.at(state.rho, jnp.maximum(state.count - 1, 0))


def ratio(sophia: AbstractSophia, state: SophiaState) -> tuple[PyTree, PyTree]:
    """Return the numerator and denominator of the ratio to clip, given a state after an update."""
    momentum = coordinates_of(sophia, state).project(jax.tree.map(upcast, state.momentum))
    momentum = jax.tree.map(lambda m: sophia.momentum.corrected(m, state.count - state.skipped_updates), momentum)
    rho = last_rho(sophia, state)
    denominator = jax.tree.map(
        lambda h: sophia.denominator(rho * sophia.curvature.corrected(h, state.refresh_count)), state.curvature
    )
    return momentum, denominator


def unclipped(sophia: AbstractSophia, state: SophiaState) -> PyTree[Bool[Array, "..."]]:
    """Return a mask of the unclipped coordinates, excluding those with h <= 0, such as embeddings of unseen tokens."""
    return jax.tree.map(lambda m, d, h: (jnp.abs(m) < d) & (h > 0), *ratio(sophia, state), state.curvature)


def win_rate(sophia: AbstractSophia, state: SophiaState) -> Float[Array, ""]:
    """Return the fraction of coordinates selected by `unclipped`."""
    return total(unclipped(sophia, state)) / num_coordinates(state.momentum)
