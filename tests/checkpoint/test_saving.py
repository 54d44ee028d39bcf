"""A step is committed whole or not at all, whoever is killed and whatever the disk does."""

import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec
from trees import bits, chunk_files, files, make_model, make_state, put, silent

from kills import Fork, save_50_times, save_for_ever
from sophia_levanter.checkpoint import (
    CheckpointError,
    Retention,
    Saver,
    copy_step,
    damage,
    remove_leftovers,
    restore,
    save,
    saving,
    steps,
)
from sophia_levanter.errors import InputError
from sophia_levanter.kvstore import context_spec


def test_keep(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000, 15):
        put(tmp_path, step, make_model(), keep=2)
    assert steps(tmp_path) == [10, 15, 100_000_000]  # the later one is of before the run was taken back
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015", "step-100000000"]
    with pytest.raises(InputError, match="both must be at least 1"):
        put(tmp_path, 20, make_model(), keep=0)


def test_an_intact_step_is_never_written_into(tmp_path: Path) -> None:
    folder = put(tmp_path, 1, make_state(1))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(tmp_path)}
    with pytest.raises(FileExistsError, match="step-00000001 already contains"):
        put(tmp_path, 1, make_state(2))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(tmp_path)} == before

    chunk_files(folder)[0].unlink()
    put(tmp_path, 1, make_state(3))
    assert bits(restore(tmp_path, make_state(), report=silent).tree) == bits(make_state(3))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_copy_is_a_step_of_another_run(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    put(source, 3, make_state(1))
    copy_step(source, 3, target, run_id="other", metadata={"more": 1})
    restored = restore(target, make_state(), report=silent)
    assert bits(restored.tree) == bits(make_state(1))
    assert (restored.step, restored.run_id) == (3, "other")
    assert restored.metadata == restore(source, make_state(), report=silent).metadata | {"more": 1}
    with pytest.raises(FileExistsError, match="step-00000003"):
        copy_step(source, 3, target, run_id="third", metadata={})
    chunk = chunk_files(source)[0]
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="step-00000003"):
        copy_step(source, 3, tmp_path / "c", run_id="other", metadata={})


def test_leftovers_are_no_steps_and_are_removed(tmp_path: Path) -> None:
    kept = [put(tmp_path, 1, make_model()), tmp_path / "notes.txt", tmp_path / "step-00000001.backup"]
    kept[1].touch()
    (tmp_path / "step-000000001").mkdir()
    kept.append(tmp_path / "step-000000001")
    for name in ("step-00000002.partial-" + "0a" * 16, "step-00000003.removed-" + "f1" * 16, kept[2].name):
        shutil.copytree(kept[0], tmp_path / name)
    assert steps(tmp_path) == [1]
    assert restore(tmp_path, make_model(), report=silent).step == 1
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_step_that_is_a_link_goes_too(tmp_path: Path) -> None:
    put(tmp_path / "run", 1, make_model())
    (tmp_path / "run" / "step-00000001").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "step-00000001").symlink_to(tmp_path / "elsewhere")
    put(tmp_path / "run", 2, make_model(), keep=1)
    (tmp_path / "run" / f"step-00000003.removed-{'0a' * 16}").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000002"]
    assert (tmp_path / "elsewhere" / "manifest.json").exists()


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
        save(tmp_path, 2, make_state(2), run_id="run", metadata={"bad": object()}, retention=Retention(1))  # type: ignore[dict-item]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


REMOVALS = {
    "the run": lambda folder: shutil.rmtree(folder.parent),
    "the checkpoints": lambda folder: shutil.rmtree(folder),
    "what is written": lambda folder: [shutil.rmtree(path) for path in folder.glob("*.partial-*")],
    "the run renamed": lambda folder: folder.parent.rename(folder.parent.with_name("renamed")),
}


@pytest.mark.parametrize("remove", REMOVALS.values(), ids=REMOVALS)
def test_a_folder_that_is_removed_while_a_step_is_written_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remove: Any
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    put(folder, 1, make_state())
    write = saving.write_arrays

    def remove_and_write(path: str, arrays: Any, **options: Any) -> Any:
        write(path, arrays[:1], **options)
        remove(folder)
        return write(path, arrays, **options)

    monkeypatch.setattr(saving, "write_arrays", remove_and_write)
    before = {path for path in tmp_path.rglob("step-*") if path.is_dir()}
    with pytest.raises(CheckpointError, match=r"step-00000002 could not be written: .* was removed or renamed while"):
        put(folder, 2, make_state())
    left = {path for path in tmp_path.rglob("step-*") if path.is_dir()}
    assert [path.name for path in left if path.name == "step-00000001"] == ["step-00000001"] * (
        remove in (REMOVALS["the run renamed"], REMOVALS["what is written"])
    )
    assert not [path for path in left - before if folder in path.parents]
    if remove in (REMOVALS["the run"], REMOVALS["the run renamed"]):
        assert not folder.parent.exists()


@pytest.mark.parametrize("remove", [REMOVALS["the run"], REMOVALS["the checkpoints"], REMOVALS["the run renamed"]])
def test_a_folder_that_is_removed_between_saves_does_not_come_back(tmp_path: Path, remove: Any) -> None:
    folder = tmp_path / "run" / "checkpoints"
    saver = saver_at(folder)
    begin(saver, 1, make_state())
    saver.wait()
    remove(folder)
    begin(saver, 2, make_state())
    with pytest.raises(CheckpointError, match="checkpoints was removed or renamed during the run"):
        saver.wait()
    assert not folder.exists()
    assert folder.parent.exists() == (remove is REMOVALS["the checkpoints"])


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
    assert events[0] == tmp_path
    before = [path.relative_to(partial) for path in events[1:renamed]]
    assert before == [Path("arrays"), Path("manifest.json"), Path()]
    # The rest is tensorstore's: files, and the names in the folders that they are in.
    assert ts.Context(context_spec())["file_io_sync"].to_json() is True
    assert events[renamed + 1 :] == [tmp_path / "checkpoints"]


