"""Saves and restores of several real processes: each writes its shards, and all of them fail together or not at all."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sophia_levanter.checkpoint import read_step, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HEARTBEAT = 5
PROGRAM = f"""
import os, resource, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

address, count, index, what, directory = sys.argv[1:]
count, index = int(count), int(index)
if count > 1:
    jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds={HEARTBEAT})
from sophia_levanter import checkpoint
from sophia_levanter.checkpoint import CheckpointError, Retention, Saver, restore, saving
from sophia_levanter.partition.processes import Processes

processes = Processes.of_this_run()
assert (processes.index, processes.count) == (index, count)
devices = np.array(jax.devices())
fsdp, tensor = Mesh(devices, "x"), Mesh(devices.reshape(2, -1), ("x", "y"))
values = {{
    "rows": np.arange(16 * 6, dtype=np.float32).reshape(16, 6),
    "columns": np.arange(64, dtype=np.int32).reshape(8, 8),
    **{{f"everywhere.{{i}}": np.arange(100 + i, dtype=np.float32) for i in range(6)}},
    "scalar": np.float32(3),
}}

def layout(mesh):
    specs = {{"rows": P("x"), "columns": P(None, mesh.axis_names[-1])}}
    return {{name: NamedSharding(mesh, specs.get(name, P())) for name in values}}

def tree(step, mesh=fsdp):
    placed = {{}}
    for name, sharding in layout(mesh).items():
        value = values[name] * 0 + step if name == "scalar" else values[name] + step
        placed[name] = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    return placed

def like(mesh):
    return {{name: jax.ShapeDtypeStruct(np.shape(values[name]), values[name].dtype, sharding=sharding)
            for name, sharding in layout(mesh).items()}}

def check(found, step):
    for name, array in found.items():
        for shard in array.addressable_shards:
            value = values[name] * 0 + step if name == "scalar" else values[name] + step
            assert np.array_equal(np.asarray(shard.data), value[shard.index]), (name, step)

def restored(mesh, report=print):
    return restore(directory, like(mesh), report=report, processes=processes)

saver = Saver(directory, run_id=f"run {{index}}", processes=processes)
def save(step):
    saver.save(step, tree(step), metadata={{"seed": step}}, retention=Retention(9))

def failing(step):
    save(step)
    started = time.monotonic()
    try:
        saver.wait()
    except CheckpointError as error:
        print("failed after", time.monotonic() - started, "s:", error, flush=True)
        saver._failure = None
    else:
        raise AssertionError("it was saved")
"""


def start(what: str, directory: Path, count: int, body: str, devices: int = 2) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM + body, address, str(count), str(index), what, str(directory)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, error) in zip(processes, results, strict=True):
        assert process.returncode == 0, out + error
    return results


def run(directory: Path, count: int, body: str, devices: int = 2) -> list[str]:
    """What each of several processes prints, without what the network library does."""
    results = ended(start("run", directory, count, body, devices))
    return ["".join(f"{line}\n" for line in out.splitlines() if "[Gloo]" not in line) for out, _ in results]


def test_each_writes_its_share_and_any_number_reads_it(tmp_path: Path) -> None:
    """Two processes of two devices under FSDP, to one of four with tensor parallelism, to one device, and back."""
    body = """
from sophia_levanter.checkpoint import arrays as module
write, written = module.write_arrays, []
def noting(folder, arrays, **options):
    written.extend(a.saved.path for a in arrays if a.parts)
    return write(folder, arrays, **options)
saving.write_arrays = noting
save(1)
saver.wait()
print(" ".join(written))
"""
    first, second = (set(out.split()) for out in run(tmp_path, 2, body))
    assert {"rows", "columns"} <= first & second, "both have shards of these"
    # Replicated arrays are shared out.
    alone = {f"everywhere.{i}" for i in range(6)} | {"scalar"}
    assert (first & alone) | (second & alone) == alone and not first & second & alone
    assert min(len(first & alone), len(second & alone)) >= 2
    assert read_step(tmp_path, 1).run_id == "run 0"

    check = "check(restored(fsdp).tree, 1)\ncheck(restored(tensor).tree, 1)\n"
    again = "saver.save({0}, restored(tensor).tree, metadata={{}}, retention=Retention(9))\nsaver.wait()\n"
    for count, devices, step in ((1, 4, 2), (1, 2, 3), (2, 1, 4), (2, 2, 5)):
        assert run(tmp_path, count, check + again.format(step), devices) == [""] * count
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_one_cannot_write_and_none_commits(tmp_path: Path) -> None:
    body = """
save(1)
saver.wait()
if index == 1:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
failing(2)
if index == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
assert checkpoint.steps(directory) == [1]
save(3)
saver.wait()
check(restored(fsdp).tree, 3)
"""
    results = run(tmp_path, 2, body)
    for out in results:
        (line,) = out.splitlines()
        assert float(line.split()[2]) < 5
        assert "step-00000002 could not be written: process 1: leaf " in line and "File too large" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_one_that_does_not_answer_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    body = """
saving.PATIENCE = 2
write = saving.write_arrays
def slow(folder, arrays, **options):
    time.sleep(5 * index)
    return write(folder, arrays, **options)
saving.write_arrays = slow
failing(1)
assert checkpoint.steps(directory) == []
saving.PATIENCE = 60
save(2)
saver.wait()
"""
    first, second = run(tmp_path, 2, body)
    assert "process 1 did not respond within 2 s" in first and "process 1 did not respond within 2 s" in second
    assert float(first.split()[2]) < 4
    assert steps(tmp_path) == [2]


def test_a_disk_that_is_not_shared_is_noticed(tmp_path: Path) -> None:
    body = """
from sophia_levanter.checkpoint.storage import DiskStorage
saver._storage = DiskStorage(Path(directory) / f"disk of {index}")
failing(1)
"""
    for out in run(tmp_path, 2, body):
        assert "process 1 wrote step-00000001.partial-" in out
        assert "require a shared disk or a bucket" in out


def test_damage_that_one_sees_makes_all_fall_back(tmp_path: Path) -> None:
    run(tmp_path, 2, "for step in (1, 2):\n    save(step)\n    saver.wait()\n")
    (rows,) = (tmp_path / "step-00000002" / "arrays").glob("*-rows")
    (rows / "c.3.0").unlink()  # only the second process's devices need it
    body = "found = restored(fsdp, lambda line: print(line))\nassert found.step == 1\ncheck(found.tree, 1)\n"
    for out in run(tmp_path, 2, body):
        assert "WARNING: damaged checkpoint: leaf rows, " in out and "c.3.0" in out
        assert "falling back to step-00000001" in out


def test_one_killed_during_a_save(tmp_path: Path) -> None:
    body = """
save(1)
saver.wait()
print("saved", flush=True)
write = saving.write_arrays
def dying(folder, arrays, **options):
    digests = write(folder, arrays, **options)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return digests
saving.write_arrays = dying
save(2)
saver.wait()
print("committed", flush=True)
"""
    processes = start("kill", tmp_path, 2, body)
    assert processes[1].wait(120) == -signal.SIGKILL
    killed = time.monotonic()
    processes[0].wait(60)
    seconds = time.monotonic() - killed
    out, _ = processes[0].communicate()
    assert processes[0].returncode != 0
    assert "saved" in out and "committed" not in out
    assert seconds < HEARTBEAT + 5, seconds
    assert steps(tmp_path) == [1]
    run(tmp_path, 2, "checkpoint.remove_leftovers(directory) if index == 0 else None\ncheck(restored(fsdp).tree, 1)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
