"""What a preparation that was killed, or ended with an error, goes on from, and when it begins anew."""

from __future__ import annotations

import gzip
import json
import random
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from kills import Fork, kill_at_random, prepare_and_die
from sophia_levanter.config.data import DataConfig
from sophia_levanter.data import file_source, store_writer
from sophia_levanter.data import preparation as preparation_module
from sophia_levanter.data.corpora import prepare
from sophia_levanter.data.file_source import FileSource
from sophia_levanter.data.tokenizer import ByteTokenizer
from sophia_levanter.errors import InputError
from tiny_runs import TEXTS, content, documents, json_lines, parquet, quiet, sides

BAD = [*TEXTS[:40], None, *TEXTS[40:]]
NULLS = [*TEXTS[20:30], None, None, *TEXTS[30:40]]
BROKEN = b'\n{"text": "\xff"}\n'
LONG = [random.Random(number).randbytes(1000).hex() for number in range(60)]  # so that not all is in one buffer
JOINED = "----".join(LONG).encode()


def stopped(config: DataConfig) -> tuple[str, list[str]]:
    """The error of a preparation, and what it says."""
    said: list[str] = []
    with pytest.raises(InputError) as info:
        prepare(config, said.append)
    return str(info.value), said


@pytest.mark.parametrize("fields", [{}, {"document_separator": "number"}, {"document_separator": "document"}], ids=str)
def test_a_killed_preparation_goes_on_to_the_same_store(config: DataConfig, tmp_path: Path, fields: dict) -> None:
    path = Path(config.train)
    if fields == {"document_separator": "document"}:  # a text file is read piece by piece
        path = tmp_path / "train.txt"
        path.write_text("".join(TEXTS))
    elif fields:
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:10], '{"text": null}', '{"text": ""}', *lines[10:], "{}"]))
    fields |= {} if "document_separator" not in fields else {"bad_rows": "skip"}

    def run(cache_dir: str, kill_after: int) -> tuple[int | None, str]:
        status, said = Fork(prepare_and_die, str(path), str(tmp_path / cache_dir), fields, kill_after).end()
        return status, "".join(said)

    assert run("whole", 1000)[0] == 0
    (first, begun), (second, _), (third, gone_on) = (run("killed", kill_after) for kill_after in (5, 30, 20))
    assert first == second == third == -signal.SIGKILL
    assert "resuming" not in begun
    assert "resuming" in gone_on  # after the documents that the second left
    assert run("killed", 1000)[0] == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_damaged_note_of_progress_is_begun_anew(config: DataConfig) -> None:
    assert Fork(prepare_and_die, config.train, config.cache_dir, {}, 40).end()[0] == -signal.SIGKILL
    (note,) = Path(config.cache_dir).glob("*.partial/progress.npz")
    content = bytearray(note.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # says that it is encrypted
    note.write_bytes(content)
    said: list[str] = []
    train, validation = sides(prepare(config, said.append))
    assert sorted(train + validation) == sorted(TEXTS)
    assert "preparing" in said[0]


@pytest.mark.timeout(300)
def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_bytes(json_lines([f"{text} {number} " * 100 for number in range(50) for text in TEXTS]))
    assert len(kill_at_random(str(text), "bytes", 3, tmp_path, seed=0)) == 3


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
        with pytest.raises(
            InputError, match=r"^data\.cache_dir: .*No space left.*free some space and run the same command again"
        ):
            prepare(config, quiet)
    said: list[str] = []
    train, validation = sides(prepare(config, said.append))
    assert sorted(train + validation) == sorted(TEXTS)
    assert "resuming" in said[0]
    assert len(list(Path(config.cache_dir).iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "bad", "corrected", "held_out"),
    [
        ("a.jsonl", json_lines(BAD), json_lines(TEXTS), True),
        ("a.jsonl", json_lines(BAD), b"\n\n" + json_lines(TEXTS), True),  # lines have other numbers
        ("a.jsonl", json_lines(BAD), json_lines([*TEXTS[:40], "put in", *TEXTS[40:]]), False),
        ("a.json", json.dumps([{"text": text} for text in BAD]).encode(), json_lines(TEXTS), True),
        ("a.parquet", parquet(BAD), parquet(TEXTS), True),
        ("a.jsonl.gz", gzip.compress(json_lines(LONG))[:-60], gzip.compress(json_lines(LONG)), True),
        ("a.txt.gz", gzip.compress(JOINED)[:-60], gzip.compress(JOINED, 1), False),
    ],
)
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
    assert len(list(Path(config.cache_dir).iterdir())) == 1
    (tmp_path / name).write_bytes(corrected)
    again: list[str] = []
    data = prepare(config, again.append)
    saved = said[-1].split("saved ")[1].split(";")[0]
    assert again[0] == f"data.train: resuming {tmp_path / name} after {saved}"
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


def test_a_record_that_gained_a_document_is_prepared_anew(config: DataConfig) -> None:
    config = replace(config, document_separator="----")
    Path(config.train).write_bytes(json_lines(BAD))
    stopped(config)
    Path(config.train).write_bytes(json_lines([*TEXTS[:39], f"{TEXTS[39]}----{TEXTS[40]}"]))
    train, validation = sides(prepare(config, quiet))
    assert sorted(train + validation) == sorted(TEXTS[:41])


@pytest.mark.parametrize(("changed", "goes_on"), [("a", False), ("c", True)])
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
    assert any("resuming" in line for line in said) == goes_on
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
        f"{config.train}:41: the field 'text' is null, not a string; correct the file, or set data.bad_rows to skip"
    )
    said: list[str] = []
    data = prepare(skip, said.append)
    assert "resuming" in said[0]
    train, validation = sides(data)
    assert sorted(train + validation) == sorted(TEXTS)
    note = f"data.train: skipped rows: 1 without text (first: {config.train}:41: the field 'text' is null, not a string"
    assert said[-1].startswith(note)
    again: list[str] = []
    assert prepare(skip, again.append).train.path == data.train.path
    assert "already" in again[0]
    assert again[1:] == said[-1:]
    assert stopped(config)[0] == error  # what was skipped is never taken where it is an error


