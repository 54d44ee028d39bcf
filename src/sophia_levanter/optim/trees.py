"""What is done to whole trees of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
WeightDecayMask = PyTree | Callable[[PyTree], PyTree] | None
BOOLS = bool | np.bool_


def differentiable(model: PyTree) -> PyTree:
    """The model with every leaf that is no floating-point array replaced by None."""
    return eqx.filter(model, eqx.is_inexact_array)


def widened(x: jax.Array) -> jax.Array:
    """In at least float32: the square of a small float16 number underflows, and averages in bfloat16 stand still."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def all_finite(tree: PyTree) -> jax.Array:
    """bool scalar: whether every number of every array is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(differentiable(tree)) if leaf.size]
    # The maximum passes nan on, and is several times faster on CPUs than a conjunction of bools.
    return (
        jnp.all(jnp.stack([jnp.isfinite(jnp.max(jnp.abs(leaf))) for leaf in leaves])) if leaves else jnp.asarray(True)
    )


def where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Arrays of `new` where the condition holds, of `old` elsewhere; leaves that are no arrays are those of `old`."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o) if eqx.is_array(n) else o, new, old)


def total(tree: PyTree) -> jax.Array:
    """The sum over all leaves, in at least float32."""
    return sum((jnp.sum(widened(leaf)) for leaf in jax.tree.leaves(tree)), start=jnp.zeros((), jnp.float32))


def norm(tree: PyTree) -> jax.Array:
    """The global 2-norm, in at least float32."""
    return jnp.sqrt(total(jax.tree.map(lambda x: jnp.square(widened(x)), tree)))


def decay_mask_tree(mask: WeightDecayMask, params: PyTree) -> PyTree:
    """A bool for every leaf of params: True where weight decay applies.

    Args:
        mask: a tree of bools, or a prefix of one, or a function from parameters to one; None is True everywhere.
        params: the parameters; optax's masked nodes among them are left out, as `optax.multi_transform` needs.

    Raises:
        ValueError: if a parameter has no bool in the mask, or a bool of the mask no parameter; names the path.
        TypeError: if a leaf of the mask is no bool.
    """
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    leaves = jax.tree.leaves(mask)
    # A tree of bools may itself be callable: that of a model is a module with __call__.
    is_tree = bool(leaves) and all(isinstance(leaf, BOOLS) for leaf in leaves)
    bools = _by_path(mask(params) if callable(mask) and not is_tree else mask)
    for path, value in bools.items():
        if not isinstance(value, BOOLS):
            raise TypeError(f"weight_decay_mask{jax.tree_util.keystr(path)} is {value!r}; it must be True or False")
    used = set()

    def decays(path: tuple, _: jax.Array) -> bool:
        covering = next((path[:n] for n in range(len(path) + 1) if path[:n] in bools), None)
        if covering is None:
            raise ValueError(f"weight_decay_mask does not fit the parameters: it has nothing for {_name(path)}")
        used.add(covering)
        return bool(bools[covering])

    tree = jax.tree_util.tree_map_with_path(decays, params)
    # What is no parameter here: other leaves of the model, empty parts, and what optax masked.
    elsewhere = [path for path, leaf in _by_path(params, empty_too=True).items() if not eqx.is_array(leaf)]
    for path in bools:
        if path not in used and not any(path[: len(e)] == e or e[: len(path)] == path for e in elsewhere):
            raise ValueError(f"weight_decay_mask does not fit the parameters: {_name(path)} is no parameter")
    return tree


def _by_path(tree: PyTree, *, empty_too: bool = False) -> dict[tuple, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=(lambda x: not jax.tree.leaves(x)) if empty_too else None
    )
    return dict(leaves)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path) or "the whole tree"
