"""Which files a source names: globs, folders, links, URLs, and what lies beside the text."""

from __future__ import annotations

import gzip
import io
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.registry import _registry
from fsspec.spec import AbstractBufferedFile
from reading import error_of, json_lines, parquet, read, source_of

from sophia_levanter.data import formats
from sophia_levanter.data.text_files import find_files
from sophia_levanter.errors import InputError


def test_the_standard_library() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = find_files("python_stdlib", field="data.train", report=print)
    names = [Path(file.name).relative_to(root) for file in files]
    assert len(names) > 300
    assert Path("json", "decoder.py") in names
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
    source = source_of("python_stdlib")
    assert [text for _, text in source.documents()] == ["# coding: latin-1\n'é'"]
    assert source.rows.left_out == ""  # empty modules are not worth a line
    (tmp_path / "f.py").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    source = source_of("python_stdlib")
    found = [(text, source.share_read()) for _, text in source.documents()]
    assert [text for text, _ in found] == ["# coding: latin-1\n'é'", "one\ntwo\nthree\n"]
    assert found[-1][1] == 1
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nowhere")})
    assert "does not include the source code of the standard library" in error_of("python_stdlib")


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


def test_a_folder_is_its_files_of_known_kinds(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("B")
    (tmp_path / "a.md").write_text("no")
    (tmp_path / "sub" / "c.jsonl.gz").write_bytes(gzip.compress(json_lines({"text": "C"})))
    (tmp_path / "a.parquet").write_bytes(parquet({"text": ["A"]}))
    (tmp_path / "config.json").write_text('{"not": "text"}')
    (tmp_path / "z.json.gz").write_bytes(gzip.compress(json_lines({"text": "Z"})))
    assert read(tmp_path) == ["A", "B", "C", "Z"]


LEFT_OUT = [
    ".ipynb_checkpoints/a-checkpoint.txt",
    "._a.txt",
    "__MACOSX/a.txt",
    "_temporary/0/a.txt",
    "a.txt~",
    "#a.txt#",
    "a.txt.bak",
    "a.jsonl.gz.part",
]


@pytest.mark.parametrize("pattern", ["", "**"])
@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_editors_downloads_and_systems_leave_is_left_out(tmp_path: Path, name: str, pattern: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("left out")
    (tmp_path / "b.txt").write_text("B")
    said: list[str] = []
    assert read(tmp_path / pattern, said=said) == ["B"]
    assert [
        f"skipped 1 hidden, backup or partially downloaded file, such as {tmp_path / name};" in s for s in said
    ] == [True]
    assert read(tmp_path / name) == ["left out"]  # what is named is read


def test_hidden_places_that_are_named_are_read(tmp_path: Path) -> None:
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "a.txt").write_text("A")
    for source in (".data", ".data/*.txt", ".d*/a.txt"):
        assert read(tmp_path / source) == ["A"]


@pytest.mark.parametrize("source", ["l", "l/**/*.txt", "l/**", "**/*.txt"])
def test_links_do_not_multiply_the_text(tmp_path: Path, source: str) -> None:
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "b.txt").write_text("B")
    (tmp_path / "l" / "a.txt").symlink_to("b.txt")
    (tmp_path / "l" / "Self").symlink_to("../l")
    said: list[str] = []
    assert read(tmp_path / source, said=said) == ["B"]
    assert len(said) == 1
    assert "to files already included" in said[0]
    (tmp_path / "l" / "b.txt").rename(tmp_path / "c.txt")
    (tmp_path / "l" / "a.txt").unlink()
    (tmp_path / "l" / "a.txt").symlink_to("../c.txt")
    assert read(tmp_path / source) == ["B"]


def test_links_from_a_folder_to_others_are_said(tmp_path: Path) -> None:
    for name in ("folder/sub", "other", "folder/.git"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text("A")
    (tmp_path / "other" / "b.txt").write_text("B")
    for name in ("sub/within", "sub/linked", ".git/hidden"):
        (tmp_path / "folder" / name).symlink_to(tmp_path / ("folder/sub" if name == "sub/within" else "other"))
    said: list[str] = []
    assert read(tmp_path / "folder", said=said) == ["A"]
    assert said == [
        f"data.train: skipped 1 link to other folders, such as {tmp_path}/folder/sub/linked; "
        f"to follow links, use a glob such as {tmp_path}/folder/**/*.txt"
    ]
    assert read(f"{tmp_path}/folder/**/*.txt") == ["A", "B"]


@pytest.mark.parametrize("source", ["a", "**/*.txt", "a/*/*/a.txt", "[ab]/**"])
def test_folders_that_link_to_each_other(tmp_path: Path, source: str) -> None:
    for name, other in ("ab", "ba"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name.upper())
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    (tmp_path / "a" / "top").symlink_to(tmp_path)
    texts = read(tmp_path / source)
    assert sorted(texts) in (["A"], ["A", "B"])  # of a folder, Python's versions before 3.13 follow no links
    assert ("B" in texts) or source in ("a", "a/*/*/a.txt")


@pytest.mark.parametrize("pattern", ["**", "shown/*"])
def test_a_link_that_shows_a_hidden_folder_is_followed(tmp_path: Path, pattern: str) -> None:
    (tmp_path / ".store").mkdir()
    (tmp_path / ".store" / "a.txt").write_text("A")
    (tmp_path / "shown").symlink_to(".store")
    assert read(tmp_path / pattern) == ["A"]


@pytest.fixture
def memory_files() -> fsspec.AbstractFileSystem:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe(
        {
            "/here/b.txt": b"B",
            "/here/a.jsonl.gz": gzip.compress(json_lines({"text": "A"})),
            "/here/c.parquet": parquet({"text": ["C"]}),
            "/here/d.md": b"no",
            "/here/.git/a.txt": b"left out",
            "/here/b.txt~": b"left out",
            "/here/__MACOSX/b.txt": b"left out",
        }
    )
    yield filesystem
    filesystem.rm("/here", recursive=True)


@pytest.mark.parametrize(
    ("url", "texts"),
    [("memory://here/b.txt", ["B"]), ("memory://here", ["A", "B", "C"]), ("memory://here/*.*", ["A", "B", "C", "no"])],
)
def test_urls(memory_files: fsspec.AbstractFileSystem, url: str, texts: list[str]) -> None:
    assert read(url) == texts


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("memory://here/gone.txt", "no file matches"),
        ("nothing://here", "unknown scheme"),
        ("https://127.0.0.1:9/a.txt", "cannot be read"),
    ],
)
def test_urls_that_cannot_be_read(memory_files: fsspec.AbstractFileSystem, url: str, expected: str) -> None:
    message = error_of(url)
    assert url in message
    assert expected in message


