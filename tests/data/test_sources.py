from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from reading import refused

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data import preparation as preparation_module
from sophia_levanter.data.corpora import prepare
from sophia_levanter.data.documents import Rows
from sophia_levanter.data.sources import DatasetSource, DataSource, TextSource, absolute_source, source_named
from sophia_levanter.errors import InputError
from tiny_runs import TEXTS, quiet, sides


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
    assert any("resuming made:up after" in line for line in said) is not changed
    assert any("made:up changed in the part" in line for line in said) is changed
    assert (sides(data) == whole) is not changed


def test_a_leak_names_the_document(made: DataConfig) -> None:
    said: list[str] = []
    prepare(replace(made, train="made:a", validation="made:b"), said.append)
    assert "the first is made:b, document 1 (document 1 of made:a)" in said[-1]


def test_texts_are_split_and_replaced_as_those_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Made, "texts", ["a|b", " ", "\ud800"])
    config = DataConfig(document_separator="|", invalid_utf8="replace")
    source = source_named("made:up", "data.train").open(Rows(config, "data.train"), print)
    assert list(source.documents()) == [((0, 1), "a"), ((0, 1), "b"), ((0, 3), "\ufffd")]
    assert source.rows.left_out == "skipped rows: 1 empty (first: made:up, document 2)"
    with pytest.raises(InputError, match=r"^data\.train: made:up, document 3 contains a lone surrogate"):
        list(source_named("made:up", "data.train").open(Rows(DataConfig(), "data.train"), print).documents())


def changing() -> Iterator[str]:
    yield "one"
    Made.version = 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("texts", None, r"Made\.documents\(\) returned null; it must yield strings"),
        ("texts", "text", r"Made\.documents\(\) returned a string; it must yield strings"),
        ("texts", ["one", b"two"], r"made:up, document 2 is a value of type bytes; Made\.documents\(\) must yield"),
        ("version", {1}, r"Made\.identity\(\) did not return a JSON value: TypeError: Object of type set is not"),
        (
            "texts",
            changing(),
            "made:up changed while it was being read; run the command again when nothing is writing to it",
        ),
    ],
)
def test_what_is_not_a_text(made: DataConfig, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str):
    monkeypatch.setattr(Made, "version", 1)
    monkeypatch.setattr(Made, name, value)
    with pytest.raises(InputError, match=rf"^data\.train: {message}"):
        prepare(made, quiet)


def failing() -> Iterator[str]:
    yield "one"
    raise KeyError("two")


def fails(self: Made) -> Any:
    raise ModuleNotFoundError("No module named 'gone'")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("identity", fails, r"Made\.identity\(\) failed: ModuleNotFoundError: No module named 'gone'"),
        ("documents", fails, r"Made\.documents\(\) failed: ModuleNotFoundError: No module named 'gone'"),
        ("documents", lambda self: failing(), r"Made\.documents\(\) failed: KeyError: 'two'"),
    ],
)
def test_a_source_that_fails(made: DataConfig, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str):
    monkeypatch.setattr(Made, name, value)
    with pytest.raises(InputError, match=rf"^data\.train: {message}$"):
        prepare(made, quiet)


