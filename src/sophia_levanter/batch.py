"""The batch type shared by `data`, `models` and `training`."""

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
        tokens: int32 [batch, position], the input tokens.
        targets: int32 [batch, position], the token that follows each input token.
        weights: float32 [batch, position], the weight of each target in the mean loss (0 excludes the target).
        document_starts: int32 [batch, position], the position at which each token's document starts. Attention and
            position indices start there. If None, they start at the beginning of the row.
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
    """Build a batch [microbatch, batch, position] in host memory from sequences of `position + 1` tokens.

    Microbatch i contains the i-th block of consecutive rows, regardless of how it is sharded over devices.

    Args:
        sequences: int32 [rows, position + 1]; the number of rows is a multiple of `num_microbatches`.
        weights: float32 [rows, position]; all ones by default.
        num_microbatches: the number of blocks into which the rows are divided.
        document_end: the token that ends a document, used to set `Batch.document_starts`. If None, that field is None.
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
    """Return the position at which each token's document starts: int32 [row, position].

    The token that ends a document belongs to that document. The first document in each row starts at position 0.

    Args:
        tokens: int [row, position].
        document_end: the token that ends a document.
    """
    starts = np.zeros(tokens.shape, np.int32)
    starts[:, 1:] = np.where(tokens[:, :-1] == document_end, np.arange(1, tokens.shape[1], dtype=np.int32), 0)
    return np.maximum.accumulate(starts, axis=1)


def count_targets(batch: Batch) -> jax.Array:
    """Return the sum of the weights, which is the number of targets in the mean loss."""
    return batch.weights.array.sum()
