"""How documents fill sequences, and how many attention pairs `data.mask_documents` removes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """The documents of a token store in sequences of one length.

    Attributes:
        median_length: median length of the documents in tokens, end-of-text included.
        longest: length of the longest document.
        documents_per_sequence: the mean number of documents in a sequence, whole or in part.
        share_of_one: the share of the sequences that hold a single document; masking does not change them.
        removed_share: the share of attention pairs (a token with itself or an earlier token of its sequence) whose
            tokens belong to different documents.
    """

    median_length: float
    longest: int
    documents_per_sequence: float
    share_of_one: float
    removed_share: float


def packing_of(document_ends: Iterable[np.ndarray], seq_len: int) -> Packing:
    """Measure how documents fill sequences that start at the multiples of `seq_len`; the last may be shorter.

    Args:
        document_ends: the index after the last token of each document, in parts: int64 [document], not empty, ascending
            from one part to the next, too. One part is held at a time.
        seq_len: tokens in a sequence.
    """
    counts: Counter[int] = Counter()  # of documents by their length; there are few lengths where documents are many
    last_divided = -1  # the latest sequence that a document begins inside
    num_tokens = inner_starts = divided = removed = 0
    for ends in document_ends:
        starts = np.append(num_tokens, ends[:-1])
        num_tokens = int(ends[-1])
        lengths, times = np.unique(ends - starts, return_counts=True)
        counts.update(dict(zip(lengths.tolist(), times.tolist(), strict=True)))
        # A document that begins inside a sequence does not see the tokens before it there. The further sequences that
        # it continues in begin with it.
        offsets = starts % seq_len
        removed += int((offsets * np.minimum(ends - starts, seq_len - offsets)).sum())
        sequences = starts[offsets > 0] // seq_len
        inner_starts += len(sequences)
        divided += int(np.count_nonzero(np.diff(sequences, prepend=last_divided)))
        last_divided = int(sequences[-1]) if len(sequences) else last_divided
    whole, rest = divmod(num_tokens, seq_len)
    num_sequences = whole + (rest > 0)
    return Packing(
        median_length=_median(counts),
        longest=max(counts),
        documents_per_sequence=1 + inner_starts / num_sequences,
        share_of_one=1 - divided / num_sequences,
        removed_share=removed / (whole * _pairs(seq_len) + _pairs(rest)),
    )


def _median(counts: Mapping[int, int]) -> float:
    """The median of numbers, given how often each occurs."""
    numbers = np.array(sorted(counts))
    up_to = np.cumsum([counts[number] for number in numbers.tolist()])
    middle = np.array([(up_to[-1] - 1) // 2, up_to[-1] // 2])
    return float(numbers[np.searchsorted(up_to, middle, side="right")].mean())


def _pairs(length: int) -> int:
    """The number of pairs of a token with itself or an earlier one, in a piece of this length."""
    return length * (length + 1) // 2
