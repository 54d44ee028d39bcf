"""What saving costs: `python -m sophia_levanter.benchmarks.checkpoints TABLE`.

The tree has the shape of a training state: matrices in float32, split over the devices. Give several by
XLA_FLAGS=--xla_force_host_platform_device_count=4. Everything is written below `--work`, on the disk that is meant.

`throughput`: `checkpoint.save` and `checkpoint.restore` in turns with the same arrays as zarr3 without checksums, by
tensorstore with its own settings, and as `numpy.save` files with an fsync each; the files are out of the system's cache
before each reading, and what is read ends on the devices. `blocked`: how long `Saver.save` keeps the loop waiting,
beside a copy of the same arrays to the host. `memory`: this process's memory over many saves.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from sophia_levanter.benchmarks.timing import markdown_table, spread
from sophia_levanter.checkpoint import Retention, Saver, restore, save

Tree = dict[str, jax.Array]
Table = tuple[list[str], Iterator[list[object]]]
LEAVES = 40


def state_of(megabytes: float) -> Tree:
    """Matrices of so many MB together, their rows split over the devices: float32 [row, column]."""
    devices = jax.device_count()
    sharding = NamedSharding(jax.make_mesh((devices,), ("x",)), PartitionSpec("x"))
    columns = max(1, int(megabytes * 1e6 / 4 / LEAVES / devices / 64))
    generator = np.random.default_rng(0)
    return {
        f"layer{i}": jax.device_put(generator.standard_normal((64 * devices, columns), np.float32), sharding)
        for i in range(LEAVES)
    }


def num_bytes(tree: Tree) -> int:
    return sum(leaf.nbytes for leaf in tree.values())


class Ours:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, tree: Tree) -> None:
        save(self._folder, 1, tree, run_id="benchmark", metadata={}, retention=Retention(1))

    def restore(self, tree: Tree) -> Tree:
        return restore(self._folder, tree, report=print).tree


class PlainZarr:
    """tensorstore's zarr3 without checksums, a chunk a shard, as most would use it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, tree: Tree) -> None:
        stores = [ts.open(self._spec(name, leaf), create=True) for name, leaf in tree.items()]
        writes = [
            store.result()[shard.index].write(np.asarray(shard.data), can_reference_source_data_indefinitely=True)
            for store, leaf in zip(stores, tree.values(), strict=True)
            for shard in leaf.addressable_shards
        ]
        for write in writes:
            write.result()

    def restore(self, tree: Tree) -> Tree:
        stores = [ts.open(self._spec(name, leaf), open=True) for name, leaf in tree.items()]
        reads = [
            {str(shard.index): store.result()[shard.index].read() for shard in leaf.addressable_shards}
            for store, leaf in zip(stores, tree.values(), strict=True)
        ]
        return {
            name: jax.make_array_from_single_device_arrays(
                leaf.shape,
                leaf.sharding,
                [jax.device_put(parts[str(shard.index)].result(), shard.device) for shard in leaf.addressable_shards],
            )
            for (name, leaf), parts in zip(tree.items(), reads, strict=True)
        }

    def _spec(self, name: str, leaf: jax.Array) -> dict[str, Any]:
        chunk = leaf.sharding.shard_shape(leaf.shape)
        return {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self._folder / name}/"},
            "metadata": {
                "shape": leaf.shape,
                "data_type": leaf.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
        }


