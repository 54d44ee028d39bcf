"""Statistics on how documents fill sequences, and on the attention pairs that `data.mask_documents` removes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Statistics on the documents in a token store, and on how they fill sequences of a fixed length.

    Lengths are in tokens and include end-of-text. An attention pair is a token paired with itself or with an earlier
    token in its sequence.
    """

    median_length: float
    longest: int
    documents_per_sequence: float  # the mean number of whole or partial documents
    share_of_one: float  # the fraction of sequences that contain a single document, so that masking changes nothing
    removed_share: float  # the fraction of attention pairs whose tokens belong to different documents


def packing_of(document_ends: Iterable[np.ndarray], seq_len: int) -> Packing:
    """Compute `Packing` for sequences that start at multiples of `seq_len`. The last sequence may be shorter.

    Args:
        document_ends: the index after the last token of each document, as non-empty int64 [document] arrays, which are
            held in memory one at a time. Indices ascend within and across arrays.
        seq_len: the number of tokens in a sequence.
    """
    counts: Counter[int] = Counter()  # the number of documents of each length; there are few distinct lengths
    last_divided = -1  # the last sequence in which a document begins after the first token
    num_tokens = inner_starts = divided = removed = 0
    for ends in document_ends:
        starts = np.append(num_tokens, ends[:-1])
        num_tokens = int(ends[-1])
        lengths, times = np.unique(ends - starts, return_counts=True)
        counts.update(dict(zip(lengths.tolist(), times.tolist(), strict=True)))
        # A document that begins inside a sequence does not attend to the earlier tokens in that sequence. If it
        # continues in later sequences, it comes first in them.
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
    """Return the median of the numbers in `counts`, given how often each number occurs."""
    numbers = np.array(sorted(counts))
    up_to = np.cumsum([counts[number] for number in numbers.tolist()])
    middle = np.array([(up_to[-1] - 1) // 2, up_to[-1] // 2])
    return float(numbers[np.searchsorted(up_to, middle, side="right")].mean())


def _pairs(length: int) -> int:
    """Return the number of pairs of a token with itself or an earlier token, among `length` tokens."""
    return length * (length + 1) // 2
