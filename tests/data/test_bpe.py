"""Byte-pair encodings are saved, and give the same ids in `tokenizers`, with which transformers reads them."""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from tiktoken_ext.openai_public import r50k_pat_str

from sophia_levanter.data.bpe import (
    first_bytes,
    merges_of,
    ranks_of,
    save_bpe,
    tokenizer_config_json,
    tokenizer_json,
    train_bpe,
)
from sophia_levanter.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_bpe,
    load_tokenizer,
)
from sophia_levanter.errors import InputError

SPACES = ["  ", " ", "\n", "\t", "\r\n", "\u00a0"]
PIECES = [*SPACES, "a", "bc", "the", "'s", "'LL", "ſ", "12345", "²", "Ⅷ", "é", "中", "==", "🐍"]
RANDOM = random.Random(0)
SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
TEXTS = [
    *(path.read_text(errors="replace")[:20_000] for path in SOURCES),
    "I don't, WE'LL; it'S 1234567 or 12 x1234 — naïve €5, 中文字符 العربية हिन्दी 🐍👩‍👩‍👧\x00",
    "a  \n\n  b   \t\n c\r\n\r\n  ",
    "".join(map(chr, [*range(0x3000), 0x10400, 0x1F600])),
    *("".join(RANDOM.choices(PIECES, k=60)) for _ in range(100)),
    "",
]
# Of cl100k_base and o200k_base.
CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
    r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
O200K = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)


def in_tokenizers(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))


def assert_same_ids(tokenizer: Tokenizer) -> None:
    theirs = in_tokenizers(tokenizer)
    for text in TEXTS:
        ids = theirs.encode(text).ids
        assert ids == tokenizer.encode(text).tolist(), text[:80]
        assert theirs.decode(ids) == text


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return train_bpe(TEXTS, 1500)


def encoding(ranks: dict[bytes, int], pattern: str, **special: int) -> Tokenizer:
    tokens = {END_OF_TEXT: len(ranks)} | special
    return TiktokenTokenizer(tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=tokens))


@pytest.mark.parametrize("pattern", [r50k_pat_str, CL100K, O200K], ids=["r50k", "cl100k", "o200k"])
def test_ids_of_a_byte_pair_encoding(pattern: str, ranks: dict[bytes, int]) -> None:
    assert_same_ids(encoding(ranks, pattern))


def test_ids_of_bytes() -> None:
    assert_same_ids(ByteTokenizer())


def test_ids_of_gpt2() -> None:
    try:
        tokenizer = load_tokenizer("gpt2")
    except InputError:
        pytest.skip("tiktoken's gpt2 is neither cached nor downloadable")
    assert len(tokenizer_json(tokenizer)["model"]["merges"]) == 50_000
    assert_same_ids(tokenizer)


def test_the_merges_are_those_that_were_learnt(ranks: dict[bytes, int]) -> None:
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=1499, min_frequency=0)
    learnt = json.loads(trained.to_str())["model"]["merges"]
    assert tokenizer_json(encoding(ranks, r50k_pat_str))["model"]["merges"] == learnt


def test_a_token_that_no_merges_make_is_found_as_a_whole_word() -> None:
    ranks = {bytes([value]): value for value in range(256)} | {b"the": 256}
    assert merges_of(ranks) == []
    tokenizer = encoding(ranks, r50k_pat_str)
    for text in ("the", "then", "the the"):
        assert in_tokenizers(tokenizer).encode(text).ids == tokenizer.encode(text).tolist()
    assert tokenizer.encode("the").tolist() == [256]


def test_special_tokens_and_unused_ids() -> None:
    ranks = {bytes([value]): value for value in range(256)}
    tokenizer = encoding(ranks, CL100K, **{"<|endofprompt|>": 300})
    theirs = in_tokenizers(tokenizer)
    assert tokenizer.special_tokens == {END_OF_TEXT: 256, "<|endofprompt|>": 300}
    assert theirs.encode("a<|endofprompt|><|endoftext|>").ids == [97, 300, 256]
    assert theirs.decode([97, 256, 98]) == "ab"
    assert ranks_of(tokenizer) == ranks


def test_the_longest_context() -> None:
    assert tokenizer_config_json(64)["model_max_length"] == 64


def test_it_is_saved_and_loaded(ranks: dict[bytes, int], tmp_path: Path) -> None:
    path = tmp_path / "new" / "my.tiktoken"
    save_bpe(path, ranks)
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (1500, 1499)
    assert load_bpe(str(path))._mergeable_ranks == ranks
    for text in [*filter(None, TEXTS), "<|endoftext|>"]:
        tokens = tokenizer.encode(text)
        assert tokens.max() < 1499
        assert tokenizer.decode(tokens) == text
    assert len(tokenizer.encode(TEXTS[0])) < 0.6 * len(TEXTS[0])


def test_a_text_with_few_pairs_gives_fewer_tokens() -> None:
    assert len(train_bpe(["abab"], 1000)) < 300


@pytest.mark.parametrize("size", [0, 257])
def test_a_vocabulary_that_is_too_small(size: int) -> None:
    with pytest.raises(InputError, match=r"--vocab_size is .*greater than 257"):
        train_bpe(["text"], size)


@pytest.mark.parametrize("content", ["", "not base64 at all", "YQ== 0\nYg== 5\n"])
def test_files_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "my.tiktoken").write_text(content)
    with pytest.raises(InputError, match=r"^data\.tokenizer: .*my\.tiktoken is not in tiktoken's format") as info:
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
