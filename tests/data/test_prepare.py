from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sophia_levanter.data import prepare as prepare_module
from sophia_levanter.data.config import DataConfig
from sophia_levanter.data.prepare import TextData, prepare
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.data.tokenizer import Tokenizer
from sophia_levanter.errors import InputError

TEXTS = [f"the document number {i}, naïve\n" for i in range(60)]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    return DataConfig(
        train=str(tmp_path / "train.jsonl"), validation_fraction=0.2, cache_dir=str(tmp_path / "deep" / "cache")
    )


def quiet(line: str) -> None:
    assert "\n" not in line


def documents(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    texts: list[list[int]] = [[]]
    for token in store.read(0, store.num_tokens).tolist():
        if token == tokenizer.end_of_text:
            texts.append([])
        else:
            texts[-1].append(token)
    assert texts.pop() == []  # the last document is ended too
    assert len(texts) == store.num_documents
    return [tokenizer.decode(text) for text in texts]


def sides(data: TextData) -> tuple[list[str], list[str]]:
    return documents(data.train, data.tokenizer), documents(data.validation, data.tokenizer)


def test_a_part_of_the_documents_is_held_out(config: DataConfig) -> None:
    train, validation = sides(prepare(config, quiet))
    assert sorted(train + validation) == sorted(TEXTS)
    assert not set(train) & set(validation)
    assert 3 <= len(validation) <= 25


def test_groups_keep_documents_apart(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sides(prepare(config, quiet))
    monkeypatch.setattr(prepare_module, "ENCODE_CHARACTERS", 60)
    assert sides(prepare(replace(config, cache_dir=config.cache_dir + "2"), quiet)) == whole


def test_a_validation_source_of_its_own(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "validation.txt").write_text("held out")
    train, validation = sides(prepare(replace(config, validation=str(tmp_path / "validation.txt")), quiet))
    assert (train, validation) == (TEXTS, ["held out"])


def test_it_is_done_once_and_said(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = prepare(config, said.append)
    assert any("60 documents" in line and "bytes per token" in line for line in said)
    monkeypatch.setattr(prepare_module, "read_documents", None)
    said.clear()
    again = prepare(config, said.append)
    assert len(said) == 1
    assert "already" in said[0]
    assert sides(again) == sides(first)


@pytest.mark.parametrize(
    "change", [{"validation_fraction": 0.5}, {"text_field": "title"}, {"validation": "train.jsonl"}], ids=str
)
def test_other_settings_are_another_store(config: DataConfig, tmp_path: Path, change: dict) -> None:
    lines = [json.dumps({"text": text, "title": text.upper()}) for text in TEXTS]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    before = prepare(config, quiet)
    if "validation" in change:
        change = {"validation": config.train}
    after = prepare(replace(config, **change), quiet)
    assert after.train.path != before.train.path


def test_a_changed_file_is_another_store(config: DataConfig) -> None:
    before = prepare(config, quiet)
    content = Path(config.train).read_text()
    Path(config.train).write_text(content.replace("number 7", "NUMBER 7"))
    os.utime(config.train, ns=(1, 1))
    changed = sides(prepare(config, quiet))
    assert sorted(changed[0] + changed[1]) != sorted(sides(before)[0] + sides(before)[1])


def test_another_tokenizer_is_another_store(
    config: DataConfig, tiny_bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_bytes = prepare(config, quiet)
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda name: tiny_bpe)
    by_bpe = prepare(config, quiet)
    assert by_bpe.train.tokenizer_fingerprint == tiny_bpe.fingerprint
    assert by_bpe.train.num_tokens < by_bytes.train.num_tokens
    assert sides(by_bpe) == sides(by_bytes)


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


def test_a_missing_validation_file_is_found_before_anything_is_prepared(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.validation: "):
        prepare(replace(config, validation=str(tmp_path / "gone.txt")), quiet)
    assert not Path(config.cache_dir).exists()


def test_a_store_from_which_something_was_deleted_is_prepared_again(config: DataConfig) -> None:
    data = prepare(config, quiet)
    before = sides(data)
    (data.validation.path / "manifest.json").unlink()
    assert sides(prepare(config, quiet)) == before


KILLED = """
import os, signal, sys
from sophia_levanter.data import prepare as module
from sophia_levanter.data.config import DataConfig
def killing(*args, read=module.read_documents, **kwargs):
    for number, text in enumerate(read(*args, **kwargs)):
        if number == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        yield text
module.ENCODE_CHARACTERS = 100
module.read_documents = killing
module.prepare(DataConfig(train=sys.argv[1], validation_fraction=0.2, cache_dir=sys.argv[2]), print)
"""


def test_a_killed_preparation_is_done_anew(config: DataConfig, tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, config.train, config.cache_dir], check=False)
    assert killed.returncode == -9
    assert list(Path(config.cache_dir).iterdir())
    train, validation = sides(prepare(config, quiet))
    assert sorted(train + validation) == sorted(TEXTS)
    assert len(list(Path(config.cache_dir).iterdir())) == 1


def test_two_processes_at_once(config: DataConfig) -> None:
    program = """
import sys
from sophia_levanter.data.config import DataConfig
from sophia_levanter.data.prepare import prepare
data = prepare(DataConfig(train=sys.argv[1], validation_fraction=0.2, cache_dir=sys.argv[2]), lambda line: None)
print(data.train.num_documents + data.validation.num_documents)
"""
    command = [sys.executable, "-c", program, config.train, config.cache_dir]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == [b"60\n", b"60\n"]
    assert len(list(Path(config.cache_dir).iterdir())) == 1


def test_progress_is_reported(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(prepare_module, "ENCODE_CHARACTERS", 400)
    said: list[str] = []
    prepare(config, said.append)
    assert sum("so far" in line for line in said) > 1


def test_documents_are_read_as_they_are_written(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: no more than a group of documents is read before the first is written."""
    ahead = 0
    most = 0

    def reading(*args: object, **kwargs: object) -> Iterator[str]:
        nonlocal ahead, most
        for text in TEXTS:
            ahead += 1
            most = max(most, ahead)
            yield text

    class Writer(prepare_module.TokenStoreWriter):
        def append(self, *args, **kwargs) -> None:
            nonlocal ahead
            ahead -= 1
            super().append(*args, **kwargs)

    monkeypatch.setattr(prepare_module, "read_documents", reading)
    monkeypatch.setattr(prepare_module, "TokenStoreWriter", Writer)
    monkeypatch.setattr(prepare_module, "ENCODE_CHARACTERS", 100)
    prepare(config, quiet)
    assert most < 10
