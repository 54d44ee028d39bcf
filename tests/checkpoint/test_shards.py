"""Shards are saved as chunks, each once, and come back on any other devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import put, silent

from sophia_levanter.checkpoint import arrays, read_step, restore

VALUES = {
    "rows": np.arange(16 * 6, dtype=np.float32).reshape(16, 6),
    "grid": np.arange(64, dtype=np.int32).reshape(8, 8),
    "replicated": np.arange(1024.0, dtype=np.float32),
    "scalar": np.float32(3),
}
SPECS = {"rows": P("x"), "grid": P("x", "y"), "replicated": P(), "scalar": P()}


@pytest.fixture(scope="module")
def meshes() -> dict[int, Mesh]:
    devices = np.array(jax.devices())
    assert len(devices) == 8
    shapes = {8: (devices, 4, 2), 4: (devices[4:], 2, 2), 1: (devices[:1], 1, 1)}
    return {count: Mesh(some.reshape(shape), ("x", "y")) for count, (some, *shape) in shapes.items()}


def placed(mesh: Mesh) -> dict[str, jax.Array]:
    return {name: jax.device_put(VALUES[name], NamedSharding(mesh, SPECS[name])) for name in VALUES}


def abstract(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in placed(mesh).items()}


def check(tree: dict[str, jax.Array], mesh: Mesh) -> None:
    for name, value in VALUES.items():
        assert tree[name].sharding == NamedSharding(mesh, SPECS[name]), (name, tree[name].sharding)
        for shard in tree[name].addressable_shards:
            assert np.array_equal(np.asarray(shard.data), value[shard.index]), name


def test_sharded_and_onto_other_devices(tmp_path: Path, meshes: dict[int, Mesh]) -> None:
    tree = placed(meshes[8])
    for step, after in enumerate([1, 4, 8, 8], start=1):
        put(tmp_path, step, tree)
        tree = restore(tmp_path, abstract(meshes[after]), report=silent).tree
        check(tree, meshes[after])

    def chunks(step: int, leaf: str) -> list[str]:
        return sorted(path.name for path in tmp_path.glob(f"step-{step:08d}/arrays/*-{leaf}/c*"))

    assert chunks(2, "grid") == ["c.0.0"]
    assert chunks(3, "grid") == [f"c.{i}.{j}" for i in range(2) for j in range(2)]
    # A step that donates what was restored does not write into another device's replica.
    add = jax.jit(lambda tree, n: jax.tree.map(lambda x: x + n.astype(x.dtype), tree), donate_argnums=0)
    check(add(add(tree, jnp.int32(1)), jnp.int32(-1)), meshes[8])


def test_chunks_are_shards_and_only_those_needed_are_read(tmp_path: Path, meshes: dict[int, Mesh]) -> None:
    folder = put(tmp_path, 1, placed(meshes[8])) / "arrays"
    found = {leaf: {path.name: path.stat().st_size - 4 for path in folder.glob(f"*-{leaf}/c*")} for leaf in VALUES}
    assert found["rows"] == {f"c.{i}.0": 4 * 6 * 4 for i in range(4)}
    assert found["grid"] == {f"c.{i}.{j}": 2 * 4 * 4 for i in range(4) for j in range(2)}
    assert (list(found["replicated"]), list(found["scalar"])) == (["c.0"], ["c"])
    assert len(arrays.host_arrays(placed(meshes[8]))[2].parts) == 1  # and not once a replica
    # The second half of the columns, whose chunks are whole.
    for i in range(4):
        (next(folder.glob("*-grid")) / f"c.{i}.0").unlink()
    saved = next(array for array in read_step(tmp_path, 1).arrays if array.path == "grid")
    box = ((0, 8), (4, 8))
    (parts,) = arrays.read_parts(str(folder), [(saved, {box})])
    assert np.array_equal(parts[box], VALUES["grid"][:, 4:])


def test_processes_with_the_same_chunks_share_the_bytes(monkeypatch) -> None:
    """Large chunks first, each by the process with the fewest bytes so far of those that have it."""
    saved = {"small": np.zeros(4), "middle": np.zeros(6), "large": np.zeros(9), "own": np.zeros(5)}
    holders = {size: {0, 1} for size in (4, 6, 9)} | {5: {0}}
    monkeypatch.setattr(arrays, "_holders", lambda array: {arrays.whole(array.shape): holders[array.size]})
    found = {path: list(boxes.values()) for path, boxes in arrays._writers(saved, 2).items()}
    assert found == {"large": [0], "middle": [1], "own": [0], "small": [1]}
