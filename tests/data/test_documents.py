from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from reading import json_lines, parquet, source_of

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data import file_source
from sophia_levanter.data.documents import Rows, Split
from sophia_levanter.data.sources import source_named
from sophia_levanter.errors import InputError

END = "<|endoftext|>"


def read(name: str | Path, **fields: str) -> tuple[list[str], list[str]]:
    """The documents of a source, and what is said about its text."""
    rows = Rows(DataConfig(**fields), "data.train", [END, "<|pad|>", "", "<s>"])
    source = source_named(str(name), "data.train").open(rows, print)
    texts = [text for _, text in source.documents()]
    notes = [source.rows.left_out] if source.rows.left_out else []
    notes += source.rows.warnings()
    assert not any("\n" in note for note in notes)
    return texts, notes


GOOD = {"text": "one"}
BAD_ROWS = [
    ("a.jsonl", json_lines(GOOD, {"text": None}, GOOD), "a.jsonl:2: the field 'text' is null, not a string"),
    (
        "a.jsonl",
        json_lines(GOOD, {"body": "2"}, GOOD),
        "a.jsonl:2 has no field 'text'; possible values for data.text_field: 'body'",
    ),
    ("a.jsonl", json_lines(GOOD, {"text": 7}, GOOD), "a.jsonl:2: the field 'text' is a number, not a string"),
    ("a.jsonl", json_lines(GOOD, {"text": True}, GOOD), "the field 'text' is a boolean, not a string"),
    ("a.jsonl", json_lines(GOOD, {"text": {"a": 1}}, GOOD), "the field 'text' is an object, not a string"),
    (
        "a.jsonl",
        json_lines(GOOD) + b"\nnot JSON\n" + json_lines(GOOD),
        "a.jsonl:3 is not valid JSON (expected one object per line)",
    ),
    ("a.jsonl.gz", gzip.compress(json_lines(GOOD, {}, GOOD)), "a.jsonl.gz:2 has no field 'text'"),
    ("a.json", json_lines(["text"], GOOD, GOOD), "a.json:1 is a list, not a JSON object"),
    ("a.jsonl", json_lines([], GOOD, GOOD), "a.jsonl:1 is a list, not a JSON object"),
    ("a.txt", json_lines(GOOD, GOOD, GOOD, GOOD, GOOD, 3), "a.txt:6 is a number, not a JSON object"),
    ("a.json", json.dumps([GOOD, 12.5, GOOD]).encode(), "a.json, record 2 is a number, not a JSON object"),
    ("a.json", json.dumps([None, GOOD, GOOD]).encode(), "a.json, record 1 is null, not a JSON object"),
    ("a.json", json.dumps([GOOD, ["a"], GOOD], indent=1).encode(), "a.json, record 2 is a list, not a JSON object"),
    ("a.parquet", parquet({"text": ["one", None, "one"]}), "a.parquet, row 2: the field 'text' is null, not a string"),
]


@pytest.mark.parametrize(("name", "content", "problem"), BAD_ROWS)
def test_rows_without_text_are_errors_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, problem: str
) -> None:
    monkeypatch.setattr(file_source, "PIECE_BYTES", 1)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as info:
        read(tmp_path / name)
    assert str(info.value).startswith(f"data.train: {tmp_path}/")
    assert problem in str(info.value)
    assert str(info.value).endswith("; correct the file, or set data.bad_rows to skip")
    texts, (note,) = read(tmp_path / name, bad_rows="skip")
    assert texts == ["one"] * (5 if name == "a.txt" else 2)
    assert note.startswith(f"skipped rows: 1 without text (first: {tmp_path}/")
    assert problem in note


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"text": [b"1", b"2"]}, "row 1: the field 'text' is a value of type bytes, not a string"),
        ({"body": ["1", "2"]}, "row 1 has no field 'text'; possible values for data.text_field: 'body'"),
    ],
)
def test_a_parquet_column_that_is_no_text(tmp_path: Path, columns: dict[str, list], problem: str) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(columns))
    with pytest.raises(InputError, match=problem):
        read(tmp_path / "a.parquet")
    texts, notes = read(tmp_path / "a.parquet", bad_rows="skip")
    assert texts == []
    assert f"skipped rows: 2 without text (first: {tmp_path}/a.parquet, {problem}" in notes[0]


