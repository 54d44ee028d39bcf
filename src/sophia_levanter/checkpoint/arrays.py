"""Arrays on the disk: each one a zarr3 array, each chunk checked against its digest when it is read."""

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from sophia_levanter.checkpoint.manifest import FILE_NAME, Box, CheckpointError, SavedArray, one_line

# Arrays in flight: enough to keep a disk busy, few enough to need little memory beyond what the tree itself takes.
WORKERS = 8


def make_context() -> ts.Context:
    # No cache, which would hold a whole save. No fsync at each write: `save` does it once, in half the time.
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})


def write_arrays(folder: Path, arrays: dict[str, Any]) -> list[SavedArray]:
    """Write the arrays (by their path in the tree) concurrently; a chunk is a shard, a replicated array one chunk.

    Raises `CheckpointError` when the disk refuses, `TypeError` for an array that does not hold numbers.
    """

    def write(saved: SavedArray, opening: Any, array: Any) -> None:
        try:
            store = opening.result()
            for box, shard in _shards(array):
                data = np.asarray(shard, dtype=store.dtype.numpy_dtype, order="C")
                store[_slices(box)].write(data, can_reference_source_data_indefinitely=True).result()
                saved.chunks[saved.chunk_name(box)] = _digest(data)
        except ValueError as error:  # how tensorstore reports a full disk, among others
            raise CheckpointError(f"leaf {saved.path}, {folder / saved.folder}: {one_line(error)}") from error

    context = make_context()
    described = [_describe(number, path, array) for number, (path, array) in enumerate(arrays.items())]
    opening = [ts.open(_spec(folder, saved), context=context, create=True) for saved in described]
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(write, described, opening, arrays.values()))
    return described


def read_parts(folder: Path, saved: SavedArray, wanted: set[Box], context: ts.Context) -> dict[Box, np.ndarray]:
    """The wanted parts of an array. Reads the chunks that one of them touches, each once.

    Raises `CheckpointError` for a chunk that is missing or not the one that was saved.
    """
    dtype = ts.dtype(saved.dtype).numpy_dtype
    parts = {part: np.empty([stop - start for start, stop in part], dtype) for part in wanted}
    store = _open(folder, saved, context)
    for chunk in saved.boxes():
        touched = [(part, common) for part in wanted if (common := _overlap(part, chunk)) is not None]
        if not touched:
            continue
        data = _read_chunk(folder, saved, store, chunk)
        for part, common in touched:
            if part == chunk:
                parts[part] = data
            else:
                parts[part][_slices(common, part)] = data[_slices(common, chunk)]
    return parts


def arrays_are_intact(folder: Path, arrays: list[SavedArray]) -> bool:
    def read_all(saved: SavedArray) -> None:
        store = _open(folder, saved, context)
        for chunk in saved.boxes():
            _read_chunk(folder, saved, store, chunk)

    context = make_context()
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(read_all, arrays))
    except CheckpointError:
        return False
    return True


def box_of(index: Any, shape: tuple[int, ...]) -> Box:
    """The part of an array that a tuple of slices, as jax gives a shard, stands for."""
    bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in bounds)


def whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, size) for size in shape)


def _spec(folder: Path, saved: SavedArray) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder / saved.folder}/"},
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        "metadata": {
            "shape": saved.shape,
            "data_type": saved.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": saved.chunk_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
    }


def _open(folder: Path, saved: SavedArray, context: ts.Context) -> ts.TensorStore:
    """The array on the disk, which must be laid out as the manifest says."""
    try:
        return ts.open(_spec(folder, saved), context=context, open=True).result()
    except Exception as error:  # whatever damage makes of it
        raise CheckpointError(f"leaf {saved.path}, {folder / saved.folder}: {one_line(error)}") from error


def _describe(number: int, path: str, array: Any) -> SavedArray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise TypeError(f"leaf {path} lies on several hosts; bring it to this one to save it")
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (np.number, np.bool_)):
        raise TypeError(f"leaf {path} has dtype {array.dtype}, not numbers: of a random key, save jax.random.key_data")
    chunk_shape = array.sharding.shard_shape(array.shape) if isinstance(array, jax.Array) else array.shape
    # The number keeps the names apart, on disks that ignore case too; the rest is for people.
    folder = f"arrays/{number:04d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', path)[:150]}"
    return SavedArray(path, folder, array.shape, array.dtype.name, tuple(max(1, size) for size in chunk_shape), {})


def _shards(array: Any) -> Iterator[tuple[Box, Any]]:
    """The distinct shards of an array; none of one without elements."""
    if array.size == 0:
        return
    if not isinstance(array, jax.Array):
        yield whole(array.shape), array
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield box_of(shard.index, array.shape), shard.data


def _read_chunk(folder: Path, saved: SavedArray, store: ts.TensorStore, box: Box) -> np.ndarray:
    name = saved.chunk_name(box)
    try:
        data = store[_slices(box)].read().result()
        intact = _digest(data) == saved.chunks[name]
    except Exception as error:  # whatever damage makes of it
        raise CheckpointError(f"leaf {saved.path}, {folder / saved.folder / name}: {one_line(error)}") from error
    if not intact:
        raise CheckpointError(
            f"leaf {saved.path}, {folder / saved.folder / name}: not the bytes of {FILE_NAME}'s digest"
        )
    return data


def _digest(data: np.ndarray) -> str:
    return hashlib.sha256(data.reshape(-1).view(np.uint8).data).hexdigest()


def _overlap(a: Box, b: Box) -> Box | None:
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _slices(box: Box, within: Box | None = None) -> tuple[slice, ...]:
    """Indexes that part of the whole array, or of the part `within`."""
    origins = [start for start, _ in within] if within else [0] * len(box)
    return tuple(slice(start - origin, stop - origin) for (start, stop), origin in zip(box, origins, strict=True))
