"""Reading and writing arrays as zarr3. Hosts share the work of writing, and every file is checked when it is read."""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
import xxhash

from sophia_levanter.checkpoint.manifest import Box, CheckpointError, SavedArray, one_line
from sophia_levanter.files import check_regular
from sophia_levanter.kvstore import CODECS, array_spec, context_spec, kvstore_spec


class HostArray(NamedTuple):
    """The part of an array that one host writes."""

    saved: SavedArray  # digests are added later
    parts: dict[Box, Any]  # the chunks that this host writes, in device or host memory


def host_arrays(arrays: Mapping[str, Any], *, process: int = 0, num_processes: int = 1) -> list[HostArray]:
    """Return the part of each array that a process writes. Hosts that hold the same shards share the work.

    `arrays` is keyed by path in the tree, and is the same on all processes. Each shard becomes a chunk.

    Raises:
        TypeError: if an array is not numeric.
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
    """Copy the arrays to host memory as numpy arrays, which remain valid when the device buffers are donated."""
    for array in arrays:
        for part in array.parts.values():
            if isinstance(part, jax.Array):
                part.copy_to_host_async()
    return [HostArray(a.saved, {box: _own_copy(part) for box, part in a.parts.items()}) for a in arrays]


def box_of(index: Any, shape: Sequence[int]) -> Box:
    """Convert a tuple of slices, such as the index of a jax shard, to a `Box`."""
    bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in bounds)


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def _describe(number: int, path: str, array: Any) -> SavedArray:
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (np.number, np.bool_)):
        raise TypeError(
            f"leaf {path} has dtype {array.dtype}, which is not numeric; "
            "for a random key, save jax.random.key_data(key)"
        )
    chunk_shape = array.sharding.shard_shape(array.shape) if isinstance(array, jax.Array) else array.shape
    # The number makes names unique, even on case-insensitive file systems. The rest makes them readable.
    folder = f"{number:04d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', path)[:150]}"
    chunks = tuple(max(1, size) for size in chunk_shape)
    return SavedArray(path, folder, array.shape, array.dtype.name, chunks, "", {})


def _writers(arrays: Mapping[str, Any], num_processes: int) -> dict[str, dict[Box, int]]:
    """Assign each chunk to the process with the fewest bytes to write so far, among the processes that hold it."""
    load = [0] * num_processes
    writers: dict[str, dict[Box, int]] = {}
    # Assign large chunks first; small chunks even out the load.
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
    """Return the processes that hold each distinct shard, or an empty dict for an array without elements."""
    if array.size == 0:
        return {}
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        # Every process has a copy of the same values. The first process writes them.
        return {box: {0} for box in _local_parts(array)}
    holders: dict[Box, set[int]] = {}
    devices: Mapping[Any, Any] = array.sharding.devices_indices_map(array.shape)
    for device, index in devices.items():
        holders.setdefault(box_of(index, array.shape), set()).add(device.process_index)
    return holders


def _local_parts(array: Any) -> dict[Box, Any]:
    """Return the distinct shards of an array that this process holds."""
    if array.size == 0:
        return {}
    if not isinstance(array, jax.Array):
        return {whole(array.shape): array}
    return {box_of(shard.index, array.shape): shard.data for shard in array.addressable_shards}


def _own_copy(part: Any) -> np.ndarray:
    if isinstance(part, jax.Array) and next(iter(part.devices())).platform != "cpu":
        return np.asarray(part)
    # For an array in host memory, np.asarray would return a view.
    return np.array(part)


# The number of chunks in flight: enough to keep a disk busy, but few enough to need little memory beyond the tree.
WORKERS = 8
HEADER = "zarr.json"
CHECKSUM_BYTES = 4  # appended to the values in each chunk by the crc32c codec

Digests: TypeAlias = dict[str, dict[str, str]]  # keyed by the path of the array in the tree, then by file name


def write_arrays(folder: str, arrays: Sequence[HostArray], *, headers: bool) -> Digests:
    """Write the chunks of one host concurrently, and return the digests of the written files.

    With `headers`, also write the zarr.json of each array. Exactly one host must do so.

    Raises:
        CheckpointError: if a write fails; the message names the leaf and its folder.
    """
    context = ts.Context(context_spec())

    def write_header(saved: SavedArray) -> str:
        with _naming(folder, saved):
            ts.open(_spec(folder, saved), context=context, create=True).result()
            return _digest(_read_header(folder, saved, context))

    def write_chunk(saved: SavedArray, box: Box, part: Any) -> str:
        with _naming(folder, saved):
            data = np.asarray(part, dtype=saved.numpy_dtype, order="C")
            writing = _open(folder, saved, context)[_slices(box)].write(
                data, can_reference_source_data_indefinitely=True
            )
            digest = _digest(_bytes(data))
            writing.result()
            return digest

    with ThreadPoolExecutor(WORKERS) as pool:
        tasks = {(a.saved.path, HEADER): pool.submit(write_header, a.saved) for a in arrays if headers}
        for saved, parts in arrays:
            tasks |= {
                (saved.path, saved.chunk_name(box)): pool.submit(write_chunk, saved, box, part)
                for box, part in parts.items()
            }
        try:
            written = {names: task.result() for names, task in tasks.items()}
        finally:
            pool.shutdown(cancel_futures=True)
    digests: Digests = {}
    for (path, name), digest in written.items():
        digests.setdefault(path, {})[name] = digest
    return digests


def with_digests(arrays: Sequence[HostArray], hosts: Sequence[Digests]) -> list[SavedArray]:
    """Return the descriptions of the arrays with the digests from all hosts."""
    complete = []
    for saved, _ in arrays:
        found = {name: digest for digests in hosts for name, digest in digests.get(saved.path, {}).items()}
        names = [saved.chunk_name(box) for box in saved.boxes()]
        complete.append(replace(saved, header=found[HEADER], chunks={name: found[name] for name in names}))
    return complete


def read_parts(folder: str, wanted: Sequence[tuple[SavedArray, set[Box]]]) -> Iterator[dict[Box, np.ndarray]]:
    """Read parts of arrays. Each chunk that overlaps a part is read once; many chunks are read concurrently.

    `wanted` lists the arrays, each with the parts to read. Each yielded dict contains the parts of one array.

    Raises:
        CheckpointError: if a file is missing, or its digest does not match the saved digest.
    """
    context = ts.Context(context_spec())
    pool = ThreadPoolExecutor(WORKERS)
    try:
        list(pool.map(lambda saved: _check_header(folder, saved, context), [saved for saved, _ in wanted]))
        reading = deque(
            [
                (chunk, pool.submit(_read_chunk, folder, saved, chunk, context))
                for chunk in saved.boxes()
                if any(_overlap(part, chunk) is not None for part in parts)
            ]
            for saved, parts in wanted
        )
        for saved, parts in wanted:
            yield _assembled(saved, parts, reading.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def find_damage(folder: str, arrays: Sequence[SavedArray]) -> list[str]:
    """Read every byte of the arrays, and return a description of any damage, one line per file."""
    context = ts.Context(context_spec())

    def check(saved: SavedArray, box: Box | None) -> str | None:
        try:
            if box is None:
                _check_header(folder, saved, context)
            else:
                _read_chunk(folder, saved, box, context)
        except CheckpointError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(WORKERS) as pool:
        checks = [pool.submit(check, saved, None) for saved in arrays]
        sound = [saved for saved in arrays if saved.num_chunks == len(saved.chunks)]
        checks += [pool.submit(check, saved, box) for saved in sound for box in saved.boxes()]
        return [line for task in checks if (line := task.result()) is not None]


def _assembled(
    saved: SavedArray, parts: set[Box], chunks: list[tuple[Box, Future[np.ndarray]]]
) -> dict[Box, np.ndarray]:
    read = {chunk: task.result() for chunk, task in chunks}
    assembled = {part: read[part] for part in parts if part in read}
    for part in parts - set(assembled):
        assembled[part] = np.empty([stop - start for start, stop in part], saved.numpy_dtype)
        for chunk, data in read.items():
            if (common := _overlap(part, chunk)) is not None:
                assembled[part][_slices(common, part)] = data[_slices(common, chunk)]
    return assembled


def _spec(folder: str, saved: SavedArray) -> dict[str, Any]:
    metadata = {
        "shape": saved.shape,
        "data_type": saved.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": saved.chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": CODECS,
    }
    return array_spec(f"{folder}/{saved.folder}") | {"metadata": metadata}


def _open(folder: str, saved: SavedArray, context: ts.Context) -> ts.TensorStore:
    """Open an array as described in the manifest, without reading its zarr.json."""
    return ts.open(_spec(folder, saved), context=context, open=True, assume_metadata=True).result()


def _read_header(folder: str, saved: SavedArray, context: ts.Context) -> bytes:
    _check_file(folder, saved, HEADER)
    store = ts.KvStore.open(kvstore_spec(f"{folder}/{saved.folder}"), context=context).result()
    return bytes(store.read(HEADER).result().value)


def _check_header(folder: str, saved: SavedArray, context: ts.Context) -> None:
    with _naming(folder, saved, HEADER):
        if (count := saved.num_chunks) != len(saved.chunks):
            raise ValueError(f"the manifest has digests for {len(saved.chunks)} chunks, but the array has {count}")
        if _digest(_read_header(folder, saved, context)) != saved.header:
            raise ValueError("the contents do not match the digest in the manifest")


def _read_chunk(folder: str, saved: SavedArray, box: Box, context: ts.Context) -> np.ndarray:
    name = saved.chunk_name(box)
    with _naming(folder, saved, name):
        _check_file(folder, saved, name)
        data = _open(folder, saved, context)[_slices(box)].read().result()
        if _digest(_bytes(data)) != saved.chunks[name]:
            raise ValueError("the contents do not match the digest in the manifest")
        return data


def _check_file(folder: str, saved: SavedArray, name: str) -> None:
    """Check a file before tensorstore reads it, because a pipe would block it and a huge chunk would exhaust memory."""
    if "://" in folder:
        return
    path = f"{folder}/{saved.folder}/{name}"
    check_regular(path)
    expected = math.prod(saved.chunk_shape) * saved.numpy_dtype.itemsize + CHECKSUM_BYTES
    if name != HEADER and (size := os.path.getsize(path)) != expected:
        raise ValueError(f"expected {expected:,} bytes, found {size:,}")


@contextmanager
def _naming(folder: str, saved: SavedArray, name: str | None = None) -> Iterator[None]:
    """Convert any error in the block to a `CheckpointError` that names the leaf and the file or folder."""
    try:
        yield
    except Exception as error:  # tensorstore raises many kinds of errors for damaged files and full disks
        where = f"leaf {saved.path}, {folder}/{saved.folder}" + (f"/{name}" if name else "")
        raise CheckpointError(f"{where}: {one_line(error)}") from error


def _bytes(data: np.ndarray) -> memoryview:
    return data.reshape(-1).view(np.uint8).data


def _digest(content: bytes | memoryview) -> str:
    """Compute a 128-bit hash at memory speed. It detects damage, but does not protect against tampering."""
    return xxhash.xxh3_128_hexdigest(content)


def _overlap(a: Box, b: Box) -> Box | None:
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _slices(box: Box, within: Box | None = None) -> tuple[slice, ...]:
    """Return the slices that select `box` from the whole array, or from the part `within`."""
    origins = [start for start, _ in within or whole([0] * len(box))]
    return tuple(slice(start - origin, stop - origin) for (start, stop), origin in zip(box, origins, strict=True))
