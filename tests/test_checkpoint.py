"""The checkpoint layer: what is saved comes back bit for bit, and no damage or kill is ever taken for a checkpoint."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.checkpoint import CheckpointError, remove_leftovers, restore, save, steps
from sophia_levanter.errors import InputError

Embed = hax.Axis("embed", 6)
Mlp = hax.Axis("mlp", 4)


class Model(eqx.Module):
    up: hax.nn.Linear
    scale: jax.Array
    activation: Any
    dropout: float
    name: str = eqx.field(static=True)


class State(eqx.Module):
    model: Model
    optimizer: Any
    step: jax.Array


def make_model(seed: int = 0, activation: Any = jax.nn.gelu) -> Model:
    up = hax.nn.Linear.init(Embed, Mlp, key=jax.random.PRNGKey(seed))
    scale = jnp.array([1.5, jnp.nan, -0.0, jnp.inf], jnp.bfloat16)
    return Model(up, scale, activation, 0.1, "m")


def make_state(seed: int = 0) -> State:
    model = make_model(seed)
    optimizer = (
        {"momentum": jax.tree.map(lambda x: x * 0 if eqx.is_array(x) else x, model), "mask": jnp.array([True, False])},
        (jnp.arange(5, dtype=jnp.int8), None, np.random.default_rng(seed).standard_normal((2, 3))),
        [jnp.zeros((0, 3)), np.float32(2.5), jax.random.PRNGKey(seed)],
    )
    return State(model, optimizer, jnp.asarray(seed, jnp.int32))


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def bits(tree: Any) -> list[Any]:
    """Each array leaf as (dtype, shape, bytes)."""
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree) if is_array(x)]


def blank(tree: Any) -> Any:
    """The same structure with other numbers in it."""
    return jax.tree.map(lambda x: x + jnp.ones((), x.dtype) if isinstance(x, jax.Array) else x, tree)


def put(directory: Path, step: int, tree: Any, *, keep: int = 9) -> Path:
    return save(directory, step, tree, run_id="run", metadata={"seed": step}, keep=keep)


def silent(line: str) -> None:
    raise AssertionError(f"unexpected report: {line}")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def chunk_files(folder: Path) -> list[Path]:
    return [path for path in files(folder) if path.name.startswith("c")]


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Round trips.


def test_round_trip_is_bit_identical(tmp_path: Path) -> None:
    state = make_state()
    folder = save(tmp_path / "run" / "checkpoints", 10, state, run_id="abc", metadata={"best": [1.5, None]}, keep=1)
    assert folder == tmp_path / "run" / "checkpoints" / "step-00000010"

    like = blank(state)
    assert bits(like) != bits(state)
    restored = restore(tmp_path / "run" / "checkpoints", like, report=silent)
    assert (restored.step, restored.run_id, restored.metadata) == (10, "abc", {"best": [1.5, None]})
    assert bits(restored.tree) == bits(state)
    assert jax.tree.structure(restored.tree) == jax.tree.structure(state)
    assert isinstance(restored.tree.optimizer[1][2], np.ndarray)


def test_leaves_that_are_no_arrays_come_from_like(tmp_path: Path) -> None:
    put(tmp_path, 1, make_model())
    like = eqx.tree_at(lambda m: m.dropout, make_model(1, activation=jax.nn.relu), 0.7)
    model = restore(tmp_path, like, report=silent).tree
    assert (model.activation, model.dropout) == (jax.nn.relu, 0.7)
    assert bits(model) == bits(make_model())


def test_like_may_be_abstract_and_uncommitted_arrays_stay_so(tmp_path: Path) -> None:
    state = {"model": make_model(), "here": jax.device_put(jnp.ones(3), jax.devices()[0])}
    put(tmp_path, 1, state)
    abstract = restore(tmp_path, eqx.filter_eval_shape(lambda: state), report=silent).tree
    assert bits(abstract) == bits(state)
    concrete = restore(tmp_path, state, report=silent).tree
    assert concrete["here"].committed
    assert not concrete["model"].scale.committed


def test_float64(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        tree = {"w": jnp.array([1 / 3, jnp.pi])}
        assert tree["w"].dtype == jnp.float64
        put(tmp_path, 1, tree)
        assert bits(restore(tmp_path, tree, report=silent).tree) == bits(tree)
    with pytest.raises(InputError, match=r"leaf w is float64.*jax_enable_x64"):
        restore(tmp_path, {"w": jax.ShapeDtypeStruct((2,), np.dtype("float64"))}, report=silent)


def test_numpy_arrays_of_any_layout(tmp_path: Path) -> None:
    tree = {
        "F": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(10)[::3],
        "big": np.ones(2, ">f4"),
    }
    put(tmp_path, 1, tree)
    found = restore(tmp_path, tree, report=silent).tree
    assert all(np.array_equal(found[name], tree[name]) for name in tree)


def test_manifest_names_and_describes_each_leaf(tmp_path: Path) -> None:
    folder = put(tmp_path, 7, {"model": make_model()})
    manifest = json.loads((folder / "manifest.json").read_text())
    described = {array["path"]: (array["dtype"], array["shape"]) for array in manifest["arrays"]}
    assert described == {
        "model.up.weight": ("float32", [4, 6]),
        "model.up.bias": ("float32", [4]),
        "model.scale": ("bfloat16", [4]),
    }
    assert (manifest["format"], manifest["step"], manifest["run_id"], manifest["metadata"]) == (
        1,
        7,
        "run",
        {"seed": 7},
    )


def test_ambiguous_names_and_random_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two leaves .* called a\.b"):
        put(tmp_path, 1, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
    with pytest.raises(TypeError, match=r"leaf key .*key_data"):
        put(tmp_path, 1, {"key": jax.random.key(0)})
    with pytest.raises(TypeError, match="leaf words"):
        put(tmp_path, 1, {"words": np.array(["a"])})
    assert list(tmp_path.iterdir()) == []


# Damage.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    put(directory, 1, make_state())
    return directory


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_found_or_harmless(saved: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    expected = bits(make_state())
    found = 0
    for trial in range(15):
        directory = shutil.copytree(saved, tmp_path / str(trial))
        kind = rng.choice(["c*", "zarr.json", "manifest.json"])
        path = rng.choice(sorted(path for path in directory.rglob(kind) if path.is_file()))
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            restored = restore(directory, blank(make_state()), report=silent)
        except CheckpointError as error:
            assert str(directory) in str(error)
            found += 1
        else:
            assert bits(restored.tree) == expected
            assert (restored.step, restored.metadata, restored.run_id) == (1, {"seed": 1}, "run")
            assert path.name == "zarr.json"  # a part of it that says nothing about the array
    assert found > 5


@pytest.mark.parametrize(("text", "other"), [('"seed": 1', '"seed": 3'), ('"run"', '"ruin"'), ('"float32"', '"int32"')])
def test_an_edited_manifest_is_found(saved: Path, tmp_path: Path, text: str, other: str) -> None:
    file = shutil.copytree(saved, tmp_path / "copy") / "step-00000001" / "manifest.json"
    assert text in file.read_text()
    file.write_text(file.read_text().replace(text, other))
    with pytest.raises(CheckpointError, match="digest does not match"):
        restore(tmp_path / "copy", make_state(), report=silent)


@pytest.mark.parametrize("kind", ["delete", "empty", "truncate"])
def test_each_file_is_needed_whole(saved: Path, tmp_path: Path, kind: str) -> None:
    for number, original in enumerate(files(saved)):
        directory = shutil.copytree(saved, tmp_path / str(number))
        path = directory / original.relative_to(saved)
        if kind == "delete":
            path.unlink()
        else:
            path.write_bytes(b"" if kind == "empty" else path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=path.parent.name):
            restore(directory, make_state(), report=silent)


def test_a_chunk_of_another_step_is_found(tmp_path: Path) -> None:
    """Its own checksum is right: only the manifest's digest can tell."""
    one, two = put(tmp_path, 1, make_state(1)), put(tmp_path, 2, make_state(2))
    path = next(path for path in chunk_files(two) if "up.weight" in str(path))
    shutil.copy(one / path.relative_to(two), path)
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, make_state(), report=silent, step=2)
    assert f"leaf model.up.weight, {path}" in one_line(error)


