"""Causal self-attention with named axes, by the implementation that suits the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray
from jax.sharding import PartitionSpec

from sophia_levanter.models.config import attention_for
from sophia_levanter.partition.mesh import active_partition

ORDER = ("position", "heads", "head_size")


def causal_attention(
    query: NamedArray,
    key: NamedArray,
    value: NamedArray,
    *,
    implementation: str = "xla",
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> NamedArray:
    """softmax(q k^T / sqrt(head_size)) v over earlier positions; softmax in float32.

    Args:
        query, key, value: [..., position, heads, head_size].
        implementation: `xla`, `cudnn` or `splash`, or `auto` for what suits the device and the arrays.
        dropout: rate at which attention weights are dropped, where a key is given.
        dropout_key: a jax random key; None for no dropout.

    Returns:
        [..., position, heads, head_size], in the query's dtype.
    """
    batch_axes = tuple(axis for axis in query.axes if axis.name not in ORDER)
    axes = (*batch_axes, *(query.resolve_axis(name) for name in ORDER))
    q, k, v = (x.rearrange(axes).array for x in (query, key, value))
    if dropout > 0 and dropout_key is not None:
        return hax.named(_attention_with_dropout(q, k, v, dropout, dropout_key), axes)
    flat = tuple(x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    chosen = _chosen(implementation, q)
    if chosen == "splash":
        attended = _splash(*flat)
    else:
        fused: Any = chosen
        attended = jax.nn.dot_product_attention(*flat, is_causal=True, implementation=fused)
    return hax.named(attended.reshape(q.shape), axes)


_forward_differentiable: ContextVar[bool] = ContextVar("forward_differentiable", default=False)


@contextmanager
def forward_differentiable() -> Iterator[None]:
    """A context in which attention is made of ordinary operations, which Hutchinson's estimator can differentiate."""
    token = _forward_differentiable.set(True)
    try:
        yield
    finally:
        _forward_differentiable.reset(token)


def _chosen(implementation: str, query: jax.Array) -> str:
    if _forward_differentiable.get():
        return "xla"
    partition = active_partition()
    platform = jax.default_backend() if partition is None else partition.platform
    split = partition is not None and partition.mesh.shape["sequence"] > 1
    positions, _, head_size = query.shape[-3:]
    return attention_for(implementation, platform, query.dtype.name, positions, head_size, split_positions=split)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """TPU's kernel, on each device's own rows and heads; [batch, position, heads, head_size]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    def attend(*qkv: jax.Array) -> jax.Array:
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in qkv)
        heads, positions, head_size = q.shape[1:]
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((positions, positions))] * heads)
        kernel = splash_attention_kernel.make_splash_mha_single_device(mask, interpret=interpret)
        # The kernel does not scale.
        return jnp.swapaxes(jax.vmap(kernel)(q * head_size**-0.5, k, v), 1, 2).astype(q.dtype)

    partition = active_partition()
    if partition is None or partition.mesh.size == 1:
        return attend(q, k, v)
    heads: Any = partition.compute.get("heads")
    spec = PartitionSpec(partition.compute["batch"], None, heads, None)
    return jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _attention_with_dropout(q: jax.Array, k: jax.Array, v: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """The same by hand, since no fused kernel drops attention weights."""
    positions, head_size = q.shape[-3], q.shape[-1]
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k).astype(jnp.promote_types(q.dtype, jnp.float32))
    causal = jnp.tril(jnp.ones((positions, positions), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores * head_size**-0.5, -jnp.inf), axis=-1)
    weights = jnp.where(jax.random.bernoulli(key, 1 - rate, weights.shape), weights / (1 - rate), 0)
    return jnp.einsum("...hqk,...khd->...qhd", weights.astype(v.dtype), v)
