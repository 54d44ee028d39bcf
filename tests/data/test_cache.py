from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sophia_levanter.data.preparation import build_directory
from sophia_levanter.data.token_store import remembered
from sophia_levanter.errors import InputError


def is_complete(directory: Path) -> bool:
    return (directory / "done").exists()


def build(directory: Path) -> None:
    (directory / "done").write_text("built")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def make(target: Path, build=build, report=print, **options) -> None:
    def find() -> Path | None:
        return target if is_complete(target) else None

    def build_target(partial: Path) -> Path:
        build(partial)
        return target

    assert build_directory(target, find=find, build=build_target, report=report, **options) == target


def refuse(directory: Path) -> None:
    raise AssertionError("built once more")


def test_it_is_built_once(tmp_path: Path) -> None:
    make(tmp_path / "new" / "target")
    assert names(tmp_path / "new") == ["target"]
    make(tmp_path / "new" / "target", build=refuse)


def test_it_appears_at_once_when_it_is_complete(tmp_path: Path) -> None:
    built = []

    def look(directory: Path) -> None:
        assert not (tmp_path / "target").exists()
        build(directory)
        built.append(directory.stat().st_ino)

    make(tmp_path / "target", build=look)
    assert is_complete(tmp_path / "target")
    assert built == [(tmp_path / "target").stat().st_ino]  # renamed, not copied


def half(directory: Path) -> None:
    (directory / "half").write_text("")
    raise InputError("no")


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no"):
        make(tmp_path / "target", build=half)
    assert names(tmp_path) == []


def test_what_can_be_gone_on_with_is_left_for_the_next(tmp_path: Path) -> None:
    def go_on(directory: Path) -> None:
        assert names(directory) == ["half"]
        build(directory)

    with pytest.raises(InputError):
        make(tmp_path / "a", build=half, is_resumable=lambda directory: (directory / "half").exists())
    make(tmp_path / "a", build=go_on)
    assert names(tmp_path) == ["a"]


def test_an_incomplete_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "rest").write_text("")
    make(tmp_path / "target")
    assert names(tmp_path / "target") == ["done"]


def test_the_build_names_the_directory(tmp_path: Path) -> None:
    def build_other(partial: Path) -> Path:
        build(partial)
        return tmp_path / "other"

    assert build_directory(tmp_path / "base", find=lambda: None, build=build_other, report=print) == tmp_path / "other"
    assert names(tmp_path) == ["other"]


def test_what_a_killed_process_leaves_is_gone_on_with(tmp_path: Path) -> None:
    # The folder may hold other people's files, whatever they are called.
    (tmp_path / "poetry.partial").mkdir()
    (tmp_path / "poetry.lock").write_text("theirs")
    theirs = names(tmp_path)
    program = f"""
import os, signal
from pathlib import Path
from sophia_levanter.data.preparation import build_directory
def build(directory):
    (directory / "half").write_text("killed")
    os.kill(os.getpid(), signal.SIGKILL)
target = Path({str(tmp_path / "target")!r})
build_directory(target, find=lambda: None, build=build, report=print)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert "target" not in names(tmp_path)

    def go_on(directory: Path) -> None:
        assert (directory / "half").read_text() == "killed"
        build(directory)

    make(tmp_path / "other")
    make(tmp_path / "target", build=go_on)
    assert names(tmp_path) == sorted([*theirs, "other", "target"])
    assert is_complete(tmp_path / "target")


def test_a_second_builder_waits_for_the_first_and_leaves_its_work_alone(tmp_path: Path) -> None:
    second_waits = threading.Event()
    first_builds = threading.Event()
    failures = []

    def slow(directory: Path) -> None:
        first_builds.set()
        if not second_waits.wait(timeout=20):
            failures.append("the second did not wait")
        build(directory)

    first = threading.Thread(target=make, args=(tmp_path / "target", slow))
    first.start()
    assert first_builds.wait(timeout=20)
    make(tmp_path / "other")  # another target neither waits nor takes the first one's directory for a leftover

    def report(line: str) -> None:
        assert "waiting" in line
        second_waits.set()

    make(tmp_path / "target", build=refuse, report=report)
    first.join()
    assert not failures
    assert names(tmp_path) == ["other", "target"]


def test_a_second_builder_takes_over_when_the_first_fails(tmp_path: Path) -> None:
    second_waits = threading.Event()
    first_builds = threading.Event()

    def fail(directory: Path) -> None:
        first_builds.set()
        second_waits.wait(timeout=20)
        time.sleep(0.2)  # so that the second does wait
        raise InputError("first")

    def first_make() -> None:
        with pytest.raises(InputError, match="first"):
            make(tmp_path / "target", build=fail)

    first = threading.Thread(target=first_make)
    first.start()
    assert first_builds.wait(timeout=20)
    make(tmp_path / "target", report=lambda line: second_waits.set())
    first.join()
    assert names(tmp_path) == ["target"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^data\.cache_dir: cannot write in .*file"):
        make(tmp_path / "file" / "target")


def test_results_of_reading_much_are_kept(tmp_path: Path) -> None:
    computed: list[int] = []

    def compute() -> dict[str, int]:
        computed.append(1)
        return {"number": len(computed)}

    assert [remembered(tmp_path / "new", ["a", 1], compute) for _ in range(2)] == [{"number": 1}] * 2
    assert remembered(tmp_path / "new", ["a", 2], compute) == {"number": 2}
    for path in (tmp_path / "new").rglob("*"):
        if path.is_file():
            path.write_text("{half")
    assert remembered(tmp_path / "new", ["a", 1], compute) == {"number": 3}
    (tmp_path / "file").touch()
    for number, place in enumerate([None, tmp_path / "file", None, tmp_path / "file"], start=4):
        assert remembered(place, ["a", 1], compute) == {"number": number}
