from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path

import pytest

from sophia_levanter.data.documents import read_documents, resolve_files
from sophia_levanter.errors import InputError


def read(source: str | Path, text_field: str = "text") -> list[str]:
    return list(read_documents(str(source), text_field, field="data.train"))


def error_of(source: str | Path, text_field: str = "text") -> str:
    with pytest.raises(InputError) as info:
        read(source, text_field)
    message = str(info.value)
    assert message.startswith("data.train: ")
    assert "\n" not in message
    return message


def json_lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_the_standard_library() -> None:
    texts = read("python_stdlib")
    root = Path(sysconfig.get_paths()["stdlib"])
    assert len(texts) > 300
    assert (root / "json" / "decoder.py").read_text(encoding="utf-8") in texts
    names = [path.relative_to(root) for path in resolve_files("python_stdlib", field="data.train")]
    assert names == sorted(names)
    assert not [name for name in names if {"site-packages", "test", "tests"}.intersection(name.parts)]


def test_the_standard_library_as_it_declares_its_encoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes("# coding: latin-1\n'é'".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"'\xe9'")
    (tmp_path / "c.py").write_bytes(b"# coding: nonsense\n")
    (tmp_path / "d.py").write_bytes(b"")
    (tmp_path / "e.py").write_bytes(b"\n\n\n'\xe9'")
    for name in ("site-packages", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "e.py").write_text("left out")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert read("python_stdlib") == ["# coding: latin-1\n'é'"]
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nowhere")})
    assert "no source files" in error_of("python_stdlib")


def test_a_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffune\r\n\r\npreuve é\n".encode())
    assert read(tmp_path / "a.txt") == ["une\r\n\r\npreuve é\n"]


def test_a_glob_is_read_in_sorted_order_and_crosses_folders(tmp_path: Path) -> None:
    (tmp_path / "sub.txt").mkdir()
    for name, text in {"b.txt": "B", "a.md": "no", "sub.txt/c.txt": "C", "a.txt": "A", "empty.txt": " \n"}.items():
        (tmp_path / name).write_text(text)
    assert read(tmp_path / "*.txt") == ["A", "B"]
    assert read(tmp_path / "**" / "*.txt") == ["A", "B", "C"]


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("one")
    assert read(tmp_path / "a[1].txt") == ["one"]


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert read("~/a.txt") == ["at home"]


def test_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json_lines({"text": "one\ntwo", "x": 1}) + b"\n" + json_lines({"text": ""}, {"text": "é"})
    )
    assert read(tmp_path / "a.jsonl") == ["one\ntwo", "é"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "A.JSONL.GZ", "a.txt.gz"])
def test_gzip(tmp_path: Path, name: str) -> None:
    content = json_lines({"text": "one"})
    (tmp_path / name).write_bytes(gzip.compress(content))
    assert read(tmp_path / name) == (["one"] if "jsonl" in name.lower() else [content.decode()])


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "no", "body": "yes"}))
    assert read(tmp_path / "a.jsonl", "body") == ["yes"]


@pytest.mark.parametrize("source", ["gone.txt", "*.nothing"])
def test_no_file(tmp_path: Path, source: str) -> None:
    assert source in error_of(tmp_path / source)


def test_a_folder_is_answered_with_a_glob(tmp_path: Path) -> None:
    assert f"{tmp_path}/*.txt" in error_of(f"{tmp_path}/")


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("gone")
    assert "not a regular file" in error_of(tmp_path / "a.txt")


def test_errors_of_resolving_come_before_reading(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_documents(str(tmp_path / "gone.txt"), "text", field="data.train")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt.gz", b"", "is empty"),
        ("a.txt", b" \n\t", "no document with text"),
        ("a.jsonl", b"\n" + json_lines({"text": " "}), "no document with text"),
        ("a.txt", "é".encode() + b"\xff", "0xff at byte offset 2"),
        ("a.txt", b"abc\0", "byte offset 3"),
        ("a.jsonl", json_lines({"text": "1"}) + b'{"text": "\xe9"}', ":2 is not UTF-8 text (0xe9 at byte offset 24"),
        ("a.txt.gz", gzip.compress(b"some text" * 9, mtime=0)[:-9], "truncated or damaged"),
        ("a.txt.gz", gzip.compress(b"some text" * 9, mtime=0)[:12] + b"damage" * 9, "truncated or damaged"),
        ("a.txt.gz", b"not compressed", "no gzip file"),
        ("a.jsonl", json_lines({"text": "1"}) + b'\n{"text": "2",}\n', "a.jsonl:3 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl:1 is not JSON"),
        ("a.jsonl", json_lines(["text"]), "a.jsonl:1 is not a JSON object but a list"),
        ("a.jsonl", json_lines({"body": "1", "title": "2"}), "no field 'text'; data.text_field may be 'body', 'title'"),
        ("a.jsonl", json_lines({}), "(none)"),
        ("a.jsonl", json_lines({"text": "1"}, {"text": None}), "a.jsonl:2: the field 'text' is not a string"),
        ("a.jsonl", b'{"text": "ab\\ud83d"}', "\\ud83d, at character 2"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = error_of(tmp_path / name)
    assert expected in message
    assert str(tmp_path / name) in message