def test_rows_of_a_dataset(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["one", None, "", "two"]}).save_to_disk(tmp_path / "d")
    with pytest.raises(InputError, match="row 2: the field 'text' is null, not a string; correct"):
        read(f"datasets:{tmp_path}/d")
    texts, notes = read(f"datasets:{tmp_path}/d", bad_rows="skip")
    assert texts == ["one", "two"]
    assert f"1 without text (first: datasets:{tmp_path}/d, row 2: the field" in notes[0]
    assert f"1 empty (first: datasets:{tmp_path}/d, row 3" in notes[0]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl.gz", gzip.compress(json_lines(GOOD, GOOD, GOOD), mtime=0)[:-9], "truncated or damaged"),
        ("a.json", b'[{"text": "1"}, {"text": }, {"text": "3"}]', "record 2, is not valid JSON"),
        ("a.json", b'[{"text": "1"}, {"text": "2"}', "record 3, is neither a JSON object nor the end"),
        ("a.parquet", parquet({"text": ["1"]})[:-9], "truncated, damaged or not"),
        ("a.jsonl", b'{"text": "\xe9"}\n', "is not valid UTF-8"),
    ],
)
def test_damaged_files_are_errors_also_where_rows_are_skipped(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for bad_rows in ("error", "skip"):
        with pytest.raises(InputError, match=problem):
            read(tmp_path / name, bad_rows=bad_rows)


def test_empty_text_is_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(GOOD, {"text": ""}) + b"\n" + json_lines({"text": " \n"}, GOOD))
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"two")
    for bad_rows in ("error", "skip"):
        texts, notes = read(tmp_path / "*", bad_rows=bad_rows)
        assert texts == ["one", "one", "two"]
        assert notes == [f"skipped rows: 3 empty (first: {tmp_path}/a.jsonl:2)"]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.txt", f"one{END}two{END}three".encode(), "/a.txt; "),
        ("a.parquet", parquet({"text": ["one", f"two{END}{END}"]}), "/a.parquet, row 2; "),
    ],
)
def test_special_tokens_in_the_text_are_counted_in_one_warning(
    tmp_path: Path, name: str, content: bytes, where: str
) -> None:
    (tmp_path / name).write_bytes(content)
    _, (note,) = read(tmp_path / name)
    assert note.startswith("WARNING: data.train: the text contains special tokens: ")
    assert f": {END} (2 times); the first is in " in note
    assert f"{where}they are encoded as ordinary text" in note
    assert f"set data.document_separator to '{END}'" in note
    texts, notes = read(tmp_path / name, document_separator=END)
    assert notes == []
    assert not any(END in text for text in texts)


def test_every_special_token_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "<s>a<|pad|><|pad|>"}, {"text": f"<|pad|>{END}b{END}c<s>"}))
    _, (note,) = read(tmp_path / "a.jsonl")
    assert f": <s> (2 times), <|pad|> (3 times), {END} (2 times); the first is in {tmp_path}/a.jsonl:1;" in note
    assert "set data.document_separator to '<|pad|>'" in note
    texts, (note,) = read(tmp_path / "a.jsonl", document_separator=END)
    assert texts == ["<s>a<|pad|><|pad|>", "<|pad|>", "b", "c<s>"]
    assert ": <s> (2 times), <|pad|> (3 times); the first is in " in note
    assert "; they are encoded as ordinary text; remove them from the text" in note


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("separator", [END, "aa", "é", "----\r\n"])
def test_a_text_file_is_split_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, piece_bytes: int
) -> None:
    monkeypatch.setattr(file_source, "PIECE_BYTES", piece_bytes)
    text = f"one é\n{END}\n\n\n{END}two aaa bababa éé€ \n----\r\nthree{END}aaaab\n\n\n\nfour ababa{END}\n"
    (tmp_path / "a.txt").write_bytes(f"\ufeff{text}".encode())
    expected = [piece for piece in text.split(separator) if piece.strip()]
    assert len(expected) > 1
    assert read(tmp_path / "a.txt", document_separator=separator)[0] == expected
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    config = DataConfig(document_separator=separator)
    source = source_of(tmp_path / "*", config)
    everything = list(source.documents())
    assert [text for _, text in everything] == expected
    assert source.rows.tally.num_separators == text.count(separator)
    for number, (position, _) in enumerate(everything):
        rest = source_of(tmp_path / "*", config)
        assert list(rest.documents(position)) == everything[number + 1 :]


def test_records_are_split_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": f"one{END}two"}, {"text": f"{END} {END}three"}))
    (tmp_path / "b.parquet").write_bytes(parquet({"text": [f"four{END}five", "six"]}))
    (tmp_path / "c.json").write_text(json.dumps([{"text": f"seven{END}eight{END}"}]))
    Dataset.from_dict({"text": [f"one{END}two", END]}).save_to_disk(tmp_path / "d")
    texts, notes = read(tmp_path / "*.*", document_separator=END)
    assert texts == ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    assert notes == []
    assert read(f"datasets:{tmp_path}/d", document_separator=END) == (["one", "two"], [])


