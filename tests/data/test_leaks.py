"""Documents that are in both the training and the validation text."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sophia_levanter.config.data import DataConfig, MixturePart
from sophia_levanter.data import corpora
from sophia_levanter.data.batches import Mixture
from sophia_levanter.data.corpora import Leak, find_leak, prepare
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.data.tokenizer import ByteTokenizer, Tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.main import main
from sophia_levanter.run.run import Run
from tiny_runs import json_lines

TRAIN = [f"document number {i} for training" for i in range(20)]
VALIDATION = [f"document number {i} for validation" for i in range(10)]


def write(path: Path, texts: list[str]) -> Path:
    path.write_bytes(json_lines(texts))
    return path


@pytest.fixture
def leaky(tmp_path: Path) -> DataConfig:
    """Texts of which the fourth for validation is the eighth for training."""
    train = write(tmp_path / "train.jsonl", TRAIN)
    validation = write(tmp_path / "validation.jsonl", [*VALIDATION[:3], "", TRAIN[7], *VALIDATION[3:], TRAIN[2]])
    return DataConfig(train=str(train), validation=str(validation), cache_dir=str(tmp_path / ".cache"))


def warnings(leaky: DataConfig) -> list[str]:
    said: list[str] = []
    prepare(leaky, said.append)
    assert not [line for line in said if "\n" in line]
    return [line for line in said if line.startswith("WARNING")]


def test_documents_on_both_sides_are_counted_and_the_first_is_named(leaky: DataConfig) -> None:
    (line,) = warnings(leaky)
    assert line == (
        f"WARNING: data.validation: 2 of its 12 documents are also in data.train; the first is {leaky.validation}, "
        f"document 5 (document 8 of {leaky.train}), which begins with 'document number '; "
        "remove them from one of the two sets"
    )
    assert warnings(leaky) == [line]  # at a later start too


def test_none_are_found_where_there_are_none(leaky: DataConfig, tmp_path: Path) -> None:
    assert warnings(replace(leaky, validation=str(write(tmp_path / "other.jsonl", VALIDATION)))) == []


def test_a_part_that_is_held_out_is_not_checked(leaky: DataConfig, tmp_path: Path) -> None:
    """Equal texts are on one side; of a lone document that is cut in two both may be equal."""
    one = write(tmp_path / "one.jsonl", ["the same half. " * 2])
    assert warnings(replace(leaky, train=str(one), validation=None, validation_fraction=0.5)) == []


def test_two_stores_in_a_folder_are_checked(leaky: DataConfig, tmp_path: Path) -> None:
    data = prepare(leaky, print)
    for side, corpus in (("train", data.train), ("validation", data.validation)):
        shutil.copytree(corpus.path, tmp_path / "stores" / side)
    (line,) = warnings(replace(leaky, train=f"store:{tmp_path}/stores", validation=None))
    assert "data.validation: 2 of its 12 documents" in line


def test_each_of_several_validation_sets_is_checked(leaky: DataConfig, tmp_path: Path) -> None:
    clean, leaked = write(tmp_path / "clean.jsonl", VALIDATION), write(tmp_path / "leaked.jsonl", TRAIN[3:5])
    sets = {"leaky": str(leaky.validation), "clean": str(clean), "leaked": str(leaked)}
    lines = warnings(replace(leaky, validation=sets))
    assert [line.partition("; the first")[0] for line in lines] == [
        "WARNING: data.validation.leaky: 2 of its 12 documents are also in data.train",
        "WARNING: data.validation.leaked: 2 of its 2 documents are also in data.train",
    ]
    assert f"the first is {leaked}, document 1 (document 4 of {leaky.train})" in lines[1]
    with pytest.raises(InputError, match=r"^data\.validation\.leaked: 2 of its 2"):
        prepare(replace(leaky, validation={"clean": str(clean), "leaked": str(leaked)}, on_leak="error"), print)


def test_they_may_be_an_error(leaky: DataConfig) -> None:
    with pytest.raises(InputError, match=r"^data\.validation: 2 of its 12 .*, or set data\.on_leak to warn$"):
        prepare(replace(leaky, on_leak="error"), print)
    with pytest.raises(InputError, match=r"^data\.on_leak is 'ignore'; it must be warn or error"):
        replace(leaky, on_leak="ignore")


def test_a_leak_into_a_mixture(leaky: DataConfig, tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", ["document of another kind", "and a second one"])
    train = (MixturePart(str(first)), MixturePart(str(leaky.train), 2.0))
    (line,) = warnings(replace(leaky, train=train))
    assert f"document 5 (document 8 of {leaky.train})" in line


@pytest.mark.parametrize("kind", ["text", "short text", "gzip", "nanogpt", "store"])
def test_the_very_same_file_is_always_found(leaky: DataConfig, tmp_path: Path, kind: str) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    same = write(texts / "a.jsonl", TRAIN)
    again: object = same
    if "text" in kind:
        same = again = texts / "a.txt"
        same.write_text("short" if kind == "short text" else "all of this is one document")
    elif kind == "gzip":
        again = tmp_path / "a.jsonl.gz"
        again.write_bytes(gzip.compress(same.read_bytes()))
    elif kind == "nanogpt":
        (texts / "a.bin").write_bytes(np.frombuffer(b"no end of text", np.uint8).astype(np.uint16).tobytes())
        same = again = f"nanogpt:{texts}/a.bin"
    else:
        same = again = f"store:{prepare(replace(leaky, train=str(same)), print).train.path}"
    with pytest.raises(InputError, match=r"^data\.validation: (\d+) of its \1 documents are also in data\.train"):
        prepare(replace(leaky, train=str(same), validation=str(again), on_leak="error"), print)


def test_tokens_and_texts(leaky: DataConfig, tmp_path: Path) -> None:
    tokens = [token for text in (*VALIDATION, TRAIN[4], "end") for token in (256, *text.encode())]
    np.array(tokens, np.uint16).tofile(tmp_path / "validation.bin")
    (line,) = warnings(replace(leaky, validation=f"nanogpt:{tmp_path}/validation.bin"))
    assert "1 of its 12 documents are also in data.train" in line
    assert f"the first is document 11 of nanogpt:{tmp_path}/validation.bin (document 5 of {leaky.train})" in line


@pytest.mark.parametrize("read_tokens", [3, 20, 1 << 22])
def test_short_documents_count_only_where_all_are_the_same(
    make_store: Callable[..., TokenStore], tiny_bpe: Tokenizer, tmp_path: Path, monkeypatch, read_tokens: int
) -> None:
    monkeypatch.setattr(corpora, "READ_TOKENS", read_tokens)
    train = make_store(["\n", "the the the", "yes", "an answer of some length", "yes"], tiny_bpe)
    for texts, count in (
        (["yes", "something else that is long"], 0),
        (["yes", "\n"], 2),
        (["an answer of some length", "the the the", "no", "yes"], 2),  # tokens are fewer than bytes
    ):
        leak = find_leak(train, make_store(texts, tiny_bpe), tiny_bpe, tmp_path, print)
        assert (leak.count, leak.num_documents) == (count, len(texts))
    assert leak.document == 0 and leak.twin == 3


@pytest.mark.parametrize("read_tokens", [7, 64, 1 << 22])
def test_blocks_do_not_matter(
    make_store: Callable[..., TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_tokens: int
) -> None:
    monkeypatch.setattr(corpora, "READ_TOKENS", read_tokens)
    train = Mixture([make_store(TRAIN[:9]), make_store([*TRAIN[9:], TRAIN[9]])], [1.0, 1.0])
    validation = make_store([*VALIDATION, TRAIN[13], TRAIN[9], TRAIN[13], TRAIN[1]])
    found = find_leak(train, validation, ByteTokenizer(), tmp_path, print)
    begin = sum(len(text) + 1 for text in VALIDATION)
    assert found == Leak(4, 14, document=10, tokens=[begin, begin + len(TRAIN[13])], part=1, twin=4)


def test_large_corpora_are_compared_once(leaky: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "REMEMBERED_TOKENS", 0)
    said: list[str] = []
    prepare(leaky, said.append)
    first = said[-1:]
    num_tokens = sum(len(text) + 1 for text in [*TRAIN, *VALIDATION, TRAIN[7], TRAIN[2]])
    begin = f"data.validation: checking {num_tokens:,} tokens for documents that are also in data.train"
    assert said.index(begin) == len(said) - 2
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "_compare", None)
        said.clear()
        prepare(leaky, said.append)
        assert said[-1:] == first and begin not in said
    write(Path(str(leaky.validation)), [*VALIDATION, TRAIN[0]])
    assert "1 of its 11 documents" in warnings(leaky)[0]


def test_a_run_warns_or_does_not_begin(
    config_file: Path, text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(self: Run) -> None:
        raise InputError("it begins")

    monkeypatch.setattr(Run, "start", begin)
    command = ["--config", str(config_file), "--data.validation", str(text_file), "--quiet"]
    command += ["--trainer.run_dir", str(tmp_path / "run")]
    assert main([*command, "--data.on_leak", "error"]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith("error: data.validation: 1 of its 1 documents are also in data.train")
    assert not (tmp_path / "run").exists()
    assert main(command) == 2
    shown = capfd.readouterr()
    assert shown.err == "error: it begins\n"
    assert "WARNING: data.validation: 1 of its 1 documents are also in data.train" in shown.out