@pytest.mark.parametrize("error", [InputError("as it is"), OSError("as it is")])
def test_a_source_that_reports_its_own_errors(made: DataConfig, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def report(self: Made) -> Any:
        raise error

    monkeypatch.setattr(Made, "identity", report)
    with pytest.raises(type(error), match=r"^as it is$"):
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
        "data.validation is 'nanogtp:train.bin'; no file has this name, and nanogtp: is not a known source type; "
        "did you mean nanogpt:? Available types: datasets:, hub:, made:, nanogpt:, store:"
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
    with pytest.raises(
        InputError, match=r"^data\.train: nanogpt:a\.bin contains tokens, not text; specify the original"
    ):
        source_named("nanogpt:a.bin", "data.train").open(Rows(DataConfig(), "data.train"), print)


ROWS = [f"text {i}" for i in range(50)]


def source(name: str, **fields: str) -> DatasetSource:
    return DatasetSource(name, Rows(DataConfig(**fields), "data.train"))


def read(name: str, **fields: str) -> list[str]:
    return [text for _, text in source(name, **fields).documents()]


def error_of(name: str, **fields: str) -> str:
    return refused(lambda: read(name, **fields))


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset that `datasets` finds by a name as on the hub: it looks for a folder of that name first."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "someone" / "texts"
    folder.mkdir(parents=True)
    for split, texts in (("train", ROWS), ("test", ["held out"])):
        Dataset.from_dict({"text": texts, "title": texts}).to_parquet(folder / f"{split}.parquet")
    return "hub:someone/texts"


@pytest.mark.parametrize("streaming", ["", "&streaming=false"])
def test_the_hub(on_hub: str, streaming: str) -> None:
    assert read(f"{on_hub}?split=train{streaming}") == ROWS
    assert read(f"{on_hub}?split=test{streaming}") == ["held out"]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_reading_goes_on_from_any_row(on_hub: str, streaming: str) -> None:
    name = f"{on_hub}?streaming={streaming}"
    everything = list(source(name).documents())
    for number in (0, 7, 48, 49):
        assert list(source(name).documents(everything[number][0])) == everything[number + 1 :]


def test_the_share_that_is_read(on_hub: str) -> None:
    reading = source(f"{on_hub}?streaming=false")
    shares = [reading.share_read() for _ in reading.documents()]
    assert shares[0] == pytest.approx(1 / 50)
    assert shares[-1] == 1


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["", *ROWS]})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=Dataset.from_dict({"text": ["held out"]})).save_to_disk(tmp_path / "both")
    assert read(f"datasets:{tmp_path}/one") == ROWS
    assert read(f"datasets:{tmp_path}/both") == ROWS
    assert read(f"datasets:{tmp_path}/both?split=test") == ["held out"]
    assert "no split 'dev'; available splits: train, test" in error_of(f"datasets:{tmp_path}/both?split=dev")
    assert read(f"datasets:{tmp_path}/one?split=train") == ROWS
    Dataset.from_dict({"text": ROWS}, split="test").save_to_disk(tmp_path / "named")
    assert read(f"datasets:{tmp_path}/named") == read(f"datasets:{tmp_path}/named?split=test") == ROWS
    assert "no split 'train'; available splits: test" in error_of(f"datasets:{tmp_path}/named?split=train")
    assert "no split 'dev'; available splits: train" in error_of(f"datasets:{tmp_path}/one?split=dev")
    assert "data.text_field: 'text'" in error_of(f"datasets:{tmp_path}/one", text_field="body")
    before = source(f"datasets:{tmp_path}/one").identity
    rows.map(lambda row: {"text": row["text"].upper()}).save_to_disk(tmp_path / "one")
    assert source(f"datasets:{tmp_path}/one").identity != before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hub:", "does not specify a dataset"),
        ("hub:a?splitt=train", "unknown option 'splitt'; valid options: split, name, revision, streaming"),
        ("datasets:a?revision=b", "unknown option 'revision'; valid options: split"),
        ("hub:a?split=", "the option 'split' is empty"),
        ("hub:a?streaming=yes", "streaming is 'yes'"),
    ],
)
def test_names_that_are_none(name: str, expected: str) -> None:
    assert expected in error_of(name)


def test_a_name_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: calls.append((args, options)) or [])
    assert read("hub:a/b?name=c&revision=d&split=train[:1%]&streaming=false") == read("hub:a/b") == []
    assert calls == [
        (("a/b",), {"name": "c", "split": "train[:1%]", "revision": "d", "streaming": False}),
        (("a/b",), {"name": None, "split": "train", "revision": None, "streaming": True}),
    ]


def test_what_is_not_there(on_hub: str) -> None:
    assert "cannot be loaded (ValueError)" in error_of(f"{on_hub}?name=other")
    assert "cannot be loaded (ValueError)" in error_of(f"{on_hub}?split=dev")
    assert "data.text_field: 'text', 'title'" in error_of(on_hub, text_field="body")


@pytest.mark.slow  # `datasets` tries again and again
def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@127.0.0.1:9")
    message = error_of("hub:nobody/nothing")
    assert "cannot be loaded" in message
    assert "secret" not in message


def test_a_folder_that_datasets_did_not_save(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was not saved by `datasets`"):
        _ = source(f"datasets:{tmp_path}").identity


def test_a_folder_is_known_by_its_files(on_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source(on_hub).identity
    Dataset.from_dict({"text": ["other"], "title": [""]}).to_parquet(tmp_path / "someone" / "texts" / "train.parquet")
    assert source(on_hub).identity != before
    absolute = absolute_source(f"{on_hub}?split=test", "data.train")
    assert absolute == f"hub:{tmp_path}/someone/texts?split=test"
    monkeypatch.chdir("/")
    assert read(absolute) == ["held out"]
    assert absolute_source(on_hub, "data.train") == on_hub  # there is no such folder here


@pytest.mark.parametrize("saved", [False, True])
def test_a_folder_that_changes_while_it_is_read(on_hub: str, tmp_path: Path, saved: bool) -> None:
    Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "saved")
    folder = tmp_path / ("saved" if saved else "someone/texts")
    documents = source(f"datasets:{folder}" if saved else on_hub).documents()
    next(documents)
    (folder / "more").touch()
    with pytest.raises(InputError, match=r"^data\.train: .* changed after it was found; run the command again"):
        list(documents)


def test_rows_that_cannot_be_read(on_hub: str, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_bytes(b'{"text": "good"}\n' * 60 + b'{"text": \n')
    assert "cannot be" in error_of(f"hub:{tmp_path}/bad")
    (tmp_path / "bad" / "train.jsonl").write_bytes(b'{"text": "good"}\n' * 60 + b'{"text": "\xe9"}\n')
    assert "cannot be" in error_of(f"hub:{tmp_path}/bad")


def test_a_network_that_fails_on_the_way_leaves_what_is_done(on_hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __iter__(self):
            yield {"text": "good"}
            raise ConnectionError("http://user:secret@proxy")

    monkeypatch.setattr(DatasetSource, "_load", lambda self: Failing())
    with pytest.raises(OSError, match=r"cannot be read after row 1 \(ConnectionError\)$"):
        read(on_hub)
