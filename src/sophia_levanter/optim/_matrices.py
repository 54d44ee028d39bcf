"""Views of parameters as matrices, and functions that divide the work on matrices among devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree
from optax.contrib import MuonDimensionNumbers

from sophia_levanter.optim._trees import fit_prefix

Matrices: TypeAlias = PyTree | Callable[[PyTree], PyTree] | None


@jax.tree_util.register_static
class MatrixView:
    """View of a parameter with any number of axes as one or more [in, out] matrices.

    Attributes:
        shape: the parameter's shape.
        sizes: (number of matrices, in, out).
    """

    def __init__(self, axes: MuonDimensionNumbers, shape: Sequence[int]) -> None:
        inputs, outputs = (_numbers(group, len(shape)) for group in axes)
        others = tuple(axis for axis in range(len(shape)) if axis not in inputs + outputs)
        self.shape = tuple(shape)
        self._order = others + inputs + outputs
        self._sides = len(inputs + outputs)
        self.sizes = tuple(math.prod(shape[axis] for axis in group) for group in (others, inputs, outputs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MatrixView) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    @property
    def sides(self) -> tuple[int, ...]:
        """The input and output axes of the parameter."""
        return self._order[len(self._order) - self._sides :]

    def stack(self, x: Array) -> Array:
        """Reshape an array from the parameter's shape to [matrix, inputs ..., outputs ...].

        The result can be sharded like the parameter, which is often impossible for an array [matrix, in, out].
        """
        x = jnp.transpose(x, self._order)
        return x.reshape(self.sizes[0], *x.shape[len(self.shape) - self._sides :])

    def matrices(self, stack: Array) -> Array:
        """Reshape a stack, or some of its matrices, to [matrix, in, out]."""
        return stack.reshape(len(stack), *self.sizes[1:])

    def parameter(self, x: Array) -> Array:
        """Reshape a stack to the parameter's shape."""
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        return jnp.transpose(x.reshape([self.shape[axis] for axis in self._order]), back)


def by_matrix(
    mesh_axis: str | None, function: Callable[..., PyTree], items: Sequence[tuple[PyTree, ...]]
) -> list[PyTree]:
    """Return `[function(*item) for item in items]`, with the matrices divided among the devices along a mesh axis.

    An item whose number of matrices is a multiple of the number of devices is split directly. Other items with equal
    shapes and views are concatenated and padded with zeros, so that parameters with one matrix each are split as well.

    Args:
        mesh_axis: an axis of the mesh set by `jax.set_mesh`. Every device does all of the work if the call
            is outside `jit`, no mesh is set, the mesh lacks this axis, or the axis type is not `AxisType.Auto`.
        function: a function that processes each matrix independently.
        items: pytrees of stacks [matrix, ...]; all stacks and results of an item have the same number of matrices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    num_devices = mesh.shape[mesh_axis] if mesh_axis in mesh.auto_axes else 1
    if num_devices == 1 or not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(list(items))):
        return [function(*item) for item in items]

    groups: dict[Any, list[int]] = {}
    for index, item in enumerate(items):
        stacks, structure = jax.tree.flatten(item)
        shapes = structure, *((x.shape[1:], x.dtype) for x in stacks)
        groups.setdefault(shapes if len(stacks[0]) % num_devices else index, []).append(index)

    def split(x: Array) -> Array:
        """Shard an axis within the matrices, so that stacks are joined, padded and sliced without communication."""
        axis = next((axis for axis in range(1, x.ndim) if x.shape[axis] % num_devices == 0), None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, mesh_axis)
        return jax.lax.with_sharding_constraint(x, spec)

    def pool(*stacks: Array) -> Array:
        padding = jnp.zeros((-sum(map(len, stacks)) % num_devices, *stacks[0].shape[1:]), stacks[0].dtype)
        return split(jnp.concatenate([*map(split, stacks), padding]))

    spec = PartitionSpec(mesh_axis)
    shared = jax.shard_map(lambda item: function(*item), in_specs=spec, out_specs=spec, check_vma=False)
    results: list[PyTree] = [None] * len(items)
    for key, indices in groups.items():
        if isinstance(key, int):
            results[key] = shared(items[key])
            continue
        pooled = jax.tree.map(split, shared(jax.tree.map(pool, *(items[index] for index in indices))))
        start = 0
        for index in indices:
            end = start + len(jax.tree.leaves(items[index])[0])
            results[index] = jax.tree.map(lambda x, part=slice(start, end): x[part], pooled)
            start = end
    return results


def matrix_views(matrices: Matrices, params: PyTree) -> list[MatrixView | None]:
    """Return the view of each leaf, or None if it is not a matrix, in leaf order; see `matrices_tree`."""
    leaves, structure = jax.tree.flatten(params)
    entries = structure.flatten_up_to(matrices_tree(matrices, params))  # type: ignore[attr-defined]
    return [
        None if entry is None else MatrixView(entry, leaf.shape) for entry, leaf in zip(entries, leaves, strict=True)
    ]


def matrices_tree(matrices: Matrices, params: PyTree) -> PyTree:
    """Return a pytree with `MuonDimensionNumbers` for each leaf of `params` that is a matrix, and None for all others.

    `matrices` is as for `Muon`. Raise an error that names the path if an entry is invalid or matches no parameter.
    """
    if matrices is None:
        return jax.tree.map(lambda x: MuonDimensionNumbers() if x.ndim == 2 else None, params)
    fitted = fit_prefix("matrices", matrices, params, _is_entry, "a MuonDimensionNumbers or None")
    jax.tree_util.tree_map_with_path(_check_axes, params, fitted)
    return fitted


def _is_entry(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)


def _check_axes(path: tuple, x: Array, entry: MuonDimensionNumbers | None) -> None:
    """Raise a ValueError unless the axes exist and are distinct. Optax would wrap out-of-range axes around."""
    if entry is None:
        return
    groups = [(axes,) if isinstance(axes, int) else tuple(axes) for axes in entry]
    inside = all(-x.ndim <= axis < x.ndim for group in groups for axis in group)
    axes = [axis for group in groups for axis in _numbers(group, x.ndim)] if inside else []
    if not (all(groups) and inside and len(set(axes)) == len(axes)):
        name = f"matrices{jax.tree_util.keystr(path)}"
        raise ValueError(f"{name} is {entry}; it must specify distinct axes of the parameter's shape {x.shape}")


def _numbers(group: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(axis % ndim for axis in ((group,) if isinstance(group, int) else group))
