"""The cost of saving: `python tests/benchmarks/checkpoints.py TABLE`.

The tree has the shape of a training state: float32 matrices, split over the devices. To have several devices, set
XLA_FLAGS=--xla_force_host_platform_device_count=4. All files are written below `--work`.

`throughput`: `checkpoint.save` and `checkpoint.restore` beside the same arrays in tensorstore's zarr3 without
checksums, and in `numpy.save` files with an fsync each. Files are dropped from the system's cache before they are
read, and the arrays end on the devices. `blocked`: how long `Saver.save` keeps the training loop waiting, beside a
copy of the arrays to the host. `memory`: the memory of this process over many saves.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import tensorstore as ts
from benchmark_tables import print_table, spread
from jax.sharding import NamedSharding, PartitionSpec

from sophia_levanter.checkpoint import Retention, Saver, restore, save

Tree = dict[str, jax.Array]
Row = list[object]
LEAVES = 40


def state_of(megabytes: float) -> Tree:
    """Matrices of that size together, their rows split over the devices."""
    devices = jax.device_count()
    sharding = NamedSharding(jax.make_mesh((devices,), ("x",)), PartitionSpec("x"))
    shape = (64 * devices, max(1, int(megabytes * 1e6 / 4 / LEAVES / devices / 64)))
    generator = np.random.default_rng(0)
    return {f"layer{i}": jax.device_put(generator.standard_normal(shape, np.float32), sharding) for i in range(LEAVES)}


def save_ours(folder: Path, tree: Tree) -> None:
    save(folder, 1, tree, run_id="benchmark", metadata={}, retention=Retention(1))


def restore_ours(folder: Path, like: Tree) -> Tree:
    return restore(folder, like, report=print).tree


def save_zarr3(folder: Path, tree: Tree) -> None:
    """One chunk for each shard, as most programs would do it."""
    stores = {name: _zarr3(folder / name, leaf, create=True) for name, leaf in tree.items()}
    writes = [
        stores[name].result()[shard.index].write(np.asarray(shard.data), can_reference_source_data_indefinitely=True)
        for name, leaf in tree.items()
        for shard in leaf.addressable_shards
    ]
    for write in writes:
        write.result()


def restore_zarr3(folder: Path, like: Tree) -> Tree:
    stores = {name: _zarr3(folder / name, leaf, create=False) for name, leaf in like.items()}
    reads = {
        name: [stores[name].result()[shard.index].read() for shard in leaf.addressable_shards]
        for name, leaf in like.items()
    }
    return {name: _on_devices(leaf, (read.result() for read in reads[name])) for name, leaf in like.items()}


def _zarr3(folder: Path, leaf: jax.Array, *, create: bool) -> Any:
    chunks = ts.ChunkLayout(chunk_shape=leaf.sharding.shard_shape(leaf.shape))
    spec = {"driver": "zarr3", "kvstore": f"file://{folder}/"}
    return ts.open(spec, dtype=leaf.dtype.name, shape=leaf.shape, chunk_layout=chunks, create=create, open=not create)


def save_numpy(folder: Path, tree: Tree) -> None:
    folder.mkdir()
    for name, leaf in tree.items():
        for i, shard in enumerate(leaf.addressable_shards):
            with (folder / f"{name}.{i}.npy").open("wb") as file:
                np.save(file, np.asarray(shard.data))
                file.flush()
                os.fsync(file.fileno())


def restore_numpy(folder: Path, like: Tree) -> Tree:
    files = {name: [folder / f"{name}.{i}.npy" for i in range(len(like[name].addressable_shards))] for name in like}
    with ThreadPoolExecutor(1) as pool:  # reads while the main thread copies to the devices
        parts = {name: [pool.submit(np.load, file) for file in files[name]] for name in like}
        return {name: _on_devices(leaf, (part.result() for part in parts[name])) for name, leaf in like.items()}


def _on_devices(like: jax.Array, parts: Iterable[np.ndarray]) -> jax.Array:
    shards = zip(like.addressable_shards, parts, strict=True)
    placed = [jax.device_put(part, shard.device) for shard, part in shards]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, placed)


WAYS: dict[str, tuple[Callable[[Path, Tree], None], Callable[[Path, Tree], Tree]]] = {
    "ours": (save_ours, restore_ours),
    "zarr3": (save_zarr3, restore_zarr3),
    "numpy": (save_numpy, restore_numpy),
}


def throughput(tree: Tree, work: Path, rounds: int) -> Iterator[Row]:
    """All ways take turns in each round, and the ratios are of one round. The first round is not counted."""
    seconds = np.empty((2, len(WAYS), rounds + 1))
    for number in range(rounds + 1):
        for way, (name, (write, read)) in enumerate(WAYS.items()):
            os.sync()
            started = time.perf_counter()
            write(work / name, tree)
            seconds[0, way, number] = time.perf_counter() - started
            _drop_from_cache(work / name)
            started = time.perf_counter()
            found = jax.block_until_ready(read(work / name, tree))
            seconds[1, way, number] = time.perf_counter() - started
            assert all(np.array_equal(found[leaf], tree[leaf]) for leaf in list(tree)[::10])
            shutil.rmtree(work / name)
    megabytes = sum(leaf.nbytes for leaf in tree.values()) / 1e6
    for what, times in zip(("save", "restore"), seconds[:, :, 1:], strict=True):
        for name, own in zip(WAYS, times, strict=True):
            yield [what, name, spread(megabytes / own), "" if name == "ours" else spread(own / times[0])]


def _drop_from_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def blocked(tree: Tree, work: Path, rounds: int) -> Iterator[Row]:
    """A copy to the host and `Saver.save` take turns. The first round is not counted."""
    saver = Saver(work / "saved", run_id="benchmark")
    seconds = np.empty((2, rounds + 1))
    for step in range(rounds + 1):
        started = time.perf_counter()
        copies = [np.array(shard.data) for leaf in tree.values() for shard in leaf.addressable_shards]
        seconds[0, step] = time.perf_counter() - started
        del copies
        started = time.perf_counter()
        saver.save(step, tree, metadata={}, retention=Retention(1))
        seconds[1, step] = time.perf_counter() - started
        saver.wait()
    copying, blocking = 1e3 * seconds[:, 1:]
    yield [spread(copying), spread(blocking), spread(blocking - copying)]


def memory(tree: Tree, work: Path, saves: int) -> Iterator[Row]:
    """The slope of a line through the resident memory after each save but the first few."""
    saver = Saver(work / "saved", run_id="benchmark")
    sizes = []
    for step in range(saves):
        saver.save(step, tree, metadata={}, retention=Retention(1))
        saver.wait()
        sizes.append(psutil.Process().memory_info().rss / 2**20)
    late = np.array(sizes[min(5, saves // 2) :])
    slope = np.polyfit(np.arange(len(late)), late, 1)[0]
    each = sum(leaf.nbytes for leaf in tree.values()) / 2**20
    yield [saves, f"{each:,.0f}", f"{late[0]:,.0f}", f"{late[-1]:,.0f}", f"{slope:.2f}"]


TABLES = {
    "throughput": (throughput, ["", "way", "MB/s", "ours beside it"], 7),
    "blocked": (blocked, ["copy to the host, ms", "blocked, ms", "difference, ms"], 7),
    "memory": (memory, ["saves", "MiB each", "MiB resident early", "at the end", "slope, MiB a save"], 50),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--megabytes", type=float, default=500, help="size of the tree")
    parser.add_argument("--rounds", type=int, help="rounds or saves; by default 7, and 50 for memory")
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure; by default a temporary one")
    arguments = parser.parse_args(argv)
    measure, header, rounds = TABLES[arguments.table]
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        print_table(header, measure(state_of(arguments.megabytes), Path(folder), arguments.rounds or rounds))


if __name__ == "__main__":
    main()
