"""One-dimensional zarr3 arrays: written a shard at a time, read in small pieces that have checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from sophia_levanter.files import check_regular
from sophia_levanter.kvstore import context_spec, kvstore_spec


class ArrayWriter:
    """Appends to the array in `path`, holding one shard in memory.

    A shard is a file that appears whole. A writer that was killed is replaced by one with the `num_written` and the
    `tail` that it had at any earlier time: given the same values it writes the same files.

    Args:
        path: the array's directory.
        dtype: of the elements.
        shard: elements in a file.
        chunk: elements that have a checksum of their own; divides `shard`.
        num_written: elements that are in files already, a multiple of `shard`.
        tail: elements after those, fewer than `shard`.

    Raises:
        ValueError: here and from the methods, if the disk does not take it.
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype,
        *,
        shard: int,
        chunk: int,
        num_written: int = 0,
        tail: np.ndarray | None = None,
    ) -> None:
        self._buffer = np.empty(shard, dtype)
        self._filled = 0
        self.num_written = num_written
        if num_written:
            # What was written after that is gone: what follows now may be other values, or none.
            self._array = ts.open(_spec(str(path)), open=True).result().resize(exclusive_max=[num_written]).result()
        else:
            spec = _creation_spec(path, dtype, shard, chunk)
            self._array = ts.open(spec, create=True, delete_existing=True).result()
        if tail is not None:
            self.append(tail)

    @property
    def length(self) -> int:
        """Elements so far."""
        return self.num_written + self._filled

    @property
    def tail(self) -> np.ndarray:
        """Elements that are in no file yet."""
        return self._buffer[: self._filled]

    def append(self, values: np.ndarray) -> None:
        """Add elements at the end."""
        while values.size:
            taken = min(values.size, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = values[:taken]
            self._filled += taken
            values = values[taken:]
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        """Write the tail; after a tail that is no whole shard nothing may follow."""
        if not self._filled:
            return
        end = self.length
        self._array = self._array.resize(exclusive_max=[end]).result()
        # Not copied first: the buffer stays as it is until all is written.
        self._array[self.num_written : end].write(self.tail, can_reference_source_data_indefinitely=True).result()
        self.num_written, self._filled = end, 0


def open_array(location: str, cache_bytes: int = 0) -> ts.TensorStore:
    """The array at a path or URL, for reading.

    Raises:
        NotRegular: if one of its files is not a regular file.
        ValueError: if it is not there or cannot be read.
    """
    for path in Path(location).rglob("*") if "://" not in location else ():
        if not path.is_dir():
            check_regular(path)
    context = ts.Context(context_spec(cache_bytes))
    return ts.open(_spec(location), open=True, read=True, context=context).result()


def _spec(location: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": kvstore_spec(location),
        # Otherwise a chunk whose file is gone would read as zeros.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


def _creation_spec(path: Path, dtype: np.dtype, shard: int, chunk: int) -> dict[str, Any]:
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [chunk], "codecs": codecs, "index_codecs": codecs}
    metadata = {
        "shape": [0],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return _spec(str(path)) | {"metadata": metadata}
