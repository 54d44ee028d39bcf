"""What Sophia remembers between steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

PyTree = Any


class SophiaState(NamedTuple):
    """The state of Sophia.

    Attributes:
        count: int32 scalar, updates so far.
        refresh_count: int32 scalar, refreshes of the curvature so far.
        momentum: m, like the model's differentiable part, in its dtypes or in `momentum_dtype`.
        curvature: h, the same shapes in at least float32, or in `curvature_dtype`.
        refresh_pending: bool scalar, the last refresh was skipped: try again at the next step.
        skipped_updates: int32 scalar, updates whose gradient was not finite; they changed nothing but counts.
        skipped_refreshes: int32 scalar, refreshes whose estimate, or the gradient beside it, was not finite.
        steps_since_refresh: int32 scalar, updates since the last refresh, or since the start if there was none.
        rho: float32 scalar with a `WinRateController`, or None.
        gradient_state: the state of `gradient_transform`, or None.
        basis: the state of `basis`, or None.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of that name, which optax hides too
    refresh_count: jax.Array
    momentum: PyTree
    curvature: PyTree
    refresh_pending: jax.Array
    skipped_updates: jax.Array
    skipped_refreshes: jax.Array
    steps_since_refresh: jax.Array
    rho: Any
    gradient_state: PyTree | None
    basis: Any