# While training goes on.


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves write nothing until this is set."""
    event = threading.Event()
    write = saving.write_arrays

    def waiting(*arguments: Any, **options: Any) -> Any:
        assert event.wait(60)
        return write(*arguments, **options)

    monkeypatch.setattr(saving, "write_arrays", waiting)
    return event


def saver_at(directory: Path) -> Saver:
    return Saver(directory, run_id="run")


def begin(saver: Saver, step: int, tree: Any, *, retention: Retention | None = None) -> None:
    saver.save(step, tree, metadata={"seed": step}, retention=retention or Retention(9))


def test_buffers_may_be_given_away_once_a_save_has_begun(tmp_path: Path, held: threading.Event) -> None:
    mesh = jax.make_mesh((8,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    tree = {"split": jax.device_put(jnp.arange(64.0), sharding), "whole": jnp.arange(1000.0), "host": np.arange(5)}
    wanted = jax.tree.map(np.array, tree)
    saver = saver_at(tmp_path)
    begin(saver, 1, tree)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    devices = {name: tree[name] for name in ("split", "whole")}
    after = jax.block_until_ready(step(devices))
    assert all(array.is_deleted() for array in devices.values())
    tree["host"][:] = -1
    assert steps(tmp_path) == [] and saver.saved is None
    held.set()
    saver.wait()
    assert saver.saved == str(tmp_path / "step-00000001")
    found = restore(tmp_path, wanted, report=silent).tree
    assert bits(found) == bits(wanted)
    assert (np.asarray(after["whole"]) == -1).all()


def test_a_save_waits_for_the_one_before(tmp_path: Path, held: threading.Event) -> None:
    saver = saver_at(tmp_path)
    begin(saver, 1, make_model())
    second = threading.Thread(target=begin, args=(saver, 2, make_model()))
    second.start()
    time.sleep(0.2)
    assert second.is_alive() and steps(tmp_path) == []
    held.set()
    second.join(60)
    saver.wait()
    assert steps(tmp_path) == [1, 2]


def test_a_failed_save_is_told_at_the_next_look_and_the_next_wait(tmp_path: Path) -> None:
    told: list[Exception] = []
    saver = Saver(tmp_path / "folder", run_id="run", on_failure=told.append)
    (tmp_path / "folder").touch()
    begin(saver, 1, make_model())
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    for look in (saver.check, saver.wait, lambda: begin(saver, 2, make_model())):
        with pytest.raises(CheckpointError, match="step-00000001 could not be written"):
            look()


def test_retention() -> None:
    steps = [10, 20, 30, 40, 50, 60]
    assert Retention(2).surplus(steps) == [10, 20, 30, 40]
    assert Retention(1, every=20).surplus(steps) == [10, 30, 50]
    assert Retention(2, best=30).surplus(steps) == [10, 20, 40]
    assert Retention(9).surplus(steps) == []


def test_50_saves_need_no_more_memory_than_5(tmp_path: Path) -> None:
    """A context that is shared by all saves grows by 8 MiB with each, which this would see."""
    status, (early, late) = Fork(save_50_times, tmp_path).end()
    assert status == 0
    assert late - early < 45 * 8 * 2**20 / 8, (early, late)


def kills(directory: Path, how: str, count: int) -> None:
    """Kill a saving process so many times, and look at what is there each time."""
    like = {str(i): np.zeros((64, 64), int) for i in range(20)}
    rng = random.Random(0)
    leftovers = restores = 0
    for _ in range(count):
        fork = Fork(save_for_ever, directory, how == "again")
        committed = fork.receive()
        time.sleep(rng.uniform(0, 0.15))
        fork.kill()
        committed = max([committed, *fork.end()[1]])

        leftovers += len([path for path in directory.iterdir() if "." in path.name])
        remove_leftovers(directory)
        assert sorted(path.name for path in directory.iterdir()) == [f"step-{step:08d}" for step in steps(directory)]
        found = {step: damage(directory, step) for step in steps(directory)}
        # Between a damaged step and the one that takes its place there is a moment without either.
        if not found:
            assert how == "again" and committed == 1
            continue
        assert max(found) in (committed, committed + 1, committed - (how == "again"))
        # The file that was damaged on purpose, and no other.
        wrong = [line for lines in found.values() for line in lines]
        assert not wrong or (how == "again" and all(line.startswith("leaf 7, ") for line in wrong))
        if all(found.values()):  # on a slow machine every step was damaged and not saved again yet
            assert how == "again"
            with pytest.raises(CheckpointError, match="contains no intact checkpoint"):
                restore(directory, like, report=lambda line: None)
            continue
        restored = restore(directory, like, report=lambda line: None)
        assert restored.step == max(step for step, lines in found.items() if not lines)
        values = {int(value) for leaf in restored.tree.values() for value in leaf.reshape(-1)}
        assert len(values) == 1 and abs(values.pop()) == restored.step
        restores += 1
    assert leftovers > 0 and (restores == count if how == "once" else restores > 0)


def test_killed_a_few_times(tmp_path: Path) -> None:
    kills(tmp_path, "once", 3)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["once", "again"])
def test_killed_in_the_midst_of_saves(tmp_path: Path, how: str) -> None:
    kills(tmp_path, how, 60)