def test_a_separated_text_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_source, "PIECE_BYTES", 1000)
    (tmp_path / "a.txt").write_text(f"{'x' * 90}{END}" * 1000)
    source = source_of(tmp_path / "a.txt", DataConfig(document_separator=END))
    documents = source.documents()
    next(documents)
    assert source.share_read() < 0.2  # the rest of the file is in no memory yet


@pytest.mark.parametrize(("name", "content"), [("a.txt", b"no separator"), ("a.jsonl", json_lines(GOOD, GOOD))])
def test_a_separator_that_occurs_nowhere_is_a_warning(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    _, (note,) = read(tmp_path / name, document_separator="<|END|>")
    assert note.startswith("WARNING: data.train: data.document_separator '<|END|>' does not occur in the text")
    (tmp_path / "b.txt").write_text(f"one{END}two")
    _, notes = read(tmp_path / "*", document_separator="<|END|>")
    assert len(notes) == 2
    assert f"set data.document_separator to '{END}'" in notes[1]


def split(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    sides: tuple[list[str], list[str]] = ([], [])
    splitting = Split(fraction, field="data.train")
    for document in documents:
        for held_out, text in splitting.push(document):
            sides[held_out].append(text)
    for held_out, text in splitting.finish():
        sides[held_out].append(text)
    return sides


DOCUMENTS = [f"document {i}" for i in range(400)]


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_every_document_is_on_one_side_and_the_share_is_right(fraction: float) -> None:
    train, validation = split(DOCUMENTS, fraction)
    assert Counter(train + validation) == Counter(DOCUMENTS)
    assert abs(len(validation) / len(DOCUMENTS) - fraction) < 3 * (fraction * (1 - fraction) / len(DOCUMENTS)) ** 0.5


def test_adding_documents_moves_none() -> None:
    _, before = split(DOCUMENTS, 0.1)
    _, after = split(["new first", *reversed(DOCUMENTS), *(f"more {i}" for i in range(100))], 0.1)
    assert set(before) == set(after) & set(DOCUMENTS)


def test_the_split_is_pinned() -> None:
    """A later version must not train on what an earlier one held out."""
    assert split(DOCUMENTS, 0.01)[1] == ["document 383"]


def test_an_empty_side_gets_the_nearest_document_whatever_the_order() -> None:
    for documents in (DOCUMENTS, DOCUMENTS[::-1]):
        train, validation = split(documents, 1e-9)
        assert Counter(train + validation) == Counter(DOCUMENTS)
        # The lowest hash is the first to cross as the fraction grows.
        assert len(validation) == 1
        assert validation[0] in split(DOCUMENTS, 0.03)[1]
        assert validation == split(DOCUMENTS[::2] + DOCUMENTS[1::2], 1e-9)[1]

        train, validation = split(documents, 1 - 1e-9)
        assert Counter(train + validation) == Counter(DOCUMENTS)
        assert len(train) == 1
        assert train[0] in split(DOCUMENTS, 0.97)[0]


def test_the_end_of_a_single_document_is_held_out() -> None:
    assert split(["é" * 90 + "ü" * 10], 0.1) == (["é" * 90], ["ü" * 10])
    assert split(["ab"], 0.001) == (["a"], ["b"])
    assert split(["ab"], 0.999) == (["a"], ["b"])


def test_the_same_text_is_on_one_side_where_one_side_would_be_empty() -> None:
    for documents in (["a", "b", "a", "b", "c"], ["c", "b", "b", "a", "a"]):
        for fraction in (1e-9, 1 - 1e-9):
            train, validation = split(documents, fraction)
            assert sorted(train + validation) == sorted(documents)
            assert train
            assert validation
            assert not set(train) & set(validation)
    assert split(["é" * 90 + "ü" * 10] * 2, 0.1)[1] == ["ü" * 10]


def test_it_goes_on_where_both_sides_had_documents() -> None:
    begun = Split(0.1, field="data.train")
    before = [side for text in DOCUMENTS[:200] for side in begun.push(text)]
    assert begun.is_settled
    going_on = Split(0.1, field="data.train", settled=True)
    after = [side for text in DOCUMENTS[200:] for side in going_on.push(text)] + going_on.finish()
    train, validation = split(DOCUMENTS, 0.1)
    assert [text for held_out, text in before + after if not held_out] == train
    assert [text for held_out, text in before + after if held_out] == validation


def test_a_single_character_cannot_be_split() -> None:
    with pytest.raises(InputError, match=r"^data\.train: .*'x'.*data\.validation"):
        split(["x"], 0.5)
