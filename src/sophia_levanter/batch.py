"""The training batch, which `data` builds and `models` and `training` read."""

from __future__ import annotations

import equinox as eqx
import haliax as hax
import jax
import numpy as np
from haliax import NamedArray

import sophia_levanter.jax_compatibility  # noqa: F401


class Batch(eqx.Module):
    """A batch of sequences for next-token prediction. It may have leading axes, such as `microbatch`.

    Attributes:
        tokens: int32 [batch, position], the model's input.
        targets: int32 [batch, position], the token that follows each input token.
        weights: float32 [batch, position], the weight of each target in the mean loss; 0 excludes the target.
        document_starts: int32 [batch, position], the index in the row at which each token's document starts. Attention
            and position indices do not reach back before it. If None, they reach back to the start of the row.
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
    """Build a host-side batch [microbatch, batch, position] from sequences of `position + 1` tokens.

    Microbatch i holds the i-th block of consecutive rows, regardless of which devices compute it.

    Args:
        sequences: int32 [rows, position + 1]; the number of rows is a multiple of `num_microbatches`.
        weights: float32 [rows, position]; all ones by default.
        num_microbatches: the number of blocks that the rows are divided into.
        document_end: the token that ends a document, used to set `Batch.document_starts`; if None, that field is None.
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
    """The position in the row at which each token's document starts: int32 [row, position].

    The token that ends a document belongs to that document. The first document in each row starts at 0.

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
