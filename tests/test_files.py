"""Files that are written whole or not at all."""

import os
import tracemalloc

import pytest

from sophia_levanter import files


def test_a_full_disk_leaves_nothing_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_atomically(path, b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.txt"):
        files.write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["a.txt"] and path.read_bytes() == b"old"


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
