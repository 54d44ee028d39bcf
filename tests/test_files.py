"""Files are written whole or not at all, and what is not a regular file, or too large, is refused in one line."""

from __future__ import annotations

import os
import signal
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sophia_levanter import files
from sophia_levanter.checkpoint import CheckpointError, Retention, damage, read_step, restore, save
from sophia_levanter.commands.sample import parse as parse_sample
from sophia_levanter.config.command_line import load_config
from sophia_levanter.data.corpora import prepare
from sophia_levanter.data.nanogpt import NanogptTokens
from sophia_levanter.data.text_files import find_files
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.data.tokenizer import ByteTokenizer, load_bpe
from sophia_levanter.errors import InputError
from sophia_levanter.studies.records import read_records as read_study_records
from sophia_levanter.studies.runs import read_metrics
from sophia_levanter.tracking.jsonl import JsonLines


def test_a_full_disk_leaves_nothing_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_atomically(path, b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.txt"):
        files.write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["a.txt"] and path.read_bytes() == b"old"


def test_a_file_that_cannot_be_replaced_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match=r"Is a directory: .*a\.txt'$"):
        files.write_atomically(tmp_path / "a.txt", b"new")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_lock_has_one_holder(tmp_path):
    first = files.lock(tmp_path / "lock")
    assert first is not None and files.lock(tmp_path / "lock") is None
    first.close()
    assert files.lock(tmp_path / "lock") is not None


def test_a_pipe_in_place_of_a_lock_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(OSError, match="No such device"):
        files.lock(tmp_path / "lock")


def test_a_small_file_takes_little_memory(tmp_path):
    """Where the system bounds memory, asking for as much as a file may have would fail."""
    (tmp_path / "a").write_bytes(b"abc")
    tracemalloc.start()
    assert files.read_regular(tmp_path / "a") == b"abc"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """Every case here ends by itself; one that waits is stopped."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def folder(path: Path) -> None:
    path.mkdir()


def itself(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = [pipe, zeros, listening, folder, itself]
READERS: dict[str, Callable[[Path], object]] = {
    "run.yaml": load_config,
    "a.tiktoken": lambda path: load_bpe(str(path)),
    "tokens.bin": lambda path: NanogptTokens(f"nanogpt:{path}", ByteTokenizer(), field="data.train"),
    "text.txt": lambda path: find_files(str(path), field="data.train", report=print),
    "metrics.jsonl": read_metrics,
    "study.json": read_study_records,
    "prompt.txt": lambda path: parse_sample(["RUN", "--prompt_file", str(path)]),
    "step-00000001/manifest.json": lambda path: read_step(path.parent.parent, 1),
    "store/manifest.json": lambda path: TokenStore.open(path.parent),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file(name: str, kind: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    kind(path)
    with pytest.raises((InputError, CheckpointError)) as error:
        READERS[name](path)
    assert str(path.parent) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [pipe, folder])
def test_metrics_that_a_run_is_to_go_on_from(kind: Callable[[Path], None], tmp_path: Path) -> None:
    kind(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"metrics\.jsonl: "):
        JsonLines(tmp_path / "metrics.jsonl", first_step=3)


@pytest.mark.parametrize("name", ["run.yaml", "study.json", "a.tiktoken", "prompt.txt", "step-00000001/manifest.json"])
def test_a_file_that_is_too_large(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises((InputError, CheckpointError), match=r"larger than [\d,]+ bytes"):
        READERS[name](path)


def test_a_configuration_comes_through_a_pipe_of_the_shell(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"trainer: {seed: 7}")
    os.close(writer)
    assert load_config(Path(f"/dev/fd/{reader}")).trainer.seed == 7
    os.close(reader)


@pytest.mark.parametrize("kind", [pipe, folder])
@pytest.mark.parametrize("name", ["zarr.json", "c.0"])
def test_files_of_a_checkpoint(name: str, kind: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path, 1, {"a": np.arange(3.0)}, run_id="r", metadata={}, retention=Retention(1))
    (path,) = tmp_path.rglob(name)
    path.unlink()
    kind(path)
    (line,) = damage(tmp_path, 1)
    assert str(path) in line and ("not a regular file" in line or "Is a directory" in line)
    with pytest.raises(CheckpointError, match="leaf a, "):
        restore(tmp_path, {"a": np.zeros(3)}, report=print)


def test_files_of_a_token_store(config_file: Path) -> None:
    data = load_config(config_file).data
    store = prepare(data, lambda line: None).train
    assert isinstance(store, TokenStore)
    for path in [path for path in store.path.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.unlink()
        pipe(path)
        with pytest.raises(InputError):
            TokenStore.open(store.path).verify()
        path.unlink()
        path.write_bytes(content)
    TokenStore.open(store.path).verify()
