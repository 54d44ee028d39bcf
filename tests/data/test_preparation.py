"""What a preparation keeps, and when it begins anew."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from kill_preparing import kill_at_random
from prepared import TEXTS, content, documents, json_lines, parquet, quiet, sides

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data import file_source, store_writer
from sophia_levanter.data import preparation as preparation_module
from sophia_levanter.data.corpora import prepare
from sophia_levanter.data.encoding import EncodedDocuments
from sophia_levanter.data.file_source import FileSource
from sophia_levanter.data.preparation import build_directory
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.data.tokenizer import ByteTokenizer
from sophia_levanter.errors import InputError


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


@pytest.mark.parametrize("change", [rewrite, append, truncate, replace_by_another])
@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.parquet", "train.txt"])
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
    with pytest.raises(InputError, match=rf"^data\.train: .*{name} changed after it was looked up; run the command"):
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

    with pytest.raises(InputError, match=r"^data\.validation: .*validation\.jsonl changed after it was looked up"):
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


KILLED = """
import json, os, signal, sys
from sophia_levanter.data import preparation, store_writer
from sophia_levanter.data.encoding import EncodedDocuments
from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.file_source import FileSource
from sophia_levanter.data.corpora import prepare
documents = FileSource.documents
def killing(self, *args):
    for number, item in enumerate(documents(self, *args)):
        if number == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield item