class NumpyFiles:
    """A file a shard, `numpy.save` and an fsync."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, tree: Tree) -> None:
        self._folder.mkdir()
        for file, shard in self._files(tree):
            with file.open("wb") as opened:
                np.save(opened, np.asarray(shard.data))
                opened.flush()
                os.fsync(opened.fileno())

    def restore(self, tree: Tree) -> Tree:
        with ThreadPoolExecutor(1) as pool:
            parts = {file: pool.submit(np.load, file) for file, _ in self._files(tree)}
            return {
                name: jax.make_array_from_single_device_arrays(
                    leaf.shape,
                    leaf.sharding,
                    [
                        jax.device_put(parts[self._file(name, i)].result(), shard.device)
                        for i, shard in enumerate(leaf.addressable_shards)
                    ],
                )
                for name, leaf in tree.items()
            }

    def _files(self, tree: Tree) -> list[tuple[Path, Any]]:
        return [
            (self._file(name, i), shard)
            for name, leaf in tree.items()
            for i, shard in enumerate(leaf.addressable_shards)
        ]

    def _file(self, name: str, number: int) -> Path:
        return self._folder / f"{name}.{number}.npy"


def throughput_table(tree: Tree, work: Path, rounds: int) -> Table:
    """Each round all of them, one after the other; the ratios are of one round."""
    makers: dict[str, Callable[[Path], Any]] = {"ours": Ours, "zarr3": PlainZarr, "numpy": NumpyFiles}

    def rows() -> Iterator[list[object]]:
        seconds: dict[str, dict[str, list[float]]] = {
            what: {name: [] for name in makers} for what in ("save", "restore")
        }
        for _ in range(rounds + 1):
            for name, maker in makers.items():
                way = maker(work / name)
                os.sync()
                started = time.perf_counter()
                way.save(tree)
                seconds["save"][name].append(time.perf_counter() - started)
                _drop_from_cache(work / name)
                started = time.perf_counter()
                found = jax.block_until_ready(way.restore(tree))
                seconds["restore"][name].append(time.perf_counter() - started)
                assert all(np.array_equal(found[leaf], tree[leaf]) for leaf in list(tree)[::10])
                del found
                shutil.rmtree(work / name)
        for what, by_name in seconds.items():
            # The first round warms up.
            times = {name: np.array(values[1:]) for name, values in by_name.items()}
            for name, values in times.items():
                yield [
                    what,
                    name,
                    str(spread(num_bytes(tree) / values / 1e6)),
                    "" if name == "ours" else str(spread(values / times["ours"])),
                ]

    return ["", "way", "MB/s", "ours beside it"], rows()


def _drop_from_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def blocked_table(tree: Tree, work: Path, rounds: int) -> Table:
    """`Saver.save` where the save before has ended, and copies to the host, in turns."""

    def rows() -> Iterator[list[object]]:
        saver = Saver(work / "saved", run_id="benchmark")
        copying, blocked = [], []
        for step in range(rounds + 1):
            started = time.perf_counter()
            copies = [np.array(shard.data) for leaf in tree.values() for shard in leaf.addressable_shards]
            copying.append(time.perf_counter() - started)
            del copies
            started = time.perf_counter()
            saver.save(step, tree, metadata={}, retention=Retention(1))
            blocked.append(time.perf_counter() - started)
            saver.wait()
        difference = np.array(blocked[1:]) - np.array(copying[1:])
        yield [str(spread(np.array(values) * 1e3)) for values in (copying[1:], blocked[1:], difference)]

    return ["copy to the host, ms", "blocked, ms", "difference, ms"], rows()


def memory_table(tree: Tree, work: Path, saves: int) -> Table:
    """The slope of a line through this process's resident memory after each save, the first few left out."""

    def rows() -> Iterator[list[object]]:
        saver = Saver(work / "saved", run_id="benchmark")
        sizes = []
        for step in range(saves):
            saver.save(step, tree, metadata={}, retention=Retention(1))
            saver.wait()
            sizes.append(psutil.Process().memory_info().rss / 2**20)
        late = np.array(sizes[min(5, saves // 2) :])
        slope = np.polyfit(np.arange(len(late)), late, 1)[0]
        yield [saves, f"{num_bytes(tree) / 2**20:,.0f}", f"{late[0]:,.0f}", f"{late[-1]:,.0f}", f"{slope:.2f}"]

    return ["saves", "MiB each", "MiB resident early", "at the end", "slope, MiB a save"], rows()


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("throughput", "blocked", "memory"))
    parser.add_argument("--megabytes", type=float, default=500, help="in the tree")
    parser.add_argument("--rounds", type=int, default=7, help="of each measurement")
    parser.add_argument("--saves", type=int, default=50, help="while memory is looked at")
    parser.add_argument("--work", type=Path, help="a folder on the disk that is meant; a temporary one if not given")
    arguments = parser.parse_args(argv)
    tree = state_of(arguments.megabytes)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        tables = {
            "throughput": lambda: throughput_table(tree, Path(folder), arguments.rounds),
            "blocked": lambda: blocked_table(tree, Path(folder), arguments.rounds),
            "memory": lambda: memory_table(tree, Path(folder), arguments.saves),
        }
        header, rows = tables[arguments.table]()
        print(markdown_table(header, list(rows)))


if __name__ == "__main__":
    main()
