"""The two sides of a text: what is held out, which settings make another store, mixtures."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sophia_levanter.config.data import DataConfig, MixturePart
from sophia_levanter.data import corpora, token_store
from sophia_levanter.data import preparation as preparation_module
from sophia_levanter.data.batches import Mixture
from sophia_levanter.data.corpora import masked_end, prepare, prepare_validation
from sophia_levanter.data.file_source import FileSource
from sophia_levanter.data.nanogpt import NanogptTokens
from sophia_levanter.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from sophia_levanter.errors import InputError
from tiny_runs import TEXTS, content, documents, json_lines, quiet, sides


def test_a_document_that_is_much_of_the_text_is_warned_of_where_it_is_held_out(tmp_path: Path) -> None:
    warned, held_out = [], []
    for long in range(8):
        texts = [f"text {i} " * (200 if i == long else 1) for i in range(8)]
        (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
        config = DataConfig(train=str(tmp_path / "a.jsonl"), validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))
        said: list[str] = []
        data = prepare(config, said.append)
        warned.append([line for line in said if "WARNING" in line])
        held_out.append(data.validation.num_tokens / (data.train.num_tokens + data.validation.num_tokens))
    for lines, share in zip(warned, held_out, strict=True):
        assert bool(lines) is (share > 0.4)
        assert all(f"{share:.1%} of {config.train} is held out for validation instead of 20.0%," in s for s in lines)
    assert {bool(lines) for lines in warned} == {True, False}


def test_three_novels_of_which_one_is_held_out_are_warned_of(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"the novel {name} " * 100)
    said: list[str] = []
    prepare(DataConfig(train=f"{tmp_path}/*.txt", cache_dir=str(tmp_path / "cache")), said.append)
    (warning,) = [line for line in said if "WARNING" in line]
    assert "33.3% of " in warning and "instead of 5.0%" in warning


def test_equal_documents_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["the same text"] * 3))
    config = DataConfig(train=str(tmp_path / "a.jsonl"), validation_fraction=0.25, cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # prepared, and found in the cache
        said: list[str] = []
        assert sides(prepare(config, said.append)) == (["the same t"], ["ext"])
        assert [line for line in said if "WARNING" in line] == [
            "WARNING: data.train: all 3 documents are identical; only one is kept, and its end is held out for "
            "validation; set data.validation to keep all of them"
        ]


def test_it_is_done_once_and_said(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = prepare(config, said.append)
    size = len("".join(TEXTS).encode())
    assert any(line.startswith(f"data.train: 60 documents, {size + 60:,} tokens (") for line in said)
    assert any(f" held out), {size / (size + 60):.2f} bytes per token" in line for line in said)
    monkeypatch.setattr(FileSource, "documents", None)
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
    monkeypatch.setattr(corpora, "load_tokenizer", lambda name: tiny_bpe)
    by_bpe = prepare(config, quiet)
    assert by_bpe.train.manifest.tokenizer_fingerprint == tiny_bpe.fingerprint
    assert by_bpe.train.num_tokens < by_bytes.train.num_tokens
    assert sides(by_bpe) == sides(by_bytes)


def test_a_missing_validation_file_is_found_before_anything_is_prepared(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.validation: "):
        prepare(replace(config, validation=str(tmp_path / "gone.txt")), quiet)
    assert not Path(config.cache_dir).exists()


def test_a_separator_ends_documents(config: DataConfig, tmp_path: Path) -> None:
    texts = ["<|endoftext|>".join(TEXTS[:20]), "<|endoftext|>".join(TEXTS[20:]) + "<|endoftext|>"]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    config = replace(config, train=str(tmp_path / "a.jsonl"), validation=config.train)
    said: list[str] = []
    warned: list[str] = []
    whole = prepare(config, quiet, warn=warned.append)
    assert [line.startswith("WARNING: data.train: the text contains special tokens") for line in warned] == [True]
    prepare(config, quiet, warn=warned.append)
    assert warned[:1] == warned[1:]  # also where it is prepared already
    split = prepare(replace(config, document_separator="<|endoftext|>"), said.append)
    assert documents(split.train, split.tokenizer) == TEXTS
    counts = ", split at 59 occurrences of '<|endoftext|>', pre"
    assert any(": 60 documents, " in line and counts in line for line in said)
    assert not any("special tokens" in line for line in said)
    assert any(line.startswith("WARNING: data.validation: data.document_separator") for line in said)
    assert split.train.path != whole.train.path
    assert prepare(config, quiet).train.path == whole.train.path


def test_settings_that_do_not_matter_leave_the_identity_as_it_is(config: DataConfig) -> None:
    """Stores of earlier versions are found."""
    file = Path(config.train)
    identity = [
        token_store.FORMAT_VERSION,
        [2, config.train, [[config.train, file.stat().st_size, file.stat().st_mtime_ns]], "text", "error"],
        ByteTokenizer().fingerprint,
        0.2,
    ]
    name = token_store.digest_of(json.dumps(identity).encode())
    assert prepare(config, quiet).train.path.parent.name == name


def test_a_separator_and_token_files(config: DataConfig, tmp_path: Path) -> None:
    np.arange(200, dtype=np.uint16).tofile(tmp_path / "t.bin")
    tokens = f"nanogpt:{tmp_path}/t.bin"
    config = replace(config, document_separator="<|endoftext|>")
    with pytest.raises(
        InputError, match=r"^data.document_separator is .*every source is a token file.*remove the setting"
    ):
        prepare(replace(config, train=tokens, validation=tokens), quiet)
    said: list[str] = []
    prepare(replace(config, validation=tokens), said.append)
    assert f"data.document_separator does not apply to {tokens}, which contains tokens" in said
    store = prepare(replace(config, validation=config.train), quiet).train.path
    prepare(replace(config, train=f"store:{store}", validation=f"store:{store}"), said.append)
    assert f"data.document_separator does not apply to store:{store}, which contains tokens" in said


@pytest.mark.parametrize(
    ("field", "name", "text"),
    [
        ("train", "a.txt", b""),
        ("train", "a.txt.gz", b""),
        ("validation", "a.txt", b" \n\t"),
        ("validation", "a.jsonl", b'\n{"text": " "}\n'),
    ],
)
def test_a_source_without_text(config: DataConfig, tmp_path: Path, field: str, name: str, text: bytes) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=rf"^data\.{field}: .*{name}.* contains no documents with text"):
        prepare(replace(config, **{field: str(tmp_path / name)}), quiet)


def test_a_mixture(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("another text")
    parts = (MixturePart(config.train, 3.0), MixturePart(str(tmp_path / "other.txt")))
    data = prepare(replace(config, train=parts, validation=str(tmp_path / "other.txt")), quiet)
    whole = data.train.read(0, data.train.num_tokens)
    assert data.tokenizer.decode(whole) == "".join(TEXTS) + "another text"
    assert [part["weight"] for part in data.train.facts["mixture"]] == [3.0, 1.0]
    assert data.tokenizer.decode(data.validation.read(0, data.validation.num_tokens)) == "another text"


def test_stores_that_were_prepared(config: DataConfig, tiny_bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare(config, quiet)
    folder = made.train.path.parent
    Path(config.train).unlink()
    used = prepare(replace(config, train=f"store:{folder}/"), quiet)
    assert sides(used) == sides(made)
    apart = replace(config, train=f"store:{folder}/train", validation=f"store:{folder}/validation")
    assert sides(prepare(apart, quiet)) == sides(made)
    with pytest.raises(
        InputError, match=r"^data\.train: .*no finished token store.*without data.validation, store:FOLDER"
    ):
        prepare(replace(config, train=f"store:{folder}/train"), quiet)
    monkeypatch.setattr(corpora, "load_tokenizer", lambda name: tiny_bpe)
    with pytest.raises(InputError, match=r"^data\.train: .*written with the tokenizer bytes \(.*\), not with tiny \("):
        prepare(apart, quiet)


def test_processes_make_the_same_store(config: DataConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = prepare(replace(config, num_workers=0), quiet)
    monkeypatch.setattr(ByteTokenizer, "is_slow", True)
    monkeypatch.setattr(preparation_module, "BLOCK_CHARACTERS", 100)
    there = prepare(replace(config, num_workers=2, cache_dir=str(tmp_path / "other")), quiet)
    assert content(there.train.path.parent) == content(here.train.path.parent)
    # A trial in a pool of processes is one that may start none of its own.
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    alone = prepare(replace(config, num_workers=2, cache_dir=str(tmp_path / "alone")), quiet)
    assert content(alone.train.path.parent) == content(here.train.path.parent)


def test_only_the_validation_text_is_looked_at_where_it_has_one_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "validation.txt").write_text("held out")
    config = DataConfig(
        train=str(tmp_path / "nowhere.txt"), validation=str(tmp_path / "validation.txt"), cache_dir=str(tmp_path / "c")
    )
    sets = prepare_validation(config, load_tokenizer("bytes"), print)
    assert list(sets) == [""] and bytes(sets[""].read(0, 8).tolist()) == b"held out"
    with pytest.raises(InputError, match="nowhere"):
        prepare(config, print)


def test_named_validation_sets_have_stores_of_their_own(tmp_path: Path) -> None:
    for name in ("train", "books", "code"):
        (tmp_path / f"{name}.txt").write_text(f"the {name}")
    sets = {name: str(tmp_path / f"{name}.txt") for name in ("code", "books")}
    config = DataConfig(train=str(tmp_path / "train.txt"), validation=sets, cache_dir=str(tmp_path / "c"))
    said: list[str] = []
    data = prepare(config, said.append)
    texts = {name: data.tokenizer.decode(one.read(0, one.num_tokens - 1)) for name, one in data.validation_sets.items()}
    assert texts == {"code": "the code", "books": "the books"} and list(texts) == ["code", "books"]
    assert any(line.startswith("data.validation.books: ") for line in said)
    assert data.validation_facts == {
        "tokenizer": data.tokenizer.fingerprint,
        # Whatever the order in which they are named: it is the same text.
        "sets": [{"name": name, **data.validation_sets[name].facts} for name in ("books", "code")],
    }
    again = prepare_validation(config, data.tokenizer, print)
    assert {name: tokens.facts for name, tokens in again.items()} == {
        name: tokens.facts for name, tokens in data.validation_sets.items()
    }
    # A set that is missing is named before the training text is read.
    said.clear()
    with pytest.raises(InputError, match=r"^data\.validation\.laws: .*laws\.txt"):
        prepare(replace(config, validation=sets | {"laws": str(tmp_path / "laws.txt")}), said.append)
    assert not said


def test_the_validation_side_of_one_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"line {i}" for i in range(100)))
    config = DataConfig(train=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "c"))
    sides = prepare_validation(config, load_tokenizer("bytes"), print)
    assert sides[""].facts == prepare(config, print).validation.facts


@pytest.mark.parametrize("again", ["train.jsonl", "**/*.jsonl", "link.jsonl"])
def test_a_file_in_two_parts_of_a_mixture_is_said(config: DataConfig, tmp_path: Path, again: str) -> None:
    (tmp_path / "validation.txt").write_text("held out")
    if again == "link.jsonl":
        (tmp_path / "link.jsonl").symlink_to("train.jsonl")
    parts = (MixturePart(config.train), MixturePart(f"{tmp_path}/{again}"))
    said: list[str] = []
    mixture = replace(config, train=parts, validation=str(tmp_path / "validation.txt"), cache_dir=f"{tmp_path}/.cache")
    prepare(mixture, said.append)
    (line,) = [line for line in said if line.startswith("WARNING: data.train: ")]
    assert f"parts of the mixture share 1 file, such as {config.train} in {config.train} and " in line
    warned: list[str] = []
    prepare(mixture, quiet, warn=warned.append)
    assert warned[0] == line


def test_token_files_in_two_parts_of_a_mixture_are_said(config: DataConfig, tmp_path: Path) -> None:
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "a.bin")
    (tmp_path / "b.bin").symlink_to("a.bin")
    parts = tuple(MixturePart(f"nanogpt:{tmp_path}/{name}.bin") for name in "ab")
    said: list[str] = []
    prepare(replace(config, train=parts, validation=config.train), said.append)
    assert [line for line in said if "parts of the mixture share 1 file" in line]


def test_masked_documents_need_an_end_of_text_in_every_part(make_store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(corpora, "READ_TOKENS", 2)  # the end of the first document is not in the first piece
    tokenizer, on = ByteTokenizer(), DataConfig(mask_documents=True)
    np.arange(200, dtype=np.uint16).tofile(tmp_path / "bare.bin")
    bare = NanogptTokens(f"nanogpt:{tmp_path}/bare.bin", tokenizer, field="data.train")
    store = make_store(["a document", "another one"])
    assert masked_end(DataConfig(), tokenizer, "data.train", bare) is None
    assert masked_end(on, tokenizer, "data.train", store) == 256
    expected = r"^data.mask_documents is true, but part 1 of data.train has no end-of-text token \(id 256 in bytes\)"
    with pytest.raises(InputError, match=expected):
        masked_end(on, tokenizer, "data.train", Mixture([store, bare], [1, 1]))
