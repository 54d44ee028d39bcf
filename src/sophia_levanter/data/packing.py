"""How documents fill sequences, and what `data.mask_documents` takes from attention there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """The documents of a token store in sequences of one length.

    Attributes:
        median_length: of the documents, in tokens, end-of-text included.
        longest: length of the longest document.
        documents_per_sequence: how many documents a sequence holds, wholly or in part, in the mean.
        share_of_one: the share of the sequences that hold one document only; a mask changes nothing in them.
        removed_share: of all pairs of a token and itself or an earlier one of its sequence, the share whose tokens are
            of different documents.
    """

    median_length: float
    longest: int
    documents_per_sequence: float
    share_of_one: float
    removed_share: float


def packing_of(document_ends: np.ndarray, seq_len: int) -> Packing:
    """How documents fill sequences that begin at the multiples of a length; the last sequence may be shorter.

    Args:
        document_ends: int64 [document], where each document ends, one token after its last; ascending, not empty.
        seq_len: tokens in a sequence.
    """
    lengths = np.diff(document_ends, prepend=0)
    num_tokens = int(document_ends[-1])
    sequence_starts = np.arange(0, num_tokens, seq_len)
    # Documents cut at the ends of sequences.
    borders = np.union1d(np.append(sequence_starts, num_tokens), document_ends)
    pieces = np.diff(borders)
    pieces_in_sequence = np.bincount(borders[:-1] // seq_len)
    all_pairs = _pairs(np.diff(np.append(sequence_starts, num_tokens)))
    return Packing(
        median_length=float(np.median(lengths)),
        longest=int(lengths.max()),
        documents_per_sequence=float(pieces_in_sequence.mean()),
        share_of_one=float((pieces_in_sequence == 1).mean()),
        removed_share=1 - _pairs(pieces) / all_pairs,
    )


def _pairs(lengths: np.ndarray) -> float:
    """Pairs of a token and itself or an earlier one, in stretches of these lengths."""
    return float((lengths * (lengths + 1) // 2).sum())
