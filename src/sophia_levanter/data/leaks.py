"""Documents that are both trained on and validated with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sophia_levanter.data.blocks import store_dtype
from sophia_levanter.data.cache import remembered
from sophia_levanter.data.mixture import Part, parts_of
from sophia_levanter.data.token_store import READ_TOKENS, Tokens
from sophia_levanter.data.tokenizer import Tokenizer, token_byte_lengths

MIN_BYTES = 10  # shorter documents may well be there twice, unless all are
REMEMBERED_TOKENS = 1 << 24  # of smaller corpora all is compared at each start
DIGEST_BYTES = 8
VERSION = 1  # of what is compared, and how


@dataclass(frozen=True)
class Leak:
    """What two corpora have in common.

    Attributes:
        count: documents for validation that are for training too; where there are none, only `num_documents` counts.
        num_documents: all that are for validation.
        document: number of the first of them, from 0.
        tokens: where it begins and ends in the corpus for validation.
        part: number of the part of the mixture that it is in for training.
        twin: its number there.
    """

    count: int
    num_documents: int
    document: int = 0
    tokens: tuple[int, int] = (0, 0)
    part: int = 0
    twin: int = 0


def find_leak(
    train: Tokens, validation: Tokens, tokenizer: Tokenizer, cache_dir: Path, report: Callable[[str], None]
) -> Leak:
    """The documents that two corpora have in common, token for token.

    A document is what stands before an end-of-text, and what comes after the last one. Those of fewer than `MIN_BYTES`
    bytes count only where all documents for validation are for training too. In memory are a few numbers for each
    document for validation, and none for those for training.

    Args:
        train: the tokens to train on.
        validation: the tokens to validate with.
        tokenizer: that of both.
        cache_dir: directory that caches the result for large corpora.
        report: takes a line when a check of large corpora begins.
    """
    num_tokens = train.num_tokens + validation.num_tokens
    is_large = num_tokens >= REMEMBERED_TOKENS

    def compare() -> dict[str, Any]:
        if is_large:
            report(f"data.validation: checking {num_tokens:,} tokens for documents that are also in data.train")
        return _compare(train, validation, tokenizer)

    key = ["leak", VERSION, train.facts, validation.facts]
    found = remembered(cache_dir if is_large else None, key, compare)
    return Leak(**found)


def _compare(train: Tokens, validation: Tokens, tokenizer: Tokenizer) -> dict[str, Any]:
    blocks = [block for part in parts_of(validation) for block in _documents(validation, part, tokenizer)]
    digests, begins, ends = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    if not len(digests):
        return {"count": 0, "num_documents": 0}
    wanted, place = np.unique(digests, return_inverse=True)
    parts, twins = np.full(len(wanted), -1), np.full(len(wanted), -1)
    for number, part in enumerate(parts_of(train)):
        count = 0
        for found, _, _ in _documents(train, part, tokenizer):
            at = np.searchsorted(wanted, found)
            at[at == len(wanted)] = 0
            # Of those that are there several times the first one is written last, and stays.
            new = np.flatnonzero((wanted[at] == found) & (parts[at] < 0))[::-1]
            parts[at[new]], twins[at[new]] = number, count + new
            count += len(found)
    leaked = parts[place] >= 0
    if not leaked.all():
        sizes = token_byte_lengths(tokenizer)
        for i in np.flatnonzero(leaked & (ends - begins < MIN_BYTES)).tolist():
            leaked[i] = sizes[validation.read(begins[i], ends[i])].sum() >= MIN_BYTES
    first = int(np.argmax(leaked))
    return {
        "count": int(leaked.sum()),
        "num_documents": len(leaked),
        "document": first,
        "tokens": [int(begins[first]), int(ends[first])],
        "part": int(parts[place[first]]),
        "twin": int(twins[place[first]]),
    }


def _documents(corpus: Tokens, part: Part, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields, block by block, the digest, start and end of each non-empty document."""
    dtype = store_dtype(tokenizer).newbyteorder("<")
    last = part.first + part.num_tokens
    begin, digest = part.first, _new_digest()
    for start in range(part.first, last, READ_TOKENS):
        stop = min(start + READ_TOKENS, last)
        tokens = corpus.read(start, stop).astype(dtype)
        text = tokens.view(np.uint8).data
        ends = (start + np.flatnonzero(tokens == tokenizer.end_of_text)).tolist()
        if stop == last:
            ends.append(last)
        found, read = [], start
        for end in ends:
            digest.update(text[(read - start) * dtype.itemsize : (end - start) * dtype.itemsize])
            if end > begin:
                found.append((int.from_bytes(digest.digest(), "little"), begin, end))
            begin = read = end + 1
            digest = _new_digest()
        digest.update(text[max(read - start, 0) * dtype.itemsize :])
        columns = zip(*found, strict=True) if found else ([], [], [])
        yield tuple(
            np.array(column, kind) for column, kind in zip(columns, (np.uint64, np.int64, np.int64), strict=True)
        )


def _new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=DIGEST_BYTES)
