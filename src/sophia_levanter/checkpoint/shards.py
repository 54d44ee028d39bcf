"""The parts of arrays: how each is laid out, which host writes what, and its copy in the host's memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sophia_levanter.checkpoint.manifest import Box, SavedArray


class HostArray(NamedTuple):
    """What one host writes of an array.

    Attributes:
        saved: the array's description, digests not yet in it.
        parts: its chunks that this host writes, on the devices or in its memory.
    """

    saved: SavedArray
    parts: dict[Box, Any]


def host_arrays(arrays: Mapping[str, Any], *, process: int = 0, num_processes: int = 1) -> list[HostArray]:
    """What a process writes of each array. A chunk is a shard; hosts that have the same ones share the work.

    Args:
        arrays: by their path in the tree; the same on every process.
        process: the number of this process.
        num_processes: how many there are.

    Raises:
        TypeError: for an array that does not hold numbers.
    """
    described = [_describe(number, path, array) for number, (path, array) in enumerate(arrays.items())]
    writers = _writers(arrays, num_processes)
    return [
        HostArray(
            saved, {box: part for box, part in _local_parts(array).items() if writers[saved.path][box] == process}
        )
        for saved, array in zip(described, arrays.values(), strict=True)
    ]


def copied_to_host(arrays: Sequence[HostArray]) -> list[HostArray]:
    """The same with numpy arrays of their own, which stay what they are when the devices' buffers are given away."""
    for array in arrays:
        for part in array.parts.values():
            if isinstance(part, jax.Array):
                part.copy_to_host_async()
    return [HostArray(a.saved, {box: _own_copy(part) for box, part in a.parts.items()}) for a in arrays]


def box_of(index: Any, shape: Sequence[int]) -> Box:
    """The part of an array that a tuple of slices, as jax gives a shard, stands for."""
    bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in bounds)


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def _describe(number: int, path: str, array: Any) -> SavedArray:
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (np.number, np.bool_)):
        raise TypeError(f"leaf {path} has dtype {array.dtype}, not numbers: of a random key, save jax.random.key_data")
    chunk_shape = array.sharding.shard_shape(array.shape) if isinstance(array, jax.Array) else array.shape
    # The number keeps the names apart, on disks that ignore case too; the rest is for people.
    folder = f"{number:04d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', path)[:150]}"
    chunks = tuple(max(1, size) for size in chunk_shape)
    return SavedArray(path, folder, array.shape, array.dtype.name, chunks, "", {})


def _writers(arrays: Mapping[str, Any], num_processes: int) -> dict[str, dict[Box, int]]:
    """The process that writes each chunk: of those that have it the one with the fewest bytes to write so far."""
    load = [0] * num_processes
    writers: dict[str, dict[Box, int]] = {}
    # Large chunks first, and small ones fill up.
    by_size = sorted(arrays, key=lambda path: (-_chunk_bytes(arrays[path]), path))
    for path in by_size:
        writers[path] = {}
        for box, holders in sorted(_holders(arrays[path]).items()):
            writer = min(holders, key=lambda process: (load[process], process))
            load[writer] += _chunk_bytes(arrays[path])
            writers[path][box] = writer
    return writers


def _chunk_bytes(array: Any) -> int:
    shape = array.sharding.shard_shape(array.shape) if isinstance(array, jax.Array) else array.shape
    return int(np.prod(shape, dtype=np.int64)) * array.dtype.itemsize


def _holders(array: Any) -> dict[Box, set[int]]:
    """The processes that have each distinct shard; none of an array without elements."""
    if array.size == 0:
        return {}
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        # Each process has one of its own, with the same numbers.
        return {box: {0} for box in _local_parts(array)}
    holders: dict[Box, set[int]] = {}
    devices: Mapping[Any, Any] = array.sharding.devices_indices_map(array.shape)
    for device, index in devices.items():
        holders.setdefault(box_of(index, array.shape), set()).add(device.process_index)
    return holders


def _local_parts(array: Any) -> dict[Box, Any]:
    """The distinct shards of an array that this process has."""
    if array.size == 0:
        return {}
    if not isinstance(array, jax.Array):
        return {whole(array.shape): array}
    return {box_of(shard.index, array.shape): shard.data for shard in array.addressable_shards}


def _own_copy(part: Any) -> np.ndarray:
    if isinstance(part, jax.Array) and next(iter(part.devices())).platform != "cpu":
        return np.asarray(part)
    # Of an array in the host's memory numpy would give a view.
    return np.array(part)