FileSource.documents = killing
preparation.BLOCK_CHARACTERS = 100
store_writer.SHARD_TOKENS, store_writer.CHUNK_TOKENS = 256, 64
store_writer.SHARD_DOCUMENTS, store_writer.CHUNK_DOCUMENTS = 8, 4
fields = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
prepare(DataConfig(train=sys.argv[1], validation_fraction=0.2, cache_dir=sys.argv[2], **fields), print)
"""


@pytest.mark.parametrize(
    "fields", [{}, {"document_separator": "number"}, {"bad_rows": "skip"}, {"document_separator": "document"}], ids=str
)
def test_a_killed_preparation_goes_on_to_the_same_store(config: DataConfig, tmp_path: Path, fields: dict) -> None:
    path = Path(config.train)
    if fields == {"document_separator": "document"}:  # a text file is read piece by piece
        path = tmp_path / "train.txt"
        path.write_text("".join(TEXTS))
    elif fields:
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:10], '{"text": null}', '{"text": ""}', *lines[10:], "{}"]))
    fields |= {} if "document_separator" not in fields else {"bad_rows": "skip"}

    def run(cache_dir: Path, kill_after: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", KILLED, str(path), str(cache_dir), str(kill_after), json.dumps(fields)]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    assert run(tmp_path / "whole", 1000).returncode == 0
    said = []
    for kill_after in (5, 30, 20):
        killed = run(tmp_path / "killed", kill_after)
        assert killed.returncode == -9
        said.append(killed.stdout)
    assert "going on" not in said[0]
    assert "going on" in said[2]  # after the documents that the second left
    assert run(tmp_path / "killed", 1000).returncode == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flag", "empty"])
def test_a_damaged_note_of_progress_is_begun_anew(config: DataConfig, tmp_path: Path, damage: str) -> None:
    command = [sys.executable, "-c", KILLED, config.train, config.cache_dir, "40"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -9
    (note,) = Path(config.cache_dir).glob("*.partial/progress.npz")
    content = bytearray(note.read_bytes()[: -30 if damage == "cut" else None])
    if damage == "flag":
        content[content.index(b"PK\x01\x02") + 8] |= 1  # says that it is encrypted
    note.write_bytes(content if damage != "empty" else b"")
    said: list[str] = []
    train, validation = sides(prepare(config, said.append))
    assert sorted(train + validation) == sorted(TEXTS)
    assert "preparing" in said[0]


def test_a_full_disk_is_gone_on_from(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation_module, "BLOCK_CHARACTERS", 100)
    monkeypatch.setattr(store_writer, "SHARD_TOKENS", 256)
    monkeypatch.setattr(store_writer, "CHUNK_TOKENS", 64)
    flush, calls = store_writer.ArrayWriter.flush, []

    def full(self: store_writer.ArrayWriter) -> None:
        calls.append(self)
        if len(calls) > 4:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
        flush(self)

    with monkeypatch.context() as patch:
        patch.setattr(store_writer.ArrayWriter, "flush", full)
        with pytest.raises(InputError, match=r"^data\.cache_dir: .*No space left.*make room.*goes on"):
            prepare(config, quiet)
    said: list[str] = []
    train, validation = sides(prepare(config, said.append))
    assert sorted(train + validation) == sorted(TEXTS)
    assert "going on" in said[0]
    assert len(list(Path(config.cache_dir).iterdir())) == 1


def stopped(config: DataConfig) -> tuple[str, list[str]]:
    """The error of a preparation, and what it says."""
    said: list[str] = []
    with pytest.raises(InputError) as info:
        prepare(config, said.append)
    return str(info.value), said


BAD = [*TEXTS[:40], None, *TEXTS[40:]]


LONG = [random.Random(number).randbytes(1000).hex() for number in range(60)]  # so that not all is in one buffer


@pytest.mark.parametrize(
    ("name", "bad", "corrected"),
    [
        ("a.jsonl", json_lines(BAD), json_lines(TEXTS)),
        ("a.jsonl", json_lines(BAD), b"\n\n" + json_lines(TEXTS)),  # lines have other numbers
        ("a.jsonl", json_lines(BAD), json_lines([*TEXTS[:40], "put in", *TEXTS[40:]])),
        ("a.jsonl", json_lines(TEXTS)[:-20], json_lines(TEXTS)),
        ("a.json", json.dumps([{"text": text} for text in BAD]).encode(), json_lines(TEXTS)),
        ("a.parquet", parquet(BAD), parquet(TEXTS)),
        ("a.jsonl.gz", gzip.compress(json_lines(LONG))[:-60], gzip.compress(json_lines(LONG))),
        ("a.txt.gz", gzip.compress("----".join(LONG).encode())[:-60], gzip.compress("----".join(LONG).encode(), 1)),
    ],
)
@pytest.mark.parametrize("held_out", [True, False])
def test_a_corrected_file_goes_on_where_it_stopped(
    config: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    bad: bytes,
    corrected: bytes,
    held_out: bool,
) -> None:
    monkeypatch.setattr(file_source, "PIECE_BYTES", 1000)
    (tmp_path / "other.txt").write_text("other")
    separator = "----" if ".txt" in name else None
    config = replace(config, train=str(tmp_path / name), document_separator=separator)
    config = config if held_out else replace(config, validation=str(tmp_path / "other.txt"))
    (tmp_path / name).write_bytes(bad)
    error, said = stopped(config)
    assert error.startswith(f"data.train: {tmp_path / name}")
    assert "kept" in said[-1]
    assert len(list(Path(config.cache_dir).iterdir())) == 1
    (tmp_path / name).write_bytes(corrected)
    again: list[str] = []
    data = prepare(config, again.append)
    kept = said[-1].split("kept ")[1].split(";")[0]
    assert again[0] == f"data.train: going on with {tmp_path / name} after {kept}"
    anew = prepare(replace(config, cache_dir=config.cache_dir + "2"), quiet)
    assert content(data.train.path) == content(anew.train.path)
    assert content(data.validation.path) == content(anew.validation.path)


def test_what_changed_where_it_was_read_is_prepared_anew(config: DataConfig, tmp_path: Path) -> None:
    Path(config.train).write_bytes(json_lines(BAD))
    stopped(config)
    Path(config.train).write_bytes(json_lines(["CHANGED", *TEXTS[1:]]))
    said: list[str] = []
    train, validation = sides(prepare(config, said.append))
    assert sorted(train + validation) == sorted(["CHANGED", *TEXTS[1:]])
    assert "changed in the part that was already prepared; preparing it again from the start" in said[0]


@pytest.mark.parametrize(("changed", "goes_on"), [("a", False), ("b", True), ("c", True), ("d", True)])
def test_other_files_than_the_bad_one_may_change(
    config: DataConfig, tmp_path: Path, changed: str, goes_on: bool
) -> None:
    config = replace(config, train=str(tmp_path / "?.jsonl"))
    for name, texts in (("a", TEXTS[:20]), ("b", [*TEXTS[20:40], None]), ("c", TEXTS[40:])):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(texts))
    stopped(config)
    (tmp_path / "b.jsonl").write_bytes(json_lines(TEXTS[20:40]))
    (tmp_path / f"{changed}.jsonl").write_bytes(json_lines([*TEXTS[20:40], "changed"]))
    said: list[str] = []
    data = prepare(config, said.append)
    assert any("going on" in line for line in said) == goes_on
    anew = prepare(replace(config, cache_dir=config.cache_dir + "2"), quiet)
    assert content(data.train.path.parent) == content(anew.train.path.parent)


def test_a_store_that_shrinks_ends_where_its_text_does(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard was written after what is gone on from, and nothing comes in its place."""
    monkeypatch.setattr(store_writer, "SHARD_TOKENS", 64)
    monkeypatch.setattr(store_writer, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(preparation_module, "BLOCK_CHARACTERS", 63)
    config = replace(config, validation=config.train)
    texts = [f"{number:063}" for number in range(9)]
    Path(config.train).write_bytes(json_lines(texts))
    with monkeypatch.context() as patch:
        save, calls = preparation_module.save_progress, []

        def failing(*arguments: object) -> None:
            calls.append(arguments)
            if len(calls) > 5:
                raise RuntimeError("killed")
            save(*arguments)

        patch.setattr(preparation_module, "save_progress", failing)
        with pytest.raises(RuntimeError):
            prepare(config, quiet)
    Path(config.train).write_bytes(json_lines(texts[:5]))
    data = prepare(config, quiet)
    assert documents(data.train, data.tokenizer) == texts[:5]


def test_skipped_rows_are_another_store_and_counted(config: DataConfig) -> None:
    skip = replace(config, bad_rows="skip")
    assert prepare(skip, quiet).train.path == prepare(config, quiet).train.path  # nothing was skipped
    Path(config.train).write_bytes(json_lines(BAD))
    error, _ = stopped(config)
    assert error.endswith(
        f"{config.train}:41: the field 'text' is not a string but null; correct the file, or set data.bad_rows to skip"
    )
    said: list[str] = []
    data = prepare(skip, said.append)
    assert "going on" in said[0]
    train, validation = sides(data)
    assert sorted(train + validation) == sorted(TEXTS)
    note = f"data.train: rows left out: 1 without text, first {config.train}:41: the field 'text' is not a string"
    assert said[-1].startswith(note)
    again: list[str] = []
    assert prepare(skip, again.append).train.path == data.train.path
    assert "already" in again[0]
    assert again[1:] == said[-1:]
    assert stopped(config)[0] == error  # what was skipped is never taken where it is an error


NULLS = [*TEXTS[20:30], None, None, *TEXTS[30:40]]


BROKEN = b'\n{"text": "\xff"}\n'


@pytest.mark.parametrize(
    ("first", "corrected", "left_out"),
    [
        (TEXTS[:20], TEXTS[20:40], ""),
        (TEXTS[:20], [*TEXTS[20:30], None, *TEXTS[30:40]], "1 without text, first {0}/b.jsonl:11: "),
        (TEXTS[:20], NULLS, "2 without text, first {0}/b.jsonl:11: "),
        ([*TEXTS[:20], None], TEXTS[20:40], "1 without text, first {0}/a.jsonl:21: "),
        ([None, *TEXTS[:20], ""], ["", *TEXTS[20:40]], "1 without text, first {0}/a.jsonl:1: .*; 2 empty, first "),
    ],
)
def test_rows_of_a_corrected_file_are_counted_again(
    config: DataConfig, tmp_path: Path, first: list, corrected: list, left_out: str
) -> None:
    config = replace(config, train=str(tmp_path / "?.jsonl"), bad_rows="skip")
    (tmp_path / "a.jsonl").write_bytes(json_lines(first))
    (tmp_path / "b.jsonl").write_bytes(json_lines(NULLS) + BROKEN)
    error, said = stopped(config)
    assert "is not UTF-8" in error
    (tmp_path / "b.jsonl").write_bytes(json_lines(corrected))
    said.clear()
    data = prepare(config, said.append)
    assert "going on" in said[0]
    notes = [line for line in said if "rows left out" in line]
    assert len(notes) == bool(left_out)
    assert re.match("data.train: rows left out: " + left_out.format(tmp_path), "".join(notes)) or not left_out
    anew = prepare(replace(config, cache_dir=config.cache_dir + "2"), quiet)
    assert data.train.path.parent.name == anew.train.path.parent.name
    assert content(data.train.path.parent) == content(anew.train.path.parent)


def test_what_was_begun_with_rows_skipped_is_an_error_again(config: DataConfig) -> None:
    Path(config.train).write_bytes(json_lines(BAD) + b"\n" + gzip.compress(b"not UTF-8"))
    error, said = stopped(replace(config, bad_rows="skip"))
    assert "is not UTF-8" in error
    assert "kept 60 documents" in said[-1]
    error, said = stopped(config)
    assert ":41: the field" in error
    assert "going on" not in said[0]


@pytest.mark.parametrize("changed", [False, True])
def test_what_was_finished_but_not_named_is_kept_if_it_is_of_this_text(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    def killed(*arguments: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(RuntimeError):
            prepare(config, quiet)
    if changed:
        Path(config.train).write_bytes(json_lines(["CHANGED", *TEXTS]))
        train, validation = sides(prepare(config, quiet))
        assert "CHANGED" in train + validation
    else:
        monkeypatch.setattr(FileSource, "documents", None)
        assert prepare(config, quiet).train.num_documents > 40
    assert len(list(Path(config.cache_dir).iterdir())) == 1


def test_all_rows_skipped(config: DataConfig) -> None:
    Path(config.train).write_bytes(json_lines([1, 2]))
    error, _ = stopped(replace(config, bad_rows="skip"))
    assert "contains no documents with text; rows left out: 2 without text, first" in error
    assert list(Path(config.cache_dir).iterdir()) == []


def test_two_processes_at_once(config: DataConfig) -> None:
    program = """
import sys
import time
from sophia_levanter.data.encoding import EncodedDocuments
from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.corpora import prepare
data = prepare(DataConfig(train=sys.argv[1], validation_fraction=0.2, cache_dir=sys.argv[2]), lambda line: None)
print(data.train.num_documents + data.validation.num_documents)
"""
    command = [sys.executable, "-c", program, config.train, config.cache_dir]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == [b"60\n", b"60\n"]
    assert len(list(Path(config.cache_dir).iterdir())) == 1


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


def test_what_processes_made_before_an_error_is_kept(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "is_slow", True)
    monkeypatch.setattr(preparation_module, "BLOCK_CHARACTERS", 100)
    config = replace(config, num_workers=2)
    Path(config.train).write_bytes(json_lines(BAD))
    _, said = stopped(config)
    assert "kept 40 documents" in said[-1]
    Path(config.train).write_bytes(json_lines(TEXTS))
    train, validation = sides(prepare(config, quiet))
    assert sorted(train + validation) == sorted(TEXTS)


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


@pytest.mark.timeout(300)
def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    assert len(kill_at_random("python_stdlib", "bytes", 3, tmp_path, seed=0)) == 3
