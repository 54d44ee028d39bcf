"""Which source a string means, and texts from outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prepared import TEXTS, quiet, sides

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data import preparation as preparation_module
from sophia_levanter.data.prepare import prepare
from sophia_levanter.data.sources import DataSource, TextSource, absolute_source, open_source
from sophia_levanter.errors import InputError


class Made(TextSource):
    """`made:NAME`: whatever a test puts here."""

    version: Any = 1
    texts: Any = TEXTS

    def documents(self) -> Any:
        return self.texts

    def identity(self) -> Any:
        return self.version


@pytest.fixture(autouse=True)
def _made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DataSource.get_known_choices(), "made", Made)


@pytest.fixture
def made(config: DataConfig) -> DataConfig:
    return replace(config, train="made:up")


def test_texts_are_prepared_once(config: DataConfig, made: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(made, quiet)
    assert sides(first) == sides(prepare(config, quiet))
    monkeypatch.setattr(Made, "documents", None)
    assert prepare(made, quiet).train.path == first.train.path
    monkeypatch.undo()
    monkeypatch.setitem(DataSource.get_known_choices(), "made", Made)
    monkeypatch.setattr(Made, "version", 2)
    monkeypatch.setattr(Made, "texts", TEXTS[1:])
    assert sides(prepare(made, quiet)) != sides(first)


@pytest.mark.parametrize("changed", [False, True])
def test_what_was_prepared_before_an_error_is_kept(
    made: DataConfig, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    monkeypatch.setattr(preparation_module, "BLOCK_CHARACTERS", 100)
    whole = sides(prepare(made, quiet))
    monkeypatch.setattr(Made, "version", 2)
    monkeypatch.setattr(Made, "texts", [*TEXTS[:50], 7])
    with pytest.raises(InputError, match=r"^data\.train: made:up, document 51 is a number; Made\.documents\(\) must"):
        prepare(made, quiet)
    monkeypatch.setattr(Made, "version", 3)
    monkeypatch.setattr(Made, "texts", [text.upper() for text in TEXTS] if changed else TEXTS)
    said: list[str] = []
    data = prepare(made, said.append)
    assert any("going on with made:up after" in line for line in said) is not changed
    assert any("made:up changed in the part" in line for line in said) is changed
    assert (sides(data) == whole) is not changed


def test_a_leak_names_the_document(made: DataConfig) -> None:
    said: list[str] = []
    prepare(replace(made, train="made:a", validation="made:b"), said.append)
    assert "the first is made:b, document 1 (document 1 of made:a)" in said[-1]


def test_texts_are_split_and_replaced_as_those_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Made, "texts", ["a|b", " ", "\ud800"])
    config = DataConfig(document_separator="|", invalid_utf8="replace")
    source = open_source("made:up", config, field="data.train", report=print)
    assert list(source.documents()) == [((0, 1), "a"), ((0, 1), "b"), ((0, 3), "\ufffd")]
    assert source.rows.left_out == "rows left out: 1 empty, first made:up, document 2"
    with pytest.raises(InputError, match=r"^data\.train: made:up, document 3 holds half of a surrogate pair"):
        list(open_source("made:up", DataConfig(), field="data.train", report=print).documents())


def changing() -> Iterator[str]:
    yield "one"
    Made.version = 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("texts", None, r"Made\.documents\(\) gives null; it must yield strings"),
        ("texts", "text", r"Made\.documents\(\) gives a string; it must yield strings"),
        ("texts", ["one", b"two"], r"made:up, document 2 is a value of type bytes; Made\.documents\(\) must yield"),
        ("version", {1}, r"Made\.identity\(\) is not a JSON value: Object of type set is not"),
        ("texts", changing(), "made:up changed while it was read; run the command again when nothing writes to it"),
    ],
)
def test_what_is_not_a_text(made: DataConfig, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str):
    monkeypatch.setattr(Made, "version", 1)
    monkeypatch.setattr(Made, name, value)
    with pytest.raises(InputError, match=rf"^data\.train: {message}"):
        prepare(made, quiet)


class Half(TextSource):
    pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Half, "data.train: Half does not define documents() and identity()"),
        (Path, "data.train: Path is not a subclass of DataSource"),
    ],
)
def test_a_class_that_lacks_something(kind: type, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DataSource.get_known_choices(), "half", kind)
    with pytest.raises(InputError) as error:
        absolute_source("half:way", "data.train")
    assert str(error.value) == message


def test_an_unknown_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        absolute_source("nanogtp:train.bin", "data.validation")
    assert str(error.value) == (
        "data.validation is 'nanogtp:train.bin'; no file is called that, and nanogtp: is not a known kind of source; "
        "did you mean nanogpt:? There are datasets:, hub:, made:, nanogpt:, store:"
    )
    (tmp_path / "a:b").mkdir()
    names = ["a:b/*.txt", "text.txt", "~/text.txt", "python_stdlib", "gs://bucket/a:b", "made:up"]
    assert [absolute_source(name, "data.train") for name in names] == [
        f"{tmp_path}/a:b/*.txt",
        f"{tmp_path}/text.txt",
        str(Path("~/text.txt").expanduser()),
        *names[3:],
    ]


def test_a_token_file_has_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.train: nanogpt:a\.bin holds tokens; name the text that"):
        open_source("nanogpt:a.bin", DataConfig(), field="data.train", report=print)
