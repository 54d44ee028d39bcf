"""No damage is ever taken for a checkpoint, and all of it is found."""

import functools
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from trees import bits, blank, chunk_files, files, make_state, one_line, put, silent

from sophia_levanter.checkpoint import CheckpointError, damage, restore
from sophia_levanter.errors import InputError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    put(directory, 1, make_state())
    return directory


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 10))])
def test_a_flipped_bit_anywhere_is_found(saved: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        kind = rng.choice(["c*", "zarr.json", "manifest.json"])
        path = rng.choice(sorted(path for path in saved.rglob(kind) if path.is_file()))
        content = path.read_bytes()
        data = bytearray(content)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with replaced(path, data):
            assert_found(saved, path)


@contextmanager
def replaced(path: Path, content: bytes | None) -> Iterator[None]:
    """The file with another content, or deleted, until the context is left."""
    before = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@functools.cache
def like() -> Any:
    return blank(make_state())


def assert_found(directory: Path, path: Path) -> None:
    """Both that the damaged file is found to be so, and that nothing is made of it."""
    (line,) = damage(directory, 1)
    assert str(path) in line
    with pytest.raises(CheckpointError) as error:
        restore(directory, like(), report=silent)
    assert line in one_line(error)
    if path.name != "manifest.json":
        assert line.startswith("leaf ")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: None,
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: bytes(min(len(content), 4096)) + content[4096:],  # as a lost page leaves it
    ],
    ids=["gone", "truncated", "emptied", "partly zeroed"],
)
def test_each_file_is_needed_whole(saved: Path, change: Callable[[bytes], bytes | None]) -> None:
    for path in files(saved):
        with replaced(path, change(path.read_bytes())):
            assert_found(saved, path)


def test_all_damage_is_named(saved: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(saved, tmp_path / "copy")
    assert damage(directory, 1) == []
    lost = random.Random(0).sample([path for path in files(directory) if path.name != "manifest.json"], 5)
    for path in lost:
        path.unlink()
    found = damage(directory, 1)
    assert len(found) == 5
    assert all(any(str(path) in line for line in found) for path in lost)


def test_a_chunk_of_another_step_is_found(tmp_path: Path) -> None:
    """Its own checksum is right: only the manifest's digest can tell."""
    one, two = put(tmp_path, 1, make_state(1)), put(tmp_path, 2, make_state(2))
    path = next(path for path in chunk_files(two) if "up.weight" in str(path))
    shutil.copy(one / path.relative_to(two), path)
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, make_state(), report=silent, step=2)
    assert f"leaf model.up.weight, {path}" in one_line(error)
    assert len(damage(tmp_path, 2)) == 1


def test_a_manifest_or_folder_of_another_step_is_found(tmp_path: Path) -> None:
    one = put(tmp_path, 1, make_state(1))
    shutil.copytree(one, tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="manifest belongs to step 1"):
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


def lose_a_chunk(folder: Path) -> Path:
    path = chunk_files(folder)[0]
    path.unlink()
    return path


def test_a_damaged_newest_falls_back_loudly(tmp_path: Path) -> None:
    put(tmp_path, 1, make_state(1))
    put(tmp_path, 2, make_state(2))
    lost = lose_a_chunk(put(tmp_path, 3, make_state(3)))
    (tmp_path / "step-00000002" / "manifest.json").write_text("{}")
    lines: list[str] = []
    restored = restore(tmp_path, make_state(), report=lines.append)
    assert restored.step == 1
    assert bits(restored.tree) == bits(make_state(1))
    assert len(lines) == 2
    assert "WARNING" in lines[0] and str(lost) in lines[0] and lines[0].endswith("falling back to step-00000002")
    assert "step-00000002/manifest.json" in lines[1] and lines[1].endswith("falling back to step-00000001")


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    lost = [lose_a_chunk(put(tmp_path, step, make_state(step))) for step in (1, 2)]
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, make_state(), report=lambda line: None)
    assert all(str(path) in one_line(error) for path in lost)
    assert "leaf model.up.weight" in one_line(error)


def test_a_step_asked_for_does_not_fall_back(tmp_path: Path) -> None:
    put(tmp_path, 1, make_state(1))
    put(tmp_path, 2, make_state(2))
    assert restore(tmp_path, make_state(), report=silent, step=1).step == 1
    lose_a_chunk(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError):
        restore(tmp_path, make_state(), report=silent, step=2)
    with pytest.raises(InputError, match="step 5; available steps: 1, 2"):
        restore(tmp_path, make_state(), report=silent, step=5)
