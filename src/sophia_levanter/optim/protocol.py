"""What a training loop may ask of an optimizer, and the checks and helpers that all optimizers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

PyTree = Any
Scalar = float | jax.Array
ScalarOrSchedule = Scalar | Callable[[jax.Array], jax.Array]
WeightDecayMask = PyTree | Callable[[PyTree], PyTree] | None
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

    def update(self, grads: PyTree, state: State, model: PyTree) -> tuple[PyTree, State]:
        """The step to add to the model (`eqx.apply_updates`), and the next state."""
        ...

    def refresh_due(self, step: int) -> bool:
        """Whether the curvature is to be estimated anew before the update of this step; decided on the host."""
        ...

    def metrics(self, state: State) -> dict[str, jax.Array]:
        """Scalars worth logging."""
        ...


def differentiable(model: PyTree) -> PyTree:
    """The model with every leaf that is no floating-point array replaced by None."""
    return eqx.filter(model, eqx.is_inexact_array)


def value_at(value: ScalarOrSchedule, count: jax.Array) -> Scalar:
    """A hyper-parameter at an update count, whether it is a number or a schedule."""
    return value(count) if callable(value) else value


def decay_mask_tree(mask: WeightDecayMask, params: PyTree) -> PyTree:
    """A bool for every leaf of params: True where weight decay applies.

    Raises:
        ValueError: if the mask is not a prefix of the parameters' tree.
    """
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    leaves = jax.tree.leaves(mask)
    # A tree of bools may itself be callable: that of a model is a module with __call__.
    is_tree = bool(leaves) and all(isinstance(leaf, bool) for leaf in leaves)
    tree = mask(params) if callable(mask) and not is_tree else mask
    try:
        return jax.tree.broadcast(tree, params)
    except ValueError as error:
        raise ValueError(f"weight_decay_mask does not fit the parameters' tree: {error}") from error


def check_same_structure(name: str, tree: PyTree, params: PyTree) -> None:
    """Raise a ValueError that names the first path where `tree` is not shaped like the parameters."""
    found, wanted = _shapes(tree), _shapes(params)
    for path in [*wanted, *found]:
        if found.get(path) != wanted.get(path):
            raise ValueError(
                f"{name}{path} has shape {found.get(path, 'missing')}, the parameter has {wanted.get(path, 'missing')}"
            )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(differentiable(tree))
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}


def check_range(name: str, value: Any, *, low: float, high: float = math.inf, low_open: bool = False) -> None:
    """Raise a ValueError where a concrete number is outside [low, high), or (low, high) with `low_open`."""
    if not isinstance(value, int | float):
        return
    if not (low < value if low_open else low <= value) or not value < high:
        raise ValueError(f"{name} is {value}; it must be in {'(' if low_open else '['}{low}, {high})")
