"""The byte-bigram baseline: what counting pairs of bytes achieves, for a language model to beat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from sophia_levanter.data.token_store import Tokens
from sophia_levanter.data.tokenizer import Tokenizer, token_byte_lengths

NUM_SYMBOLS = 257  # the bytes and end-of-text
END_OF_TEXT = 256
SMOOTHING = 0.01  # added to each count, so that a pair that was never seen is possible
MAX_TRAIN_BYTES = 64 << 20
READ_TOKENS = 1 << 20


def bigram_bits_per_byte(train: Tokens, validation: np.ndarray | Iterable[np.ndarray], tokenizer: Tokenizer) -> float:
    """Bits that a byte-bigram model counted on `train` needs for a byte of validation text.

    As with a language model, the first token of each array is context only and the others are predicted. End-of-text
    costs bits and is no byte of text.

    Args:
        train: tokens to count on; the first 64 MiB of text are enough.
        validation: token ids, int [position], or several such arrays, each predicted on its own.
        tokenizer: that of both.

    Returns:
        Bits per byte, or nan if the predicted tokens hold no text.
    """
    symbols_of = _Symbols(tokenizer)
    bits = _bits(_count_pairs(_train_symbols(train, symbols_of)))
    total_bits, total_bytes = 0.0, 0
    for tokens in [validation] if isinstance(validation, np.ndarray) else validation:
        symbols = symbols_of(tokens)
        first = len(symbols_of(tokens[:1]))
        predicted = symbols[first:]
        total_bits += float(bits[symbols[first - 1 : -1], predicted].sum()) if predicted.size else 0.0
        total_bytes += int((predicted != END_OF_TEXT).sum())
    return total_bits / total_bytes if total_bytes else math.nan


class _Symbols:
    """Token ids to the bytes they stand for, and end-of-text to a symbol of its own: int64 [symbol]."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._lengths = token_byte_lengths(tokenizer).astype(np.int64)
        self._lengths[tokenizer.end_of_text] = 1
        self._offsets = np.cumsum(self._lengths) - self._lengths
        self._table = np.empty(self._lengths.sum(), np.int64)
        ordinary = np.delete(np.arange(len(self._table)), self._offsets[tokenizer.end_of_text])
        self._table[ordinary] = np.frombuffer(b"".join(tokenizer.token_bytes), np.uint8)
        self._table[self._offsets[tokenizer.end_of_text]] = END_OF_TEXT

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        lengths = self._lengths[tokens]
        ends = np.cumsum(lengths)
        # For each symbol its place in the table: its token's offset plus how far into the token it is.
        first_place = np.repeat(self._offsets[tokens] - (ends - lengths), lengths)
        return self._table[first_place + np.arange(len(first_place))]


def _train_symbols(train: Tokens, symbols_of: _Symbols) -> Iterator[np.ndarray]:
    left = MAX_TRAIN_BYTES
    for start in range(0, train.num_tokens, READ_TOKENS):
        symbols = symbols_of(train.read(start, min(start + READ_TOKENS, train.num_tokens)))[:left]
        left -= len(symbols)
        yield symbols
        if not left:
            return


def _count_pairs(pieces: Iterable[np.ndarray]) -> np.ndarray:
    counts = np.zeros(NUM_SYMBOLS**2, np.int64)
    last = np.empty(0, np.int64)
    for piece in pieces:
        symbols = np.concatenate([last, piece])
        counts += np.bincount(symbols[:-1] * NUM_SYMBOLS + symbols[1:], minlength=NUM_SYMBOLS**2)
        last = symbols[-1:]
    return counts.reshape(NUM_SYMBOLS, NUM_SYMBOLS)


def _bits(counts: np.ndarray) -> np.ndarray:
    """Bits for each next symbol after each previous one, float64 [previous, next]."""
    smoothed = counts + SMOOTHING
    return np.log2(smoothed.sum(axis=1, keepdims=True)) - np.log2(smoothed)
