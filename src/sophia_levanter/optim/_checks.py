"""Argument and pytree checks. Under `jit` and `vmap`, numbers may be tracers, whose values cannot be checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from sophia_levanter.optim._trees import plain, trainable

ARRAYS = np.ndarray | jax.Array


def check_number(
    name: str, value: Any, *, low: float, high: float = math.inf, low_open: bool = False, schedule: bool = False
) -> None:
    """Raise an error unless a hyper-parameter is a number or array in [low, high), or in (low, high) if `low_open`.

    Traced arrays are accepted, because their values are unknown. If `schedule` is True, functions are accepted as well.
    """
    if callable(value) and not isinstance(value, type):
        if not schedule:
            raise TypeError(f"{name} is a function; it must be a number")
        return
    if isinstance(value, jax.core.Tracer):
        return
    is_number = isinstance(value, Real | ARRAYS) and not isinstance(value, bool)
    array = np.asarray(value if is_number else False)
    if not _is_real(array):
        kinds = "a number or a function of the update count" if schedule else "a number"
        raise TypeError(f"{name} is {value!r}; it must be {kinds}")
    inside = (low < array if low_open else low <= array) & (array < high)
    if not inside.all():
        raise ValueError(f"{name} is {value}; it must be in {'(' if low_open else '['}{low}, {high})")


def _is_real(array: Any) -> bool:
    return np.issubdtype(array.dtype, np.integer) or jnp.issubdtype(array.dtype, jnp.floating)


def python_number(value: Any) -> Any:
    """Convert a NumPy scalar or 0-d array to a Python number, which does not promote bfloat16. Keep other values."""
    scalar = isinstance(value, np.generic | np.ndarray) and value.shape == ()
    return value.item() if scalar and _is_real(value) else value


def whole_number(value: Any) -> Any:
    """Convert an integer of any type to an int. Return any other value unchanged, for `check_count` to reject."""
    try:
        return value if isinstance(value, bool | jax.Array) else operator.index(value)
    except TypeError:
        return value


def check_count(name: str, value: Any, *, low: int = 1) -> None:
    """Raise a ValueError unless the value is an int of at least `low`. JAX arrays are rejected: they may be traced."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {low}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError listing the choices unless the value is one of them."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def check_bool(name: str, value: Any) -> None:
    """Raise a TypeError unless the value is a Python bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")


def check_dtype(name: str, value: Any) -> None:
    """Raise a TypeError unless the value is None or a floating-point dtype."""
    try:
        floating = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"{name} is {value!r}; it must be a floating-point dtype such as jnp.bfloat16, or None")


def check_mesh_axis(value: Any) -> None:
    """Raise a TypeError unless the value is None or a string."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"mesh_axis is {value!r}; it must be the name of a mesh axis, or None")


def check_single(name: str, value: Any) -> None:
    """Raise a ValueError unless the value is a scalar, because an array would broadcast over the last axis."""
    if np.shape(value) != ():
        raise ValueError(f"{name} has shape {np.shape(value)}; it must be a single number (use vmap for several)")


def value_at(name: str, value: float | Array | Callable[[Array], Any], count: Any) -> Any:
    """Evaluate a hyper-parameter (a number or schedule) at an update count. A schedule must return a single number."""
    found = value(count) if callable(value) else value
    if not isinstance(found, Real | ARRAYS):
        raise TypeError(f"the schedule for {name} returned {found!r}; it must return a number")
    check_single(name, found)
    return found


def check_scalar(name: str, value: Any, what: str = "a scalar mean loss, for example from jnp.mean") -> Array:
    """Return the value as a plain array. Raise a ValueError if it is not a scalar, or a TypeError if it is not real."""
    value = plain(value)
    array = jnp.asarray(value) if isinstance(value, Real | ARRAYS) else None
    if array is None or jnp.iscomplexobj(array):
        raise TypeError(f"{name} is {value!r}; it must be {what}")
    if array.shape != ():
        raise ValueError(f"{name} has shape {array.shape}; it must be {what}")
    return array


def check_scalars(name: str, results: Any, what: Sequence[str]) -> list[Array]:
    """Return a function's results as arrays. Raise an error unless they are real scalars, one per entry of `what`."""
    if not isinstance(results, tuple | list) or len(results) != len(what):
        raise TypeError(f"{name} must return {len(what)} scalars: {', '.join(what)}")
    named = zip(("first", "second", "third"), results, what, strict=False)
    return [check_scalar(f"the {ordinal} result of {name}", result, wanted) for ordinal, result, wanted in named]


def check_key(key: Any) -> None:
    """Raise a TypeError unless the key is an array. JAX random keys are arrays."""
    if not isinstance(key, ARRAYS):
        raise TypeError(f"key is {key!r}; it must be a JAX random key, such as jax.random.key(0)")


def check_flag(name: str, value: Any) -> Bool[Array, ""]:
    """Return the value as a bool scalar. Raise a TypeError if it is not one."""
    if not isinstance(value, bool | np.bool_ | ARRAYS) or jnp.asarray(value).dtype != bool:
        raise TypeError(f"{name} is {value!r}; it must be a bool")
    if jnp.shape(value) != ():
        raise TypeError(f"{name} has shape {jnp.shape(value)}; it must be a single bool")
    return jnp.asarray(value)


def check_not_negative(name: str, values: Any) -> None:
    """Raise a ValueError if a concrete array has a negative entry, or a TypeError if it is complex."""
    array = plain(values)
    if array is None or isinstance(array, jax.core.Tracer):
        return
    if np.iscomplexobj(array):
        raise TypeError(f"{name} are complex; they must be real")
    if (np.asarray(array) < 0).any():
        raise ValueError(f"{name} contain a negative entry; they must be at least 0")


def check_parameters(model: PyTree) -> None:
    """Raise a ValueError if the model has no floating-point leaf, or a TypeError if a leaf is complex."""
    if not jax.tree.leaves(trainable(model)):
        raise ValueError(
            "the model has no floating-point array to optimize; integers, static leaves and Python numbers are left "
            "unchanged (convert numbers with jnp.asarray)"
        )
    check_real("model", model)


def check_real(name: str, tree: PyTree) -> None:
    """Raise a TypeError naming the path of the first complex leaf, if any."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable(tree)):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is complex ({leaf.dtype}); "
                "store its real and imaginary parts as two real arrays"
            )


def check_same_structure(name: str, tree: PyTree, params: PyTree) -> None:
    """Raise a ValueError naming the first path where `tree` and `params` differ, or a TypeError for a complex leaf."""
    check_real(name, tree)
    found, wanted = (
        {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(trainable(t))}
        for t in (tree, params)
    )
    for path in [*wanted, *found]:
        if found.get(path) != wanted.get(path):
            if path not in found:
                raise ValueError(f"{name}{path} is missing, but the parameter has shape {wanted[path]}")
            if path not in wanted:
                raise ValueError(f"{name}{path} has shape {found[path]}, but the model has no such parameter")
            raise ValueError(f"{name}{path} has shape {found[path]}, but the parameter has shape {wanted[path]}")
    ours, theirs = (str(jax.tree.structure(trainable(t))) for t in (tree, params))
    if ours != theirs:
        raise ValueError(f"{name} and the parameters have different containers or axes: {ours} and {theirs}")
