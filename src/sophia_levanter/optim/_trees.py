"""Operations on pytrees of parameters, and on Haliax NamedArrays without importing haliax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

WeightDecayMask: TypeAlias = PyTree[bool | float] | Callable[[PyTree], PyTree[bool | float]] | None


def trainable(model: PyTree) -> PyTree:
    """Return the model with None in place of every leaf that is not a floating-point array."""
    return eqx.filter(model, eqx.is_inexact_array)


def wide_dtype(x: Any) -> Any:
    """Return the dtype of an array, promoted to at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def upcast(x: Array) -> Array:
    """Cast to at least float32. Squares of small float16 numbers would underflow, and averages in bfloat16 stall."""
    return x.astype(wide_dtype(x))


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Return whether all numbers in all arrays are finite."""
    leaves = [leaf for leaf in jax.tree.leaves(trainable(tree)) if leaf.size]
    if not leaves:
        return jnp.asarray(True)
    # The maximum propagates nan and, on CPUs, is several times faster than a logical reduction of bools.
    return jnp.all(jnp.stack([jnp.isfinite(jnp.max(jnp.abs(leaf))) for leaf in leaves]))


def select(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """Select the arrays of `new` if the condition holds, otherwise those of `old`. Keep other leaves of `old`."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o) if eqx.is_array(n) else o, new, old)


def total(tree: PyTree) -> Float[Array, ""]:
    """Return the sum over all leaves, in float32 or wider."""
    return sum((jnp.sum(upcast(leaf)) for leaf in jax.tree.leaves(tree)), start=jnp.zeros((), jnp.float32))


def norm(tree: PyTree) -> Float[Array, ""]:
    """Return the global 2-norm, in float32 or wider."""
    return jnp.sqrt(total(jax.tree.map(lambda x: jnp.square(upcast(x)), tree)))


def num_coordinates(tree: PyTree) -> float:
    """Return the number of coordinates for use as a divisor: at least 1, and a float because int32 may overflow."""
    return float(max(1, sum(leaf.size for leaf in jax.tree.leaves(tree))))


def decay_mask_tree(mask: WeightDecayMask, params: PyTree) -> PyTree[bool | float]:
    """Return, for every leaf of `params`, whether weight decay applies, or the factor by which to multiply its rate.

    Args:
        mask: a pytree of bools or factors (or a prefix of one), or a function that maps the parameters to one. None
            means True everywhere.
        params: the parameters; nodes masked by optax are ignored, as required by `optax.multi_transform`.

    Raises:
        ValueError: if a parameter has no entry in the mask, or an entry has no parameter; the error names the path.
        TypeError: if a leaf of the mask is neither a bool nor a float of at least 0.
    """
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    fitted = fit_prefix("weight_decay_mask", mask, params, _is_factor, "True, False or a factor")
    return jax.tree.map(lambda x: float(x) if isinstance(x, float) else bool(x), fitted)


def _is_factor(x: Any) -> bool:
    return isinstance(x, bool | np.bool_) or (isinstance(x, float) and 0 <= x < float("inf"))


def fit_prefix(name: str, spec: PyTree, params: PyTree, is_entry: Callable[[Any], bool], wanted: str) -> PyTree:
    """Return an entry for each leaf of `params`, given a tree of entries, a prefix of one, or a function returning one.

    Raise a ValueError if entries and parameters do not correspond, or a TypeError if a leaf is not an entry.
    """
    leaves = jax.tree.leaves(spec, is_leaf=is_entry)
    # A tree of entries may itself be callable: a tree structured like a model is a module with __call__.
    is_tree = bool(leaves) and all(map(is_entry, leaves))
    tree = spec(params) if callable(spec) and not is_tree else spec
    entries = dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_entry))
    for path, entry in entries.items():
        if not is_entry(entry):
            raise TypeError(f"{name}{jax.tree_util.keystr(path)} is {entry!r}; it must be {wanted}")
    used = set()

    def covering(path: tuple, _: Array) -> Any:
        prefix = next((path[:n] for n in range(len(path) + 1) if path[:n] in entries), None)
        if prefix is None:
            raise ValueError(f"{name} does not match the parameters: it has no entry for {_path_name(path)}")
        used.add(prefix)
        return entries[prefix]

    fitted = jax.tree_util.tree_map_with_path(covering, params)
    # Leaves that are not parameters, empty subtrees, and leaves masked by optax may also have entries.
    parts = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: not jax.tree.leaves(x))
    others = [path for path, leaf in parts if not eqx.is_array(leaf)]
    for path, entry in entries.items():
        if path not in used and entry is not None and not any(_overlap(path, other) for other in others):
            raise ValueError(f"{name} does not match the parameters: {_path_name(path)} is not a parameter")
    return fitted


def _overlap(path: tuple, other: tuple) -> bool:
    shared = min(len(path), len(other))
    return path[:shared] == other[:shared]


def _path_name(path: tuple) -> str:
    return jax.tree_util.keystr(path) or "the whole tree"


def is_named(x: Any) -> bool:
    """Return whether `x` is an array with named axes."""
    return hasattr(x, "axes") and hasattr(x, "array") and hasattr(x, "resolve_axis")


def plain(x: Any) -> Any:
    """Return the array without axis names."""
    return x.array if is_named(x) else x


def axis_names(x: Any) -> str:
    """Return the axis names of a NamedArray, for an error message."""
    return ", ".join(axis.name for axis in x.axes)
