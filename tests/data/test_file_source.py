"""Texts in files: plain, as records, compressed, damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd
from reading import error_of, json_lines, parquet, read, source_of

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data import file_source, formats


def flipped_pages(content: bytes) -> bytes:
    """The file with its first page's header overwritten, which pyarrow says in several lines."""
    return content[:4] + b"\xff" * 40 + content[44:]


def test_a_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffune\r\n\r\npreuve é\n".encode())
    assert read(tmp_path / "a.txt") == ["une\r\n\r\npreuve é\n"]


def test_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json_lines({"text": "one\ntwo", "x": 1}) + b"\n" + json_lines({"text": ""}, {"text": "é"})
    )
    assert read(tmp_path / "a.jsonl") == ["one\ntwo", "é"]


@pytest.mark.parametrize(
    ("name", "compress", "agrees"),
    [
        ("a.jsonl.gz", gzip.compress, True),
        ("A.JSONL.GZ", gzip.compress, True),
        ("a.txt.xz", lzma.compress, True),
        ("a.jsonl.zst", zstd.compress, True),
        ("a.txt.bz2", bz2.compress, True),
        ("a.txt", gzip.compress, False),
        ("a.jsonl", bz2.compress, False),
        ("a.txt.gz", zstd.compress, False),
        ("a.jsonl.zst", lzma.compress, False),
    ],
)
def test_compressions(tmp_path: Path, name: str, compress: Callable[[bytes], bytes], agrees: bool) -> None:
    is_text = name.startswith("a.txt")
    content = b"some text" if is_text else json_lines({"text": "one"})
    # Two streams one after the other are one file.
    (tmp_path / name).write_bytes(compress(content) + compress(content))
    said: list[str] = []
    assert read(tmp_path / name, said=said) == (["some textsome text"] if is_text else ["one", "one"])
    assert bool(said) is not agrees


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parquet(tmp_path: Path, suffix: str) -> None:
    texts = [f"text {i}" for i in range(700)]
    content = parquet({"text": [*texts, "", " "], "n": list(range(702))}, row_group_size=300)
    (tmp_path / f"a.parquet{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    assert read(tmp_path / f"a.parquet{suffix}") == texts


RECORDS = json_lines({"text": "one", "url": "u"}, {"text": "two"})
ARRAY = b'[ {"text": "one", "url": "u"},\n {"text": "two"} ]\n'


@pytest.mark.parametrize("name", ["a.json", "c4.00000-of-01024.json.gz", "a.ndjson", "a.jsonlines.zst", "A.JSON"])
def test_json_by_all_its_suffixes(tmp_path: Path, name: str) -> None:
    compress = {".gz": gzip.compress, "zst": zstd.compress}.get(name[-3:], bytes)
    (tmp_path / name).write_bytes(compress(RECORDS))
    said: list[str] = []
    assert read(tmp_path / name, said=said) == ["one", "two"]
    assert said == []


@pytest.mark.parametrize(
    ("name", "content", "held"),
    [
        ("a.txt", RECORDS, "JSON lines"),
        ("a", b"\n" + RECORDS, "JSON lines"),
        ("a.md", b"\xef\xbb\xbf" + RECORDS, "JSON lines"),
        ("a.parquet", RECORDS, "JSON lines"),
        ("a.txt", ARRAY, "a JSON array"),
        ("a.jsonl", ARRAY, "a JSON array"),
        ("a.txt", parquet({"text": ["one", "two"]}), "Parquet"),
        ("a.jsonl.gz", RECORDS, "JSON lines"),
        ("a.txt.xz", gzip.compress(RECORDS, mtime=0), "JSON lines compressed with gzip"),
        ("a.parquet", zstd.compress(parquet({"text": ["one", "two"]})), "Parquet compressed with zstd"),
    ],
)
def test_the_content_decides_and_one_line_says_so(tmp_path: Path, name: str, content: bytes, held: str) -> None:
    (tmp_path / name).write_bytes(content)
    said: list[str] = []
    assert read(tmp_path / name, said=said) == ["one", "two"]
    assert [f"{tmp_path / name} contains {held}, despite its name;" in line for line in said] == [True]
    assert "\n" not in said[0]


def test_files_that_disagree_alike_are_said_once(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(RECORDS)
    said: list[str] = []
    assert read(tmp_path / "*.txt", said=said) == ["one", "two"] * 3
    assert len(said) == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"title": "no text"}\n{"title": "none"}\n',
        '{"text": "one"}\nand then prose\n',
        '# of 2026\n{"text": "a"}\n{"text": "b"}\n',
        "{braces} and prose",
        '[{"title": "no text"}]',
        "[1] a list\n",
        "[{",
        "PAR is not PAR1",
        "BZh9 is not bzip2",
    ],
)
def test_what_only_looks_like_records_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    said: list[str] = []
    assert read(tmp_path / "a.txt", said=said) == [text]
    assert len(said) == ('\n{"' in f"\n{text}")
    warning = f"WARNING: data.train: {tmp_path}/a.txt is read as plain text, although some lines are JSON objects"
    assert all(line.startswith(warning) for line in said)


