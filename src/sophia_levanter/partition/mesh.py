"""Devices as a mesh, and which named axis lies along which of its axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import numpy as np
from haliax import NamedArray
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import sophia_levanter.jax_compatibility  # noqa: F401
from sophia_levanter.config.mesh import MESH_AXES, MeshConfig
from sophia_levanter.partition.processes import all_devices

AxisMapping = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Partition:
    """Where arrays lie. Compared by identity, so that compiled functions can be kept for one.

    Attributes:
        mesh: the devices.
        compute: the mesh axes of each named axis, for activations and for parameters while they are in use.
        parameters: the same for parameters, optimizer state and gradients at rest.
    """

    mesh: Mesh
    compute: AxisMapping
    parameters: AxisMapping

    def place(self, tree: Any) -> Any:
        """The tree on the devices: named arrays as at rest, stacks of square matrices in parts, all else whole.

        Every process gives the same values and keeps its part of them.
        """

        def put(x: Any, sharding: NamedSharding) -> Any:
            if sharding.is_fully_addressable:
                return jax.device_put(x, sharding)
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return self._map_arrays(put, tree)

    def abstract(self, make: Callable[[], Any]) -> Any:
        """What `place(make())` would give, as `jax.ShapeDtypeStruct`s with their shardings; nothing is computed."""

        def describe(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return self._map_arrays(describe, eqx.filter_eval_shape(make))

    def init_sharded(self, make: Callable[..., Any], *placed: Any) -> Any:
        """What `place(make(*placed))` would give, computed where it lies: no device ever holds the whole.

        Args:
            make: a function of arrays. A `jax.tree_util.Partial` of the same function and arguments compiles once.
            placed: its arguments, as `place` gives them.
        """
        with self.active():
            return _init_sharded(self, make, placed)

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context in which named axes follow this partition: trace and run steps inside it."""
        token = _active.set(self)
        try:
            with hax.partitioning.set_mesh(self.mesh), hax.axis_mapping(self.compute):
                yield
        finally:
            _active.reset(token)

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`: what the devices are, or are compiled for."""
        return self.mesh.devices.flat[0].platform

    @property
    def row_shards(self) -> int:
        """Over how many devices the rows of a batch are spread."""
        return math.prod(self.mesh.shape[axis] for axis in self.compute["batch"])

    def rows_of_this_process(self, num_rows: int) -> np.ndarray:
        """Numbers of the rows of a microbatch that devices of this process have, ascending: int [row]."""
        sharding = NamedSharding(self.mesh, PartitionSpec(self.compute["batch"]))
        wanted = np.zeros(num_rows, bool)
        for index in sharding.addressable_devices_indices_map((num_rows,)).values():
            wanted[index] = True
        return np.flatnonzero(wanted)

    def _map_arrays(self, function: Callable[[Any, NamedSharding], Any], tree: Any) -> Any:
        """`function(array, its sharding)` for every array of the tree."""

        def is_array(x: Any) -> bool:
            return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)

        def visit(x: Any) -> Any:
            if not isinstance(x, NamedArray):
                return function(x, NamedSharding(self.mesh, self._unnamed(x.shape))) if is_array(x) else x
            # Where optax masks parameters, its state has named axes without an array.
            if not is_array(x.array):
                return x
            spec = PartitionSpec(*(self.parameters.get(axis.name) for axis in x.axes))
            return NamedArray(function(x.array, NamedSharding(self.mesh, spec)), x.axes)

        return jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, NamedArray))

    def _unnamed(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Stacks of square matrices, as a Kronecker basis has them, are split by matrix, or by rows if that does not
        divide; any other array without names is on every device."""
        parts = self.mesh.shape["data"]
        if parts > 1 and len(shape) == 3 and shape[1] == shape[2]:
            if shape[0] % parts == 0:
                return PartitionSpec("data")
            if shape[1] % parts == 0:
                return PartitionSpec(None, "data")
        return PartitionSpec()


_active: ContextVar[Partition | None] = ContextVar("partition", default=None)


@eqx.filter_jit
def _init_sharded(partition: Partition, make: Callable[..., Any], placed: tuple[Any, ...]) -> Any:
    return shard_params(make(*placed))


def partition_of(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Partition:
    """The partition that a configuration means, the same object for the same arguments.

    Args:
        config: sizes and axes; if not given, rows are spread over all devices.
        devices: all that jax has if not given; those of a topology to compile for do too.

    Raises:
        InputError: if the sizes do not fit the devices, or jax cannot start the platform it is told to use.
    """
    return _partition_of(config or MeshConfig(), tuple(all_devices() if devices is None else devices))


@lru_cache(maxsize=8)
def _partition_of(config: MeshConfig, devices: tuple[Any, ...]) -> Partition:
    sizes = config.sizes(len(devices))
    mesh = Mesh(arranged(tuple(sizes.values()), devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return Partition(mesh, config.compute_mapping, config.parameter_mapping)


def arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the mesh's shape: fast links inside a replica, slow ones between them."""
    replicas, *inner = shape
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1 and len(slices) == replicas:
        return mesh_utils.create_hybrid_device_mesh(
            (1, *inner), (replicas, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def active_partition() -> Partition | None:
    """The partition in whose context this is called, if any."""
    return _active.get()


def active_platform() -> str:
    """The kind of device that what is traced here runs on: `cpu`, `gpu` or `tpu`."""
    partition = _active.get()
    return jax.default_backend() if partition is None else partition.platform


def is_split() -> bool:
    """Whether parameters are split over data where this is called."""
    partition = _active.get()
    return partition is not None and partition.mesh.shape["data"] > 1 and partition.parameters != partition.compute


def is_axis_split(name: str) -> bool:
    """Whether a named axis of activations is split over devices where this is called."""
    partition = _active.get()
    return partition is not None and any(partition.mesh.shape[axis] > 1 for axis in partition.compute.get(name, ()))


def row_shards() -> int:
    """Over how many devices the rows of a batch are spread where this is called; 1 without a partition."""
    partition = _active.get()
    return 1 if partition is None else partition.row_shards


def shard_params(tree: Any) -> Any:
    """Inside a compiled function: parameters, gradients or optimizer state laid out as `Partition.place` does."""
    partition = _active.get()
    if partition is None or partition.mesh.size == 1:
        return tree
    return partition._map_arrays(jax.lax.with_sharding_constraint, tree)


def by_row_shard(tree: Any) -> Any:
    """Arrays [shard, ...], each shard of rows with the devices that have these rows."""
    partition = _active.get()
    if partition is None or partition.mesh.size == 1:
        return tree
    rows = partition.compute["batch"]

    def lay(x: jax.Array) -> jax.Array:
        rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, *rest))

    return jax.tree.map(lay, tree)


def gather_params(tree: Any) -> Any:
    """Parameters at rest as a layer needs them; their gradients go back to where the parameters lie.

    Under FSDP the forward pass gathers the whole arrays and the backward pass scatters the summed gradient. A scanned
    layer that calls it on itself has one layer's parameters whole at a time.
    """
    partition = _active.get()
    if partition is None or partition.mesh.size == 1:
        return tree
    parameters, rest = eqx.partition(tree, eqx.is_inexact_array)

    def gathered(parameters: Any) -> Any:
        return hax.shard(parameters, partition.compute)

    # A sharding constraint's own transpose would gather the gradient as well.
    use = jax.custom_vjp(gathered)
    use.defvjp(lambda p: (gathered(p), None), lambda _, gradients: (hax.shard(gradients, partition.parameters),))
    return eqx.combine(use(parameters), rest)
