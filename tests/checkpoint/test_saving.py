"""A step is committed whole or not at all, whoever is killed and whatever the disk does."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
from trees import bits, chunk_files, files, make_model, make_state, put, silent

from sophia_levanter.checkpoint import CheckpointError, Retention, remove_leftovers, restore, save, steps
from sophia_levanter.errors import InputError
from sophia_levanter.kvstore import context_spec


def test_keep(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000, 15):
        put(tmp_path, step, make_model(), keep=2)
    assert steps(tmp_path) == [10, 15, 100_000_000]  # the later one is of before the run was taken back
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015", "step-100000000"]
    with pytest.raises(InputError, match="kept"):
        put(tmp_path, 20, make_model(), keep=0)


def test_an_intact_step_is_never_written_into(tmp_path: Path) -> None:
    folder = put(tmp_path, 1, make_state(1))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(tmp_path)}
    with pytest.raises(FileExistsError, match="step-00000001 already holds"):
        put(tmp_path, 1, make_state(2))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(tmp_path)} == before

    chunk_files(folder)[0].unlink()
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
        save(tmp_path, 2, make_state(2), run_id="run", metadata={"bad": object()}, retention=Retention(1))  # type: ignore[dict-item]
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
    assert before == [Path("arrays"), Path(), Path("manifest.json"), Path()]
    # The rest is tensorstore's: files, and the names in the folders that they are in.
    assert ts.Context(context_spec())["file_io_sync"].to_json() is True
    assert events[renamed + 1 :] == [tmp_path / "checkpoints", tmp_path]


SAVE_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from sophia_levanter.checkpoint import Retention, restore, save, steps
directory = Path(sys.argv[1])
step = max(steps(directory), default=0)
while True:
    step += 1
    tree = {str(i): np.full((64, 64), step) for i in range(20)}
    save(directory, step, tree, run_id="r", metadata={}, retention=Retention(2))
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