def test_a_first_line_longer_than_the_look_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(json_lines({"text": "x" * 200_000}, {"text": "two"}))
    assert [len(text) for text in read(tmp_path / "a.txt")] == [200_000, 3]


@pytest.mark.parametrize("array_bytes", [1, 7, 64, 1 << 20])
def test_a_json_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array_bytes: int) -> None:
    monkeypatch.setattr(file_source, "PIECE_BYTES", array_bytes)
    texts = ["é € 𝄞", 'a ] , { " quote', "x" * 300]
    for indent in (None, 2):
        content = json.dumps([{"text": text, "n": [1, {}]} for text in texts], indent=indent, ensure_ascii=False)
        (tmp_path / "a.json").write_text("\ufeff" + content)
        assert read(tmp_path / "a.json") == texts
        assert list(source_of(tmp_path / "a.json").documents((0, 1))) == [((0, 2), texts[1]), ((0, 3), texts[2])]
    (tmp_path / "a.json").write_text(" [ ] ")
    assert read(tmp_path / "a.json") == []


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_frames_of_zstd_with_long_windows_and_skippable_ones(tmp_path: Path, window_log: int) -> None:
    content = json_lines({"text": "one"})
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    skipped = b"\x5a\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"none"
    long = b"\x28\xb5\x2f\xfd\0" + bytes([(window_log - 10) << 3]) + block
    (tmp_path / "a.jsonl.zst").write_bytes(skipped + long)
    assert read(tmp_path / "a.jsonl.zst") == ["one"]


def test_marks_in_the_middle_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + RECORDS + b"\xef\xbb\xbf" + RECORDS)
    assert read(tmp_path / "a.jsonl") == ["one", "two"] * 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_reading_goes_on_from_any_position(tmp_path: Path, name: str) -> None:
    texts = [["", *(f"{part} {i}" for i in range(20))] for part in range(3)]
    for part in range(3):
        if name == "a.parquet":
            content = parquet({"text": texts[part]}, row_group_size=6)
        else:
            content = json_lines(*({"text": text} for text in texts[part]))
        (tmp_path / f"{part}{name}").write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    source = source_of(tmp_path / "*")
    everything = list(source.documents())
    assert [text for _, text in everything] == [text for part in texts for text in part if text]
    for number, (position, _) in enumerate(everything):
        rest = source_of(tmp_path / "*").documents(position)
        assert list(rest) == everything[number + 1 :]