def test_a_manifest_or_folder_of_another_step_is_found(tmp_path: Path) -> None:
    one = put(tmp_path, 1, make_state(1))
    shutil.copytree(one, tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="manifest is the one of step 1"):
        restore(tmp_path, make_state(), report=silent, step=2)


def test_zeros_and_nans_are_written_and_a_lost_chunk_of_zeros_is_missed(tmp_path: Path) -> None:
    tree = {"zeros": jnp.zeros((3, 2)), "nans": jnp.full(4, jnp.nan), "false": jnp.array(False)}
    folder = put(tmp_path, 1, tree)
    assert bits(restore(tmp_path, tree, report=silent).tree) == bits(tree)
    for path in chunk_files(folder):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointError):
            restore(tmp_path, tree, report=silent)
        path.write_bytes(content)


def damage(folder: Path) -> Path:
    path = chunk_files(folder)[0]
    path.unlink()
    return path


def test_a_damaged_newest_falls_back_loudly(tmp_path: Path) -> None:
    put(tmp_path, 1, make_state(1))
    put(tmp_path, 2, make_state(2))
    lost = damage(put(tmp_path, 3, make_state(3)))
    (tmp_path / "step-00000002" / "manifest.json").write_text("{}")
    lines: list[str] = []
    restored = restore(tmp_path, make_state(), report=lines.append)
    assert restored.step == 1
    assert bits(restored.tree) == bits(make_state(1))
    assert len(lines) == 2
    assert "WARNING" in lines[0] and str(lost) in lines[0] and lines[0].endswith("falling back to step-00000002")
    assert "step-00000002/manifest.json" in lines[1] and lines[1].endswith("falling back to step-00000001")


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    lost = [damage(put(tmp_path, step, make_state(step))) for step in (1, 2)]
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, make_state(), report=lambda line: None)
    assert all(str(path) in one_line(error) for path in lost)
    assert "leaf model.up.weight" in one_line(error)


