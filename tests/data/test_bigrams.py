"""Bits per byte of a table of bigrams, to which a model's loss is compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from sophia_levanter.data import batches as batches_module
from sophia_levanter.data.batches import SMOOTHING, bigram_bits_per_byte
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.data.tokenizer import ByteTokenizer, Tokenizer

MakeStore = Callable[..., TokenStore]


TRAIN = ["the cat and the hat, an ant", "another naïve théorem", "the end"]
VALIDATION = "a then ant and â"
BYTES = ByteTokenizer()


def by_hand(train: list[str], predictions: list[tuple[int, int]]) -> float:
    """Bits per byte of the (previous, next) symbols, counted one by one."""
    symbols = [symbol for text in train for symbol in [*text.encode(), 256]]
    pairs = Counter(pairwise(symbols))
    previous_counts = Counter(symbols[:-1])
    bits = sum(-math.log2((pairs[a, b] + SMOOTHING) / (previous_counts[a] + 257 * SMOOTHING)) for a, b in predictions)
    return bits / sum(b != 256 for _, b in predictions)


def pairs_of(symbols: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(symbols))


def test_it_is_what_counting_by_hand_gives(make_store: MakeStore) -> None:
    tokens = np.array([*VALIDATION.encode(), 256])
    found = bigram_bits_per_byte(make_store(TRAIN), [tokens], BYTES)
    assert found == pytest.approx(by_hand(TRAIN, pairs_of(tokens.tolist())), rel=1e-12)


def test_it_does_not_depend_on_the_tokenizer(make_store: MakeStore, tiny_bpe: Tokenizer) -> None:
    def tokens(tokenizer: Tokenizer) -> np.ndarray:
        return np.append(tokenizer.encode(VALIDATION), tokenizer.end_of_text)

    assert len(tokens(tiny_bpe)) < len(tokens(BYTES))
    by_bytes = bigram_bits_per_byte(make_store(TRAIN), [tokens(BYTES)], BYTES)
    by_bpe = bigram_bits_per_byte(make_store(TRAIN, tiny_bpe), [tokens(tiny_bpe)], tiny_bpe)
    assert by_bpe == pytest.approx(by_bytes, rel=1e-12)


def test_the_first_token_of_each_array_is_context(make_store: MakeStore, tiny_bpe: Tokenizer) -> None:
    windows = [np.array([257, 32, 258]), np.array([300, 257])]  # "the| an" and "<end>|the"
    expected = by_hand(TRAIN, [*pairs_of([*b"e an"]), *pairs_of([256, *b"the"])])
    assert bigram_bits_per_byte(make_store(TRAIN, tiny_bpe), iter(windows), tiny_bpe) == pytest.approx(
        expected, rel=1e-12
    )


def test_a_first_token_without_bytes_is_no_context(make_store: MakeStore, tiny_bpe: Tokenizer) -> None:
    assert tiny_bpe.token_bytes[260] == b""
    windows = [np.array([260, 257, 32, 258]), np.array([260, 260])]  # "the an", and nothing
    expected = by_hand(TRAIN, pairs_of([*b"the an"]))
    assert bigram_bits_per_byte(make_store(TRAIN, tiny_bpe), windows, tiny_bpe) == pytest.approx(expected, rel=1e-12)


def test_reading_in_pieces_changes_nothing(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(TRAIN)
    tokens = np.array([*VALIDATION.encode(), 256])
    whole = bigram_bits_per_byte(store, [tokens], BYTES)
    monkeypatch.setattr(batches_module, "BIGRAM_TOKENS", 3)
    assert bigram_bits_per_byte(store, [tokens], BYTES) == whole


def test_no_more_than_the_limit_is_counted(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "BIGRAM_BYTES", len(TRAIN[0]) + 1)
    monkeypatch.setattr(batches_module, "BIGRAM_TOKENS", 10)
    tokens = np.array([*VALIDATION.encode()])
    assert bigram_bits_per_byte(make_store(TRAIN), [tokens], BYTES) == pytest.approx(
        by_hand(TRAIN[:1], pairs_of(tokens.tolist()))
    )


def test_no_text_to_predict(make_store: MakeStore) -> None:
    assert math.isnan(bigram_bits_per_byte(make_store(TRAIN), [np.array([97, 256])], BYTES))
    assert math.isnan(bigram_bits_per_byte(make_store(TRAIN), [], BYTES))
