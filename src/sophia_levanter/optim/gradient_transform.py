"""An optax transformation of the gradient, such as clipping, before an optimizer sees it."""

from __future__ import annotations

from typing import Any

import jax
import optax

from sophia_levanter.optim.checks import check_same_structure
from sophia_levanter.optim.trees import all_finite, where

PyTree = Any


def check_gradient_transform(value: Any) -> None:
    """Raise a TypeError if the value is neither None nor an optax transformation."""
    missing = not (hasattr(value, "init") and hasattr(value, "update")) or isinstance(value, type)
    # Our own optimizers have both, and would turn the step around.
    if value is not None and (missing or hasattr(value, "refresh_due")):
        raise TypeError(
            f"gradient_transform is {value!r}; "
            "it must be an optax transformation, as optax.clip_by_global_norm(1.0) gives"
        )


def init_transform(transform: optax.GradientTransformation | None, params: PyTree) -> PyTree | None:
    """The transformation's first state; None without one."""
    return None if transform is None else transform.init(params)


def transform_gradient(
    transform: optax.GradientTransformation | None, grads: PyTree, state: PyTree, params: PyTree, finite: jax.Array
) -> tuple[PyTree, PyTree, jax.Array]:
    """The transformed gradient, the transformation's next state, and whether the gradient still is finite.

    The state stays as it was where the gradient is not finite.
    """
    if transform is None:
        return grads, state, finite
    transformed, new_state = transform.update(grads, state, params)
    check_same_structure("the gradient after gradient_transform", transformed, params)
    finite = finite & all_finite(transformed)
    return transformed, where(finite, new_state, state), finite
