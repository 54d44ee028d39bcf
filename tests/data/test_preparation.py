"""How text becomes a store, and a directory appears when it is complete."""

from __future__ import annotations

import gzip
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from kills import Fork, build_half_and_die
from sophia_levanter.config.data import DataConfig
from sophia_levanter.data import preparation as preparation_module
from sophia_levanter.data.corpora import prepare
from sophia_levanter.data.encoding import EncodedDocuments
from sophia_levanter.data.file_source import FileSource
from sophia_levanter.data.preparation import build_directory
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.errors import InputError
from tiny_runs import TEXTS, json_lines, quiet, sides


@pytest.mark.parametrize(
    ("field", "content"), [("train", b'{"text": "good"}\n{"text": 7}\n'), ("validation", b"not JSON")]
)
def test_bad_input_leaves_nothing_half_done(config: DataConfig, tmp_path: Path, field: str, content: bytes) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=rf"^data\.{field}: .*bad\.jsonl:"):
        prepare(replace(config, **{field: str(tmp_path / "bad.jsonl")}), quiet)
    left = list(Path(config.cache_dir).iterdir())
    assert len(left) == (0 if field == "train" else 1)  # a good training text stays prepared
    for directory in left:
        TokenStore.open(directory / "all")


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"number", b"NUMBER"))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'\n{"text": "one more"}')


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 20)


def replace_by_another(path: Path) -> None:
    """As `rsync --times` does: of the same size and time."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(b"number", b"NUMBER"))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        *((change, "train.jsonl") for change in (rewrite, append, truncate, replace_by_another)),
        *((rewrite, f"train.{suffix}") for suffix in ("jsonl.gz", "parquet", "txt")),
    ],
)
def test_a_file_that_changes_while_it_is_read_makes_no_store(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], name: str
) -> None:
    path = tmp_path / name
    content = Path(config.train).read_bytes()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    path.write_bytes(content)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    documents = FileSource.documents

    def changing(self: FileSource, *start: tuple[int, int]) -> Iterator[tuple[tuple[int, int], str]]:
        for number, item in enumerate(documents(self, *start)):
            if number in (0, 10):
                time.sleep(0.01)  # the system's clock for files is a coarse one
                change(path)
            yield item

    monkeypatch.setattr(FileSource, "documents", changing)
    with pytest.raises(InputError, match=rf"^data\.train: .*{name} changed after it was found; run the command"):
        prepare(replace(config, train=str(path)), quiet)
    assert not list(Path(config.cache_dir).rglob("manifest.json"))
    if change in (rewrite, replace_by_another) and name in ("train.jsonl", "train.txt"):
        monkeypatch.undo()
        train, validation = sides(prepare(replace(config, train=str(path)), quiet))
        assert "".join(train + validation).count("NUMBER") == 60  # nothing is left of what it was


def test_a_file_that_changes_after_it_was_looked_up(config: DataConfig, tmp_path: Path) -> None:
    """The validation text is looked up first and read when the training text is prepared."""
    validation = tmp_path / "validation.jsonl"
    validation.write_bytes(Path(config.train).read_bytes())

    def change(line: str) -> None:
        if line.startswith("data.train: 60 documents"):
            append(validation)

    with pytest.raises(InputError, match=r"^data\.validation: .*validation\.jsonl changed after it was found"):
        prepare(replace(config, validation=str(validation)), change)
    (train,) = (path.parent.parent for path in Path(config.cache_dir).rglob("manifest.json"))
    assert TokenStore.open(train / "all").num_documents == 60


def test_a_file_that_changed_when_it_had_been_read_is_in_the_store_as_it_was(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.part.jsonl").write_bytes(Path(config.train).read_bytes())
    documents = FileSource.documents

    def changing(self: FileSource, *start: tuple[int, int]) -> Iterator[tuple[tuple[int, int], str]]:
        for position, text in documents(self, *start):
            if position == (1, 5):
                rewrite(tmp_path / "a.part.jsonl")
            yield position, text

    monkeypatch.setattr(FileSource, "documents", changing)
    train, validation = sides(prepare(replace(config, train=f"{tmp_path}/*.part.jsonl"), quiet))
    assert sorted(train + validation) == sorted(TEXTS + TEXTS)


def test_a_store_from_which_something_was_deleted_is_prepared_again(config: DataConfig) -> None:
    data = prepare(config, quiet)
    before = sides(data)
    (data.validation.path / "manifest.json").unlink()
    assert sides(prepare(config, quiet)) == before


def test_all_rows_skipped(config: DataConfig) -> None:
    Path(config.train).write_bytes(json_lines([1, 2]))
    with pytest.raises(InputError, match=r"contains no documents with text; skipped rows: 2 without text \(first: "):
        prepare(replace(config, bad_rows="skip"), quiet)
    assert list(Path(config.cache_dir).iterdir()) == []


def test_progress_is_reported(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation_module, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(preparation_module, "BLOCK_CHARACTERS", 400)
    said: list[str] = []
    prepare(config, said.append)
    assert sum("so far" in line for line in said) > 1


def test_documents_are_read_as_they_are_written(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: no more than a block of documents is read before the first is written."""
    ahead = 0
    most = 0

    def reading(self: FileSource, start: tuple[int, int]) -> Iterator[tuple[tuple[int, int], str]]:
        nonlocal ahead, most
        for number, text in enumerate(TEXTS, start=1):
            ahead += 1
            most = max(most, ahead)
            yield (0, number), text

    class Writer(preparation_module.TokenStoreWriter):
        def append(self, documents: EncodedDocuments) -> None:
            nonlocal ahead
            ahead -= len(documents.lengths)
            super().append(documents)

    monkeypatch.setattr(FileSource, "documents", reading)
    monkeypatch.setattr(preparation_module, "TokenStoreWriter", Writer)
    monkeypatch.setattr(preparation_module, "BLOCK_CHARACTERS", 100)
    prepare(config, quiet)
    assert most < 10


def is_complete(directory: Path) -> bool:
    return (directory / "done").exists()


def build(directory: Path) -> None:
    (directory / "done").write_text("built")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def make(target: Path, build=build, report=print) -> None:
    def find() -> Path | None:
        return target if is_complete(target) else None

    def build_target(partial: Path) -> Path:
        build(partial)
        return target

    assert build_directory(target, find=find, build=build_target, report=report) == target


def refuse(directory: Path) -> None:
    raise AssertionError("built once more")


def test_it_appears_at_once_when_it_is_complete(tmp_path: Path) -> None:
    built = []

    def look(directory: Path) -> None:
        assert not (tmp_path / "target").exists()
        build(directory)
        built.append(directory.stat().st_ino)

    make(tmp_path / "target", build=look)
    assert is_complete(tmp_path / "target")
    assert built == [(tmp_path / "target").stat().st_ino]  # renamed, not copied


def test_what_a_killed_process_leaves_is_gone_on_with(tmp_path: Path) -> None:
    # The folder may hold other people's files, whatever they are called.
    (tmp_path / "poetry.partial").mkdir()
    (tmp_path / "poetry.lock").write_text("theirs")
    theirs = names(tmp_path)
    assert Fork(build_half_and_die, tmp_path / "target").end()[0] == -signal.SIGKILL
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
    with pytest.raises(InputError, match=r"^data\.cache_dir: cannot write to .*file"):
        make(tmp_path / "file" / "target")
