"""Shards are saved as chunks, each once, and come back on any other devices."""

import os
import subprocess
import sys
from pathlib import Path

RESHARD = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sophia_levanter.checkpoint import Retention, arrays, read_step, restore, save

directory = Path(sys.argv[1])
devices = np.array(jax.devices())
assert len(devices) == 8
values = {
    "rows": np.arange(16 * 6, dtype=np.float32).reshape(16, 6),
    "grid": np.arange(64, dtype=np.int32).reshape(8, 8),
    "replicated": np.arange(1024.0, dtype=np.float32),
    "scalar": np.float32(3),
}
specs = {"rows": P("x"), "grid": P("x", "y"), "replicated": P(), "scalar": P()}

def placed(mesh):
    return {name: jax.device_put(values[name], NamedSharding(mesh, specs[name])) for name in values}

def abstract(mesh):
    return {name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, specs[name]))
            for name, value in values.items()}

def mesh(devices, *shape):
    return Mesh(devices.reshape(shape), ("x", "y"))

meshes = {8: mesh(devices, 4, 2), 4: mesh(devices[4:], 2, 2), 1: mesh(devices[:1], 1, 1)}

def check(tree, mesh):
    for name, value in values.items():
        assert tree[name].sharding == NamedSharding(mesh, specs[name]), (name, tree[name].sharding)
        for shard in tree[name].addressable_shards:
            assert np.array_equal(np.asarray(shard.data), value[shard.index]), name

tree = placed(meshes[8])
for step, (before, after) in enumerate([(8, 1), (1, 4), (4, 8), (8, 8)], start=1):
    save(directory, step, tree, run_id="r", metadata={}, retention=Retention(9))
    tree = restore(directory, abstract(meshes[after]), report=print).tree
    check(tree, meshes[after])

# Chunks are shards.
names = lambda step, leaf: sorted(p.name for p in directory.glob(f"step-{step:08d}/arrays/*-{leaf}/c*"))
sizes = lambda step, leaf: {p.stat().st_size - 4 for p in directory.glob(f"step-{step:08d}/arrays/*-{leaf}/c*")}
assert names(1, "rows") == [f"c.{i}.0" for i in range(4)] and sizes(1, "rows") == {4 * 6 * 4}
assert names(1, "grid") == [f"c.{i}.{j}" for i in range(4) for j in range(2)] and sizes(1, "grid") == {2 * 4 * 4}
assert names(1, "replicated") == ["c.0"] and names(1, "scalar") == ["c"]
assert len(arrays.host_arrays(placed(meshes[8]))[2].parts) == 1  # and not once a replica
assert names(2, "grid") == ["c.0.0"] and names(3, "grid") == [f"c.{i}.{j}" for i in range(2) for j in range(2)]

# A step that donates what was restored does not write into another device's replica.
add = jax.jit(lambda tree, n: jax.tree.map(lambda x: x + n.astype(x.dtype), tree), donate_argnums=0)
check(add(add(tree, jnp.int32(1)), jnp.int32(-1)), meshes[8])

# Only what a shard needs is read: here the second half of the columns, whose chunks are whole.
for i in range(4):
    (next(directory.glob("step-00000001/arrays/*-grid")) / f"c.{i}.0").unlink()
saved = next(a for a in read_step(directory, 1).arrays if a.path == "grid")
box = ((0, 8), (4, 8))
(parts,) = arrays.read_parts(f"{directory}/step-00000001/arrays", [(saved, {box})])
assert np.array_equal(parts[box], values["grid"][:, 4:])
"""


def test_sharded_and_onto_other_devices(tmp_path: Path) -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", RESHARD, str(tmp_path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ""