@pytest.mark.parametrize(
    ("first", "corrected", "left_out"),
    [
        (TEXTS[:20], TEXTS[20:40], ""),
        (TEXTS[:20], [*TEXTS[20:30], None, *TEXTS[30:40]], r"1 without text \(first: {0}/b.jsonl:11: "),
        ([*TEXTS[:20], None], TEXTS[20:40], r"1 without text \(first: {0}/a.jsonl:21: "),
        ([None, *TEXTS[:20], ""], ["", *TEXTS[20:40]], r"1 without text \(first: {0}/a.jsonl:1: .*; 2 empty \(first: "),
    ],
)
def test_rows_of_a_corrected_file_are_counted_again(
    config: DataConfig, tmp_path: Path, first: list, corrected: list, left_out: str
) -> None:
    config = replace(config, train=str(tmp_path / "?.jsonl"), bad_rows="skip")
    (tmp_path / "a.jsonl").write_bytes(json_lines(first))
    (tmp_path / "b.jsonl").write_bytes(json_lines(NULLS) + BROKEN)
    error, said = stopped(config)
    assert "is not valid UTF-8" in error
    (tmp_path / "b.jsonl").write_bytes(json_lines(corrected))
    said.clear()
    data = prepare(config, said.append)
    assert "resuming" in said[0]
    notes = [line for line in said if "skipped rows" in line]
    assert len(notes) == bool(left_out)
    assert re.match("data.train: skipped rows: " + left_out.format(tmp_path), "".join(notes)) or not left_out
    anew = prepare(replace(config, cache_dir=config.cache_dir + "2"), quiet)
    assert data.train.path.parent.name == anew.train.path.parent.name
    assert content(data.train.path.parent) == content(anew.train.path.parent)


def test_what_was_begun_with_rows_skipped_is_an_error_again(config: DataConfig) -> None:
    Path(config.train).write_bytes(json_lines(BAD) + b"\n" + gzip.compress(b"not UTF-8"))
    error, said = stopped(replace(config, bad_rows="skip"))
    assert "is not valid UTF-8" in error
    assert "saved 60 documents" in said[-1]
    error, said = stopped(config)
    assert ":41: the field" in error
    assert "resuming" not in said[0]


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


def test_what_processes_made_before_an_error_is_kept(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "is_slow", True)
    monkeypatch.setattr(preparation_module, "BLOCK_CHARACTERS", 100)
    config = replace(config, num_workers=2)
    Path(config.train).write_bytes(json_lines(BAD))
    _, said = stopped(config)
    assert "saved 40 documents" in said[-1]
    Path(config.train).write_bytes(json_lines(TEXTS))
    train, validation = sides(prepare(config, quiet))
    assert sorted(train + validation) == sorted(TEXTS)
