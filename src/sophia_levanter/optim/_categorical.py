"""Categorical sampling from logits, and the cross-entropy loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sophia_levanter.optim._trees import upcast

_BLOCK = 128


def sample_categorical(logits: Array, uniforms: Array) -> Array:
    """Draw labels from softmax(logits) by inverting the cumulative distribution, in float32.

    For large vocabularies, one uniform number per position is several times cheaper than one Gumbel variable per class.
    The cumulative sum is computed first over blocks of 128 classes, and then within the block containing the sample.

    Args:
        logits: [..., classes]; -inf for a class that cannot be drawn. At least one logit must be finite.
        uniforms: [...] float32 in [0, 1).

    Returns:
        int32 labels, [...].
    """
    classes = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    padding = -classes % _BLOCK
    weights = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, padding)])
    blocks = weights.reshape(*weights.shape[:-1], -1, _BLOCK)
    block_sums = jnp.sum(blocks, axis=-1)
    block_ends = jnp.cumsum(block_sums, axis=-1)
    target = uniforms * block_ends[..., -1]
    block = _first_above(block_sums, block_ends, target)
    hit = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    before = jnp.where(
        block > 0, jnp.take_along_axis(block_ends, jnp.maximum(block - 1, 0)[..., None], axis=-1)[..., 0], 0
    )
    return block * _BLOCK + _first_above(hit, jnp.cumsum(hit, axis=-1), target - before)


def _first_above(weights: Array, ends: Array, target: Array) -> Array:
    """Return the first index with positive weight whose cumulative sum exceeds the target.

    If rounding leaves no such index, return the last index with positive weight. The weights are checked
    because the first sum above the target may belong to an index with weight 0: a target may be rounded to less than 0,
    and parallel cumulative sums are not exactly monotonic.
    """
    positions = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    possible = weights > 0
    last = jnp.max(jnp.where(possible, positions, 0), axis=-1, keepdims=True)
    return jnp.min(jnp.where(possible & (ends > target[..., None]), positions, last), axis=-1)


def categorical_loss(logits: Array, labels: Array) -> Array:
    """Compute -log softmax(logits)[label] in nats, [...], for logits [..., classes], in float32 or wider."""
    logits = upcast(logits)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
