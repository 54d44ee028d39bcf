"""What a training loop may ask of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

PyTree = Any
Scalar = float | jax.Array
ScalarOrSchedule = Scalar | Callable[[jax.Array], jax.Array]
State = TypeVar("State")


class Optimizer(Protocol[State]):
    """optax's convention on any pytree, plus the host-side question whether the curvature is due."""

    @property
    def learning_rate(self) -> ScalarOrSchedule:
        """A number or a function of the update count."""
        ...

    def init(self, model: PyTree) -> State:
        """The state before the first step."""
        ...

    def update(
        self, grads: PyTree, state: State, model: PyTree, h_hat: Any = None, *, finite: jax.Array | None = None
    ) -> tuple[PyTree, State]:
        """The step to add to the model (`eqx.apply_updates`), and the next state.

        Where the gradient is not finite, the step is zero and nothing in the state changes but counts. `finite` says
        whether it is, where the caller knows; otherwise the gradient is looked through. `h_hat` is a new estimate of
        the curvature, if one was due.
        """
        ...

    def refresh_due(self, step: int) -> bool:
        """Whether an estimate of the curvature is wanted at this step; decided on the host."""
        ...

    def metrics(self, state: State) -> dict[str, jax.Array]:
        """Scalars worth logging."""
        ...


def value_at(name: str, value: ScalarOrSchedule, count: jax.Array) -> Any:
    """A hyper-parameter at an update count, whether it is a number or a schedule.

    Raises:
        TypeError: if what the schedule gives is no number.
        ValueError: if there are several.
    """
    found = value(count) if callable(value) else value
    if not isinstance(found, Real | np.ndarray | jax.Array):
        raise TypeError(f"{name} at an update count is {found!r}; it must be a number")
    check_one(name, found)
    return found


def check_one(name: str, value: Any) -> None:
    """Raise a ValueError for an array of several numbers, which would broadcast over the parameters' last axis."""
    if np.shape(value) != ():
        raise ValueError(f"{name} has shape {np.shape(value)}; one optimizer has one number (several need vmap)")
