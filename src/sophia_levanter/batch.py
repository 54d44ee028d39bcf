"""The batch: `data` makes it, `models` and `training` read it."""

from __future__ import annotations

import equinox as eqx
import haliax as hax
import jax
import numpy as np
from haliax import NamedArray

import sophia_levanter.jax_compatibility  # noqa: F401


class Batch(eqx.Module):
    """Sequences of text for next-token prediction; there may be leading axes, such as `microbatch`.

    Attributes:
        tokens: int32 [batch, position], what the model reads.
        targets: int32 [batch, position], the token after each.
        weights: float32 [batch, position], of each target in the mean loss; 0 leaves it out.
        document_starts: int32 [batch, position], the index in the row at which each token's document starts; attention
            and position indices do not reach before it. None if they reach back to the start of the row.
    """

    tokens: NamedArray
    targets: NamedArray
    weights: NamedArray
    document_starts: NamedArray | None = None


def batch_from_sequences(
    sequences: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    num_microbatches: int = 1,
    document_end: int | None = None,
) -> Batch:
    """Make a host-side batch [microbatch, batch, position] from sequences of `position + 1` tokens.

    Microbatch i holds the i-th block of consecutive rows, whichever devices compute it.

    Args:
        sequences: int32 [rows, position + 1]; rows are a multiple of `num_microbatches`.
        weights: float32 [rows, position]; 1 each if not given.
        num_microbatches: the number of blocks that the rows are divided into.
        document_end: the token that ends a document, for `Batch.document_starts`; None leaves them out.
    """
    if weights is None:
        weights = np.ones((sequences.shape[0], sequences.shape[1] - 1), np.float32)
    axes = hax.make_axes(
        microbatch=num_microbatches, batch=sequences.shape[0] // num_microbatches, position=sequences.shape[1] - 1
    )
    shape = tuple(axis.size for axis in axes)

    def named(array: np.ndarray) -> NamedArray:
        return NamedArray(np.ascontiguousarray(array).reshape(shape), axes)

    starts = None if document_end is None else named(document_starts(sequences[:, :-1], document_end))
    return Batch(named(sequences[:, :-1]), named(sequences[:, 1:]), named(weights), starts)


def document_starts(tokens: np.ndarray, document_end: int) -> np.ndarray:
    """The index in its row at which each token's document starts: int32 [row, position].

    The token that ends a document belongs to it. The first document of each row starts at 0.

    Args:
        tokens: int [row, position].
        document_end: the token that ends a document.
    """
    starts = np.zeros(tokens.shape, np.int32)
    starts[:, 1:] = np.where(tokens[:, :-1] == document_end, np.arange(1, tokens.shape[1], dtype=np.int32), 0)
    return np.maximum.accumulate(starts, axis=1)


def count_targets(batch: Batch) -> jax.Array:
    """The sum of the weights: the number of positions in the mean loss."""
    return batch.weights.array.sum()
