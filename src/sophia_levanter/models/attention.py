"""Causal self-attention with named axes."""

from __future__ import annotations

import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray


def causal_attention(
    query: NamedArray, key: NamedArray, value: NamedArray, *, dropout: float = 0.0, dropout_key: jax.Array | None = None
) -> NamedArray:
    """softmax(q k^T / sqrt(head_size)) v over earlier positions; softmax in float32.

    Args:
        query, key, value: [..., position, heads, head_size].
        dropout: rate at which attention weights are dropped, where a key is given.
        dropout_key: a jax random key; None for no dropout.

    Returns:
        [..., position, heads, head_size], in the query's dtype.
    """
    order = ("position", "heads", "head_size")
    batch_axes = tuple(axis for axis in query.axes if axis.name not in order)
    axes = (*batch_axes, *(query.resolve_axis(name) for name in order))
    q, k, v = (x.rearrange(axes).array for x in (query, key, value))
    if dropout > 0 and dropout_key is not None:
        attended = _attention_with_dropout(q, k, v, dropout, dropout_key)
    else:
        flat = (-1, *q.shape[-3:])
        attended = jax.nn.dot_product_attention(
            q.reshape(flat), k.reshape(flat), v.reshape(flat), is_causal=True, implementation="xla"
        ).reshape(q.shape)
    return hax.named(attended, axes)


def _attention_with_dropout(q: jax.Array, k: jax.Array, v: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """The same by hand, since no fused kernel drops attention weights."""
    positions, head_size = q.shape[-3], q.shape[-1]
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k).astype(jnp.promote_types(q.dtype, jnp.float32))
    causal = jnp.tril(jnp.ones((positions, positions), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores * head_size**-0.5, -jnp.inf), axis=-1)
    weights = jnp.where(jax.random.bernoulli(key, 1 - rate, weights.shape), weights / (1 - rate), 0)
    return jnp.einsum("...hqk,...khd->...qhd", weights.astype(v.dtype), v)
