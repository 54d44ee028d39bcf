"""Devices as a mesh, and which named axis lies along which of its axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import numpy as np
from haliax import NamedArray
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sophia_levanter.errors import InputError

AXIS_MAPPING = {"batch": "data"}


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, `data`, over the devices (all of them if not given).

    Raises:
        InputError: if jax cannot start the platform it is told to use.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except RuntimeError as error:
        raise InputError(f"jax finds no devices: {str(error).splitlines()[0]}") from error
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def check_batch_divides(field: str, rows: int, mesh: Mesh) -> None:
    """Refuse a microbatch that does not divide over the devices.

    Raises:
        InputError: names the field, the device count and the nearest multiple.
    """
    if rows % mesh.size:
        nearest = max(1, round(rows / mesh.size)) * mesh.size
        raise InputError(
            f"{field} {rows} does not divide over {mesh.size} devices; "
            f"a multiple of {mesh.size} such as {nearest} would"
        )


def place(tree: Any, mesh: Mesh) -> Any:
    """The tree on the mesh's devices: named arrays by `AXIS_MAPPING`, all else on every device."""

    return _map_arrays(jax.device_put, tree, mesh)


def abstract(make: Callable[[], Any], mesh: Mesh) -> Any:
    """What `place(make(), mesh)` would give, as `jax.ShapeDtypeStruct`s with their shardings; nothing is computed."""

    def describe(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return _map_arrays(describe, eqx.filter_eval_shape(make), mesh)


def _map_arrays(function: Callable[[Any, NamedSharding], Any], tree: Any, mesh: Mesh) -> Any:
    """`function(array, its sharding)` for every array of the tree."""

    def is_array(x: Any) -> bool:
        return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)

    def visit(x: Any) -> Any:
        if not isinstance(x, NamedArray):
            return function(x, NamedSharding(mesh, PartitionSpec())) if is_array(x) else x
        # Where optax masks parameters, its state has named axes without an array.
        if not is_array(x.array):
            return x
        spec = PartitionSpec(*(AXIS_MAPPING.get(axis.name) for axis in x.axes))
        return NamedArray(function(x.array, NamedSharding(mesh, spec)), x.axes)

    return jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, NamedArray))


@contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """A context in which named axes follow `AXIS_MAPPING` over the mesh: trace and run steps inside it."""
    with hax.partitioning.set_mesh(mesh), hax.axis_mapping(AXIS_MAPPING):
        yield
