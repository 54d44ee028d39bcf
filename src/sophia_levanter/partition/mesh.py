"""The device mesh, and the mapping from named axes to mesh axes."""

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
    """Shards arrays over a mesh. Partitions compare by identity, so compiled functions can be cached per partition.

    Attributes:
        mesh: the device mesh.
        compute: the mesh axes that shard each named axis of activations, and of parameters during computation.
        parameters: the same mapping for stored parameters, optimizer state and gradients.
    """

    mesh: Mesh
    compute: AxisMapping
    parameters: AxisMapping

    def place(self, tree: Any) -> Any:
        """Place a tree on the devices.

        Named arrays are sharded according to `parameters`, stacks of square matrices are sharded by matrix or by row,
        and all other arrays are replicated. All processes must pass the same values; each keeps only its own shards.
        """

        def put(x: Any, sharding: NamedSharding) -> Any:
            if sharding.is_fully_addressable:
                return jax.device_put(x, sharding)
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return self._map_arrays(put, tree)

    def abstract(self, make: Callable[[], Any]) -> Any:
        """Return the result of `place(make())` as `jax.ShapeDtypeStruct`s with shardings, without computing it."""

        def describe(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return self._map_arrays(describe, eqx.filter_eval_shape(make))

    def init_sharded(self, make: Callable[..., Any], *placed: Any) -> Any:
        """Compute `place(make(*placed))` in shards, so that no device ever holds the whole result.

        Args:
            make: a function of arrays. A `jax.tree_util.Partial` of the same function and arguments compiles only once.
            placed: the arguments of `make`, as returned by `place`.
        """
        with self.active():
            return _init_sharded(self, make, placed)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Activate this partition, so that it shards named axes. Trace and run steps inside this context."""
        token = _active.set(self)
        try:
            with hax.partitioning.set_mesh(self.mesh), hax.axis_mapping(self.compute):
                yield
        finally:
            _active.reset(token)

    @property
    def platform(self) -> str:
        """The platform of the devices: `cpu`, `gpu` or `tpu`."""
        return self.mesh.devices.flat[0].platform

    @property
    def row_shards(self) -> int:
        """The number of shards into which the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.compute["batch"])

    def rows_of_this_process(self, num_rows: int) -> np.ndarray:
        """Return the indices of the microbatch rows on this process's devices, in ascending order, int [row]."""
        sharding = NamedSharding(self.mesh, PartitionSpec(self.compute["batch"]))
        wanted = np.zeros(num_rows, bool)
        for index in sharding.addressable_devices_indices_map((num_rows,)).values():
            wanted[index] = True
        return np.flatnonzero(wanted)

    def _map_arrays(self, function: Callable[[Any, NamedSharding], Any], tree: Any) -> Any:
        """Apply `function(array, sharding)` to every array in a tree."""

        def is_array(x: Any) -> bool:
            return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)

        def visit(x: Any) -> Any:
            if not isinstance(x, NamedArray):
                return function(x, NamedSharding(self.mesh, self._unnamed(x.shape))) if is_array(x) else x
            # For masked parameters, optax's state has named axes without an array.
            if not is_array(x.array):
                return x
            spec = PartitionSpec(*(self.parameters.get(axis.name) for axis in x.axes))
            return NamedArray(function(x.array, NamedSharding(self.mesh, spec)), x.axes)

        return jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, NamedArray))

    def _unnamed(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Return the partition spec of an unnamed array.

        Stacks of square matrices, such as Kronecker bases, are sharded by matrix, or by row if the number of matrices
        is not divisible by the size of the `data` axis. Other arrays are replicated.
        """
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
    """Return the partition for a configuration. Calls with the same arguments return the same object.

    Args:
        config: the mesh configuration; by default, batch rows are sharded over all devices.
        devices: the devices, which may belong to a topology used only for compilation; by default, all jax devices.

    Raises:
        InputError: if the sizes do not fit the devices, or jax cannot start the selected platform.
    """
    return _partition_of(config or MeshConfig(), tuple(all_devices() if devices is None else devices))


@lru_cache(maxsize=8)
def _partition_of(config: MeshConfig, devices: tuple[Any, ...]) -> Partition:
    sizes = config.sizes(len(devices))
    mesh = Mesh(arranged(tuple(sizes.values()), devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return Partition(mesh, config.compute_mapping, config.parameter_mapping)


def arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Arrange devices in the shape of the mesh, with fast links inside each replica and slow links between replicas."""
    replicas, *inner = shape
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1 and len(slices) == replicas:
        return mesh_utils.create_hybrid_device_mesh(
            (1, *inner), (replicas, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def active_partition() -> Partition | None:
    """Return the partition of the enclosing `Partition.active` context, or None outside such a context."""
    return _active.get()


def active_platform() -> str:
    """Return the platform on which code traced in this context runs: `cpu`, `gpu` or `tpu`."""
    partition = _active.get()
    return jax.default_backend() if partition is None else partition.platform


def is_split() -> bool:
    """Return whether the active partition splits parameters over the `data` axis."""
    partition = _active.get()
    return partition is not None and partition.mesh.shape["data"] > 1 and partition.parameters != partition.compute


def is_axis_split(name: str) -> bool:
    """Return whether the active partition splits a named activation axis over devices."""
    partition = _active.get()
    return partition is not None and any(partition.mesh.shape[axis] > 1 for axis in partition.compute.get(name, ()))


def row_shards() -> int:
    """Return the number of shards into which the active partition splits batch rows; 1 without a partition."""
    partition = _active.get()
    return 1 if partition is None else partition.row_shards


def shard_params(tree: Any) -> Any:
    """Within `jit`, constrain parameters, gradients or optimizer state to the shardings used by `Partition.place`."""
    partition = _active.get()
    if partition is None or partition.mesh.size == 1:
        return tree
    return partition._map_arrays(jax.lax.with_sharding_constraint, tree)


def by_row_shard(tree: Any) -> Any:
    """Place each shard of arrays [shard, ...] on the devices that hold the corresponding batch rows."""
    partition = _active.get()
    if partition is None or partition.mesh.size == 1:
        return tree
    rows = partition.compute["batch"]

    def lay(x: jax.Array) -> jax.Array:
        rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, *rest))

    return jax.tree.map(lay, tree)


def gather_params(tree: Any) -> Any:
    """Reshard stored parameters for computation. Their gradients are sharded like the stored parameters.

    Under FSDP, the forward pass gathers whole arrays and the backward pass scatters the summed gradients. If each layer
    in a scan calls this function on its own parameters, only one layer's parameters are gathered at a time.
    """
    partition = _active.get()
    if partition is None or partition.mesh.size == 1:
        return tree
    parameters, rest = eqx.partition(tree, eqx.is_inexact_array)

    def gathered(parameters: Any) -> Any:
        return hax.shard(parameters, partition.compute)

    # The transpose of a sharding constraint would gather the gradient too.
    use = jax.custom_vjp(gathered)
    use.defvjp(lambda p: (gathered(p), None), lambda _, gradients: (hax.shard(gradients, partition.parameters),))
    return eqx.combine(use(parameters), rest)
