from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import tokenizers

from sophia_levanter.data.bpe import first_bytes, save_bpe, train_bpe
from sophia_levanter.data.tokenizer import load_bpe, load_tokenizer
from sophia_levanter.errors import InputError

TEXTS = [path.read_text() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]]
TEXTS = [text for text in TEXTS if text.isascii()] + ["naïve café \U0001f600\x00"]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return train_bpe(TEXTS, 600)


def test_it_is_saved_and_loaded(ranks: dict[bytes, int], tmp_path: Path) -> None:
    path = tmp_path / "new" / "my.tiktoken"
    save_bpe(path, ranks)
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (600, 599)
    assert load_bpe(str(path))._mergeable_ranks == ranks
    for text in [*TEXTS, "<|endoftext|>"]:
        tokens = tokenizer.encode(text)
        assert tokens.max() < 599
        assert tokenizer.decode(tokens) == text
    assert len(tokenizer.encode(TEXTS[0])) < 0.6 * len(TEXTS[0])


def test_the_merges_are_those_of_tokenizers(ranks: dict[bytes, int], tmp_path: Path) -> None:
    save_bpe(tmp_path / "my.tiktoken", ranks)
    ours = load_tokenizer(str(tmp_path / "my.tiktoken"))
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(TEXTS, vocab_size=599, min_frequency=0)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text).ids


def test_a_text_with_few_pairs_gives_fewer_tokens() -> None:
    assert len(train_bpe(["abab"], 1000)) < 300


@pytest.mark.parametrize("size", [0, 257])
def test_a_vocabulary_that_is_too_small(size: int) -> None:
    with pytest.raises(InputError, match=r"--vocab_size is .*above 257"):
        train_bpe(["text"], size)


@pytest.mark.parametrize("content", ["", "not base64 at all", "YQ== 0\nYg== 5\n", "YQ== x\n", "YQ==\n"])
def test_files_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "my.tiktoken").write_text(content)
    with pytest.raises(InputError, match=r"^data\.tokenizer: .*my\.tiktoken is no file of tiktoken's") as info:
        load_tokenizer(str(tmp_path / "my.tiktoken"))
    assert "\n" not in str(info.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.tokenizer: .*my\.tiktoken: No such file"):
        load_tokenizer(str(tmp_path / "my.tiktoken"))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_bpe(tmp_path / "file" / "my.tiktoken", {b"a": 0})


def test_the_first_bytes() -> None:
    assert list(first_bytes(["éé", "b", "c"], 4)) == ["éé"]
    assert list(first_bytes(["éé", "b", "c"], 5)) == ["éé", "b"]
    assert list(first_bytes(["éé", "b", "c"], 100)) == ["éé", "b", "c"]