def test_the_share_that_is_read(tmp_path: Path) -> None:
    for part in range(2):
        (tmp_path / f"{part}.jsonl").write_bytes(json_lines(*({"text": "x" * 10_000} for _ in range(50))))
    (tmp_path / "2.parquet").write_bytes(parquet({"text": ["x" * 10_000] * 50}))
    source = source_of(tmp_path / "*")
    shares = [source.share_read() for _ in source.documents()]
    assert shares == sorted(shares)
    assert shares[0] < 0.1
    assert 0.4 < shares[49] <= 0.5
    assert source.share_read() == 1


def test_what_is_not_utf8_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xffc")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "d\xe9"}\n{"text": "e\\ud83d"}\n')
    config = DataConfig(invalid_utf8="replace")
    texts = [text for _, text in source_of(tmp_path / "*", config).documents()]
    assert texts == ["ab\ufffdc", "d\ufffd", "e\ufffd"]


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "no", "body": "yes"}))
    assert read(tmp_path / "a.jsonl", "body") == ["yes"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "é".encode() + b"\xff", "0xff at byte offset 2"),
        ("a.txt", b"abc\0", "byte offset 3"),
        ("a.jsonl", json_lines({"text": "1"}) + b'{"text": "\xe9"}', ":2 is not valid UTF-8 (0xe9 at byte offset 24"),
        ("a.txt.gz", gzip.compress(b"some text" * 9, mtime=0)[:12] + b"damage" * 9, "truncated or damaged"),
        ("a.txt.gz", b"not compressed \xff", "0xff at byte offset 15"),
        ("a.txt.bz2", bz2.compress(b"some text" * 9)[:-9], "truncated or damaged"),
        ("a.txt.bz2", bz2.compress(b"some text" * 9)[:10] + b"damage" * 9, "cannot read"),
        ("a.jsonl.zst", zstd.compress(b"some text" * 9)[:-9], "truncated or damaged"),
        ("a.jsonl.zst", b"not compressed", ":1 is not valid JSON"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16LE, not UTF-8; convert it with iconv -f UTF-16LE"),
        ("a.jsonl.gz", gzip.compress(b"\xfe\xff\0a", mtime=0), "is UTF-16BE"),
        ("a.txt", "text".encode("utf-32"), "is UTF-32LE"),
        ("a.txt", b"\0\0\xfe\xff\0\0\0a", "is UTF-32BE"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.json", b'{\n "text": "pretty"\n}', ":1 is not valid JSON"),
        ("a.json", b'[{"text": "1"} {"text": "2"}]', "record 2, is neither"),
        ("a.json", b'[{"text": "1"}, {"text": "\xff"}]', "0xff at byte offset 26"),
        ("a.json", b'[{"text": ' + b"1" * 5000 + b"}]", "record 1, cannot be parsed as JSON"),
        ("a.parquet", b"not Parquet", "not a Parquet file"),
        ("a.parquet", flipped_pages(parquet({"text": ["some text"] * 500})), "cannot read"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1 cannot be parsed as JSON"),
        (
            "a.jsonl",
            json_lines({"body": "1", "title": "2"}),
            "no field 'text'; possible values for data.text_field: 'body', 'title'",
        ),
        ("a.jsonl", json_lines({}), "(none)"),
        ("a.jsonl", b'{"text": "ab\\ud83d"}', "\\ud83d, at character 2"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = error_of(tmp_path / name)
    assert expected in message
    assert str(tmp_path / name) in message


BOMBS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd.compress}


@pytest.mark.parametrize("compression", BOMBS)
def test_a_compressed_file_that_expands_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    monkeypatch.setattr(formats, "EXPANDED_BYTES", 1 << 20)
    path = tmp_path / "a.txt"
    path.write_bytes(BOMBS[compression](b"a" * (1 << 22)))
    assert error_of(path).startswith(f"data.train: {path} decompresses to more than 200 times its size; if that ")


def test_a_text_that_does_not_fit_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(1 << 42)
    assert "is one document of 4,398,046,511,104 bytes, which does not fit in memory" in error_of(tmp_path / "a.txt")