def test_a_step_asked_for_does_not_fall_back(tmp_path: Path) -> None:
    put(tmp_path, 1, make_state(1))
    put(tmp_path, 2, make_state(2))
    assert restore(tmp_path, make_state(), report=silent, step=1).step == 1
    damage(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError):
        restore(tmp_path, make_state(), report=silent, step=2)
    with pytest.raises(InputError, match="step 5: it has 1, 2"):
        restore(tmp_path, make_state(), report=silent, step=5)


def test_no_checkpoint(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        assert steps(directory) == []
        with pytest.raises(InputError, match="holds no checkpoint"):
            restore(directory, make_state(), report=silent)
    remove_leftovers(tmp_path / "absent")


# Another model.


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            {"a": {"w": jnp.ones((2, 4))}, "b": jnp.ones(3)},
            r"leaf a.w is float32[2, 3] in the checkpoint and float32[2, 4] ",
        ),
        (
            {"a": {"w": jnp.ones((3, 2))}, "b": jnp.ones(3)},
            r"leaf a.w is float32[2, 3] in the checkpoint and float32[3, 2] ",
        ),
        (
            {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(3, jnp.bfloat16)},
            r"leaf b is float32[3] in the checkpoint and bfloat16[3] ",
        ),
        ({"a": {"w": jnp.ones((2, 3))}}, r"leaf b is float32[3] in the checkpoint and missing "),
        ({"a": {"w": jnp.ones((2, 3))}, "b": None}, r"leaf b is float32[3] in the checkpoint and missing "),
        (
            {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(3), "c": jnp.ones(())},
            r"leaf c is missing in the checkpoint and float32[] ",
        ),
    ],
)
def test_a_checkpoint_of_another_model(tmp_path: Path, like: Any, message: str) -> None:
    for step in (1, 2):
        put(tmp_path, step, {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(3)})
    with pytest.raises(InputError) as error:
        restore(tmp_path, like, report=silent)
    assert message in one_line(error)
    assert "step-00000002" in one_line(error)


def test_a_later_format_is_refused_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1, make_state())
    with monkeypatch.context() as patch:
        patch.setattr("sophia_levanter.checkpoint.manifest.FORMAT", 2)
        put(tmp_path, 2, make_state())
    with pytest.raises(InputError, match="not in format 1"):
        restore(tmp_path, make_state(), report=silent)


def test_an_array_that_lies_on_several_hosts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = jnp.ones(3)
    monkeypatch.setattr(type(array), "is_fully_addressable", False)
    with pytest.raises(TypeError, match=r"^leaf model.weight lies on several hosts; bring it to this one to save it$"):
        put(tmp_path, 1, {"model": {"weight": array}})
    assert not list(tmp_path.glob("step-*"))


# Committing.


def test_keep(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000, 15):
        put(tmp_path, step, make_model(), keep=2)
    assert steps(tmp_path) == [10, 15, 100_000_000]  # the later one is of before the run was taken back
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015", "step-100000000"]
    with pytest.raises(InputError, match="keep"):
        put(tmp_path, 20, make_model(), keep=0)


def test_an_intact_step_is_never_written_into(tmp_path: Path) -> None:
    folder = put(tmp_path, 1, make_state(1))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(tmp_path)}
    with pytest.raises(FileExistsError, match="step-00000001 already holds"):
        put(tmp_path, 1, make_state(2))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(tmp_path)} == before

    damage(folder)
    put(tmp_path, 1, make_state(3))
    assert bits(restore(tmp_path, make_state(), report=silent).tree) == bits(make_state(3))
    assert list(tmp_path.iterdir()) == [folder]


