"""Trees of arrays: which leaves are saved and under which names, and how what was read goes onto the devices."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import FlattenedIndexKey, keystr, tree_flatten_with_path, tree_unflatten

from sophia_levanter.checkpoint.arrays import read_parts
from sophia_levanter.checkpoint.manifest import Box, SavedArray
from sophia_levanter.checkpoint.shards import box_of, whole
from sophia_levanter.errors import InputError

Tree = TypeVar("Tree")


def arrays_of(tree: Any) -> dict[str, Any]:
    """The array leaves of `tree` by path (`model.layers.0.weight`).

    jax and numpy arrays, numpy scalars and `jax.ShapeDtypeStruct` count; Python numbers, as in Equinox, do not.
    """
    return {path: leaf for path, leaf in _named_leaves(tree)[0] if _is_array(leaf)}


def read_tree(
    folder: str, saved: Sequence[SavedArray], like: Tree, *, cast: bool, added: Mapping[str, int] | None = None
) -> Tree:
    """`like` with the saved arrays in place of its own, each with the sharding of the one it replaces.

    Args:
        folder: the path or URL that holds the arrays.
        saved: what is there.
        like: what is wanted.
        cast: whether floating-point arrays may be of another dtype than the wanted one.
        added: the value of a scalar, by path, that `like` has and what is there may lack.

    Raises:
        InputError: if the arrays are not those of `like`.
        CheckpointError: if one cannot be read.
    """
    named, structure = _named_leaves(like)
    there = {array.path: array for array in saved}
    new = {path: value for path, value in (added or {}).items() if path not in there}
    wanted = {path: leaf for path, leaf in named if _is_array(leaf) and path not in new}
    _check_model(folder, there, wanted, cast)
    parts = read_parts(folder, [(there[path], _wanted_boxes(leaf)) for path, leaf in wanted.items()])
    placed = {path: _place(path, part, wanted[path]) for path, part in zip(wanted, parts, strict=True)}
    for path, leaf in named:
        if path in new:
            placed[path] = _place(path, {whole(()): np.asarray(new[path])}, leaf)
    return tree_unflatten(structure, [placed.get(path, leaf) for path, leaf in named])


def _named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    leaves, structure = tree_flatten_with_path(tree)
    named = [(_name(path), leaf) for path, leaf in leaves]
    taken: set[str] = set()
    for name, _ in named:
        if name in taken:
            raise ValueError(f"two leaves of the tree are called {name}: rename the key of one")
        taken.add(name)
    return named, structure


def _name(path: tuple[Any, ...]) -> str:
    # The array inside a NamedArray has the index 0 and no name: it goes by the name of its NamedArray.
    if path and path[-1] == FlattenedIndexKey(0):
        path = path[:-1]
    return keystr(path, simple=True, separator=".")


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _check_model(folder: str, there: dict[str, SavedArray], wanted: dict[str, Any], cast: bool) -> None:
    """Refuse a checkpoint of another model: that is not damage, and an older one would not do either."""
    for path in [*wanted, *there]:
        if path in there and path in wanted and there[path].shape == wanted[path].shape:
            saved_dtype, dtype = there[path].numpy_dtype, wanted[path].dtype
            castable = cast and all(jnp.issubdtype(d, np.floating) for d in (saved_dtype, dtype))
            if saved_dtype.name == dtype.name or castable:
                continue
        saved = f"{there[path].dtype}{list(there[path].shape)}" if path in there else "missing"
        here = f"{wanted[path].dtype.name}{list(wanted[path].shape)}" if path in wanted else "missing"
        raise InputError(
            f"{folder} is of another model or optimizer: leaf {path} is {saved} in the checkpoint "
            f"and {here} in this run; use the configuration it was saved with"
        )


def _sharding(like: Any) -> jax.sharding.Sharding | None:
    """None where the array would move with the default device."""
    if isinstance(like, jax.Array) and not like.committed:
        return None
    return getattr(like, "sharding", None)


def _wanted_boxes(like: Any) -> set[Box]:
    sharding = _sharding(like)
    if sharding is None:
        return {whole(like.shape)}
    return {box_of(index, like.shape) for index in sharding.addressable_devices_indices_map(like.shape).values()}


def _place(path: str, parts: dict[Box, np.ndarray], like: Any) -> Any:
    parts = {box: part.astype(like.dtype, copy=False) for box, part in parts.items()}
    if isinstance(like, np.ndarray | np.generic):
        return parts[whole(like.shape)]
    sharding = _sharding(like)
    if sharding is None:
        placed = jax.device_put(parts[whole(like.shape)])
    else:
        placed = jax.make_array_from_callback(like.shape, sharding, lambda index: parts[box_of(index, like.shape)])
    if placed.dtype != like.dtype:
        raise InputError(f"leaf {path} is {like.dtype.name}, but jax makes it {placed.dtype.name}: set jax_enable_x64")
    return placed