@pytest.mark.parametrize("url", ["memory://here/b.txt", "memory://here"])
def test_a_url_whose_content_changes_while_it_is_read(memory_files: fsspec.AbstractFileSystem, url: str) -> None:
    source = source_of(url)
    memory_files.pipe("/here/b.txt", b"Bb")
    with pytest.raises(InputError, match=r"memory:///?here/b\.txt changed after it was found"):
        list(source.documents())


class Stream(AbstractBufferedFile):
    """As fsspec's `HTTPStreamFile`: it does not seek, and a read may return fewer bytes."""

    def __init__(self, filesystem: Any, path: str, content: bytes) -> None:
        self.details = {"name": path, "size": None}
        super().__init__(filesystem, path, "rb", cache_type="none")
        self.content = io.BytesIO(content)

    def seek(self, loc: int, whence: int = 0) -> None:
        if (loc, whence) not in ((0, 1), (self.loc, 0)):
            raise ValueError("Cannot seek streaming HTTP file")

    def read(self, num: int = -1) -> bytes:
        data = self.content.read(min(num, 999))
        self.loc += len(data)
        return data


class Web(fsspec.AbstractFileSystem):
    """What fsspec's HTTP file system, which needs aiohttp, says of files on a server."""

    protocol = "http"
    cachable = False
    content = b"one"
    headers: ClassVar[dict[str, str]] = {}
    streams = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def unstrip_protocol(self, name: str) -> str:
        return name

    def isdir(self, path: str) -> bool:
        return False

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "size": None if self.streams else len(self.content), **self.headers, "type": "file"}

    def ukey(self, path: str) -> str:
        return path

    def _open(self, path: str, *args: Any, **options: Any) -> Any:
        return Stream(self, path, self.content) if self.streams else io.BytesIO(self.content)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Put content at a URL."""
    monkeypatch.setitem(_registry, "http", Web)

    def put(content: bytes, **headers: str) -> str:
        monkeypatch.setattr(Web, "content", content)
        monkeypatch.setattr(Web, "headers", {name.replace("_", "-"): value for name, value in headers.items()})
        return "http://server/a"

    return put


@pytest.mark.parametrize("header", ["ETag", "Last_Modified"])
def test_a_file_on_a_web_server_is_known_by_its_headers(web: Callable[..., str], header: str) -> None:
    source = source_of(web(b"one", **{header: "1"}))
    web(b"two", **{header: "2"})
    assert source_of("http://server/a").identity != source.identity
    with pytest.raises(InputError, match="changed after it was found"):
        list(source.documents())
    assert source_of(web(b"one")).parts == [("http://server/a", 3, "http://server/a")]


@pytest.mark.parametrize("kind", ["text", "lines", "array", "lines.gz", "parquet"])
def test_servers_that_send_only_whole_files(
    web: Callable[..., str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """They send no sizes either."""
    monkeypatch.setattr(Web, "streams", True)
    monkeypatch.setattr(formats, "EXPANDED_BYTES", 100)
    texts = ["one" * 40_000, "two", "three" * 40_000]
    rows = [{"text": text} for text in texts]
    content = {
        "text": "".join(texts).encode(),
        "lines": json_lines(*rows),
        "array": json.dumps(rows).encode(),
        "lines.gz": gzip.compress(json_lines(*rows)),
        "parquet": parquet({"text": texts}),
    }
    assert read(web(content[kind])) == (["".join(texts)] if kind == "text" else texts)


def test_a_server_that_refuses_a_part_of_a_file(web: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bytes:
        raise ValueError("The HTTP server doesn't appear to support range requests.")

    monkeypatch.setattr(Web, "streams", True)
    monkeypatch.setattr(Stream, "read", refuse)
    assert error_of(web(b"one")) == (
        "data.train: http://server/a cannot be read in parts; download it and specify the local file"
    )


def test_what_is_not_text_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    for source in ("gone.txt", "*.nothing"):
        assert source in error_of(tmp_path / source)
        with pytest.raises(InputError):
            source_of(tmp_path / source)
    (tmp_path / "a.txt").symlink_to("gone")
    assert "not a regular file" in error_of(tmp_path / "a.txt")
    for folder, name, answer in (("notes/", "a.md", "{}/*.md"), ("saved", "state.json", "use datasets:{}")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
        assert answer.format(tmp_path / folder) in error_of(f"{tmp_path}/{folder}")


def test_a_url_with_a_password_is_refused_and_not_shown() -> None:
    message = error_of("https://user:s3cret@127.0.0.1:1/a.jsonl")
    assert "password" in message
    assert "s3cret" not in message