def test_leftovers_are_no_steps_and_are_removed(tmp_path: Path) -> None:
    kept = [put(tmp_path, 1, make_model()), tmp_path / "notes.txt", tmp_path / "step-00000001.backup"]
    kept[1].touch()
    for name in ("step-00000002.partial-" + "0a" * 16, "step-00000003.removed-" + "f1" * 16, kept[2].name):
        shutil.copytree(kept[0], tmp_path / name)
    assert steps(tmp_path) == [1]
    assert restore(tmp_path, make_model(), report=silent).step == 1
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1, make_state(1))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step-00000002 could not be written.*No space left"):
        put(tmp_path, 2, make_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    with pytest.raises(CheckpointError, match="could not be written"):
        put(tmp_path / "step-00000001" / "manifest.json", 1, make_state())
    with pytest.raises(TypeError):
        save(tmp_path, 2, make_state(2), run_id="run", metadata={"bad": object()}, keep=1)  # type: ignore[dict-item]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Path] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        events.append(target)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    final = put(tmp_path / "checkpoints", 1, make_state())
    renamed = events.index(final)
    partial = next(path for path in events if ".partial-" in path.name)
    before = [path.relative_to(partial) for path in events[:renamed]]
    written = [path.relative_to(final) for path in [final, *final.rglob("*")]]
    assert set(before) == set(written)
    assert before[-2:] == [Path("manifest.json"), Path()]
    assert events[renamed + 1 :] == [tmp_path / "checkpoints", tmp_path]


# Processes of their own.

SAVE_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from sophia_levanter.checkpoint import restore, save, steps
directory = Path(sys.argv[1])
step = max(steps(directory), default=0)
while True:
    step += 1
    save(directory, step, {str(i): np.full((64, 64), step) for i in range(20)}, run_id="r", metadata={}, keep=2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_in_the_midst_of_saves(tmp_path: Path) -> None:
    like = {str(i): np.zeros((64, 64), int) for i in range(20)}
    rng = random.Random(0)
    leftovers = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        committed = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        committed = max([committed, *map(int, process.stdout.read().split())])
        process.wait()

        leftovers += len([path for path in tmp_path.iterdir() if "." in path.name])
        remove_leftovers(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in steps(tmp_path)]
        restored = restore(tmp_path, like, report=silent)
        assert restored.step in (committed, committed + 1)
        assert all((leaf == restored.step).all() for leaf in restored.tree.values())
    assert leftovers > 0


RESHARD = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sophia_levanter.checkpoint import arrays, manifest, restore, save

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
    save(directory, step, tree, run_id="r", metadata={}, keep=9)
    tree = restore(directory, abstract(meshes[after]), report=print).tree
    check(tree, meshes[after])

# Chunks are shards.
names = lambda step, leaf: sorted(p.name for p in directory.glob(f"step-{step:08d}/arrays/*-{leaf}/c*"))
sizes = lambda step, leaf: {p.stat().st_size - 4 for p in directory.glob(f"step-{step:08d}/arrays/*-{leaf}/c*")}
assert names(1, "rows") == [f"c.{i}.0" for i in range(4)] and sizes(1, "rows") == {4 * 6 * 4}
assert names(1, "grid") == [f"c.{i}.{j}" for i in range(4) for j in range(2)] and sizes(1, "grid") == {2 * 4 * 4}
assert names(1, "replicated") == ["c.0"] and names(1, "scalar") == ["c"]
assert len(list(arrays._shards(placed(meshes[8])["replicated"]))) == 1  # and not once a replica
assert names(2, "grid") == ["c.0.0"] and names(3, "grid") == [f"c.{i}.{j}" for i in range(2) for j in range(2)]

# A step that donates what was restored does not write into another device's replica.
add = jax.jit(lambda tree, n: jax.tree.map(lambda x: x + n.astype(x.dtype), tree), donate_argnums=0)
check(add(add(tree, jnp.int32(1)), jnp.int32(-1)), meshes[8])

# Only what a shard needs is read: here the second half of the columns, whose chunks are whole.
for i in range(4):
    (next(directory.glob("step-00000001/arrays/*-grid")) / f"c.{i}.0").unlink()
saved = next(a for a in manifest.read_manifest(directory / "step-00000001").arrays if a.path == "grid")
box = ((0, 8), (4, 8))
parts = arrays.read_parts(directory / "step-00000001", saved, {box}, arrays.make_context())
assert np.array_equal(parts[box], values["grid"][:, 4:])
"""


def test_sharded_and_onto_other_devices(tmp_path: Path) -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", RESHARD, str(tmp_path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ""
