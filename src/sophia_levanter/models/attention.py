"""Causal self-attention with named axes, and its implementations for different devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray
from jax.sharding import PartitionSpec

from sophia_levanter.errors import InputError
from sophia_levanter.partition.mesh import active_partition, active_platform, is_axis_split

ORDER = ("position", "heads", "head_size")
SPLASH_STEP = 128  # splash takes a multiple of this number of positions
BLOCK_SIZE, MOST_BLOCKS = 64, 8  # minimum number of queries in a block, maximum number of blocks


def causal_attention(
    query: NamedArray,
    key: NamedArray,
    value: NamedArray,
    *,
    implementation: str = "xla",
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    document_starts: NamedArray | None = None,
) -> NamedArray:
    """Compute softmax(q k^T / sqrt(head_size)) v over each position and all earlier ones, with the softmax in float32.

    Args:
        query: [..., position, heads, head_size].
        key, value: the same, or [..., position, kv_heads, head_size] if several query heads share a key-value head.
        implementation: `blocked`, `xla`, `cudnn` or `splash`, or `auto` to choose one for the device and arrays.
        dropout: dropout rate of the attention weights.
        dropout_key: a JAX random key; None for no dropout.
        document_starts: int32 [..., position], the position at which the document of each token starts; all positions
            before it are masked. If None, no earlier position is masked.

    Returns:
        [..., position, heads, head_size], in the dtype of the query.
    """
    batch_axes = tuple(axis for axis in query.axes if axis.name not in ORDER)
    axes = (*batch_axes, *(query.resolve_axis(name) for name in ORDER))
    q = query.rearrange(axes).array
    k, v = (_with_all_heads(x, batch_axes, q.shape[-2]) for x in (key, value))
    starts = None if document_starts is None else document_starts.rearrange((*batch_axes, "position")).array
    if dropout > 0 and dropout_key is not None:
        return hax.named(_attention_with_dropout((q, k, v), starts, dropout, dropout_key), axes)
    flat = tuple(x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    starts = None if starts is None else starts.reshape(-1, starts.shape[-1])
    chosen = _chosen(implementation, q, starts is not None)
    if chosen == "splash":
        attended = _splash(flat[0], flat[1], flat[2], starts)
    elif chosen == "blocked":
        attended = jnp.swapaxes(blocked_attention(*(jnp.swapaxes(x, 1, 2) for x in flat), starts), 1, 2)
    else:
        mask = None if starts is None else _has_begun(starts, starts.shape[-1])
        options: Any = {"mask": mask, "implementation": chosen}
        attended = jax.nn.dot_product_attention(*flat, is_causal=True, **options)
    return hax.named(attended.reshape(q.shape), axes)


def _with_all_heads(x: NamedArray, batch_axes: tuple[Axis, ...], heads: int) -> jax.Array:
    """Repeat keys or values for every query head, [..., position, heads, head_size]."""
    if "kv_heads" not in [axis.name for axis in x.axes]:
        return x.rearrange((*batch_axes, *ORDER)).array
    array = x.rearrange((*batch_axes, "position", "kv_heads", "head_size")).array
    return jnp.repeat(array, heads // array.shape[-2], axis=-2)


_forward_differentiable: ContextVar[bool] = ContextVar("forward_differentiable", default=False)


@contextmanager
def forward_differentiable() -> Iterator[None]:
    """Make attention use only ordinary operations in this context, so that its gradient supports forward mode."""
    token = _forward_differentiable.set(True)
    try:
        yield
    finally:
        _forward_differentiable.reset(token)


def _has_begun(starts: jax.Array, num_keys: int) -> jax.Array:
    """Return whether documents starting at `starts` [..., query] have begun at each key: bool [..., 1, query, key]."""
    return jnp.arange(num_keys, dtype=starts.dtype) >= starts[..., None, :, None]


def _chosen(implementation: str, query: jax.Array, documents: bool) -> str:
    positions, _, head_size = query.shape[-3:]
    required = Requirements(
        active_platform(),
        query.dtype.name,
        positions,
        head_size,
        split_positions=is_axis_split("position"),
        documents=documents,
    )
    chosen = attention_for(implementation, required)
    return "xla" if _forward_differentiable.get() and chosen not in ("blocked", "xla") else chosen


@jax.custom_vjp
def blocked_attention(q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array | None = None) -> jax.Array:
    """Compute causal attention on CPUs in blocks of queries, skipping blocks above the diagonal.

    The backward pass recomputes the weights block by block. Both passes use ordinary operations, so
    forward-over-reverse mode works; forward mode alone does not.

    Args:
        q, k, v: [batch, heads, position, head_size], with any number of positions.
        starts: int32 [batch, position], `document_starts` as for `causal_attention`.

    Returns:
        [batch, heads, position, head_size] in the query's dtype; scores and weights are float32 or wider.
    """
    return _attend_blocks(q, k, v, starts)[0]


def _attend_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    outputs, log_normalizers = [], []
    for start, end in _query_blocks(q.shape[2]):
        scores = _block_scores(q, k, starts, start, end)
        highest = jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, -1, keepdims=True)
        # Divide after the product, because its result is smaller than the weights.
        outputs.append(_product("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[:, :, :end]) / total)
        log_normalizers.append(highest + jnp.log(total))
    output = jnp.concatenate(outputs, 2)
    # Keep the output unrounded: the backward pass subtracts nearly equal numbers.
    return output.astype(q.dtype), (q, k, v, starts, output, jnp.concatenate(log_normalizers, 2))


def _attend_blocks_back(kept: tuple[Any, ...], d_output: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, starts, output, log_normalizers = kept
    # sum_k weight * d_weight, the softmax term in the gradient, computed from the output.
    inner = jnp.sum(d_output * output, -1, keepdims=True)
    # Transpose to [batch, heads, head_size, position]: XLA's CPU backend is slow at products whose first factor is
    # transposed, and these arrays are smaller than the weights.
    q_columns, d_output_columns = jnp.swapaxes(q, 2, 3), jnp.swapaxes(d_output, 2, 3)
    d_q = []
    d_k = d_v = jnp.zeros(q_columns.shape, output.dtype)
    for start, end in _query_blocks(q.shape[2]):
        rows = slice(start, end)
        weights = jnp.exp(_block_scores(q, k, starts, start, end) - log_normalizers[:, :, rows])
        d_weights = _product("bhqd,bhkd->bhqk", d_output[:, :, rows], v[:, :, :end])
        d_scores = (weights * (d_weights - inner[:, :, rows]) * q.shape[-1] ** -0.5).astype(q.dtype)
        d_q.append(jnp.einsum("bhqk,bhkd->bhqd", d_scores, k[:, :, :end]))
        d_k = d_k.at[..., :end].add(_product("bhdq,bhqk->bhdk", q_columns[..., rows], d_scores))
        d_v = d_v.at[..., :end].add(_product("bhdq,bhqk->bhdk", d_output_columns[..., rows], weights.astype(q.dtype)))
    return (
        jnp.concatenate(d_q, 2),
        jnp.swapaxes(d_k, 2, 3).astype(k.dtype),
        jnp.swapaxes(d_v, 2, 3).astype(v.dtype),
        None,
    )


blocked_attention.defvjp(_attend_blocks, _attend_blocks_back)


def _query_blocks(positions: int) -> list[tuple[int, int]]:
    """Return the start and end of each block of queries. The last block may be shorter."""
    size = max(BLOCK_SIZE, -(-positions // MOST_BLOCKS))
    return [(start, min(start + size, positions)) for start in range(0, positions, size)]


def _block_scores(q: jax.Array, k: jax.Array, starts: jax.Array | None, start: int, end: int) -> jax.Array:
    """Compute masked scores [batch, heads, query in block, key] for keys up to the end of the block."""
    scores = _product("bhqd,bhkd->bhqk", q[:, :, start:end], k[:, :, :end]) * q.shape[-1] ** -0.5
    seen: Any = np.tril(np.ones((end - start, end), bool), start)
    if starts is not None:
        seen = seen & _has_begun(starts[:, start:end], end)
    return jnp.where(seen, scores, -jnp.inf)


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute an einsum in float32 or wider."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
    """Apply the TPU kernel to the rows and heads on each device; q, k and v are [batch, position, heads, head_size]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *starts: jax.Array) -> jax.Array:
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        heads, positions, head_size = q.shape[1:]
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((positions, positions))] * heads)
        kernel = splash_attention_kernel.make_splash_mha_single_device(mask, interpret=interpret)
        # The kernel compares segment ids but does not use them to skip blocks. Two tokens have the same start if and
        # only if they are in the same document, so the start serves as the document id.
        segments = [splash_attention_kernel.SegmentIds(x, x) for x in starts]
        # The kernel does not scale the scores.
        return jnp.swapaxes(jax.vmap(kernel)(q * head_size**-0.5, k, v, *segments), 1, 2).astype(q.dtype)

    given = (q, k, v) if starts is None else (q, k, v, starts)
    partition = active_partition()
    if partition is None or partition.mesh.size == 1:
        return attend(*given)
    # Sampling fills its cache one row at a time. Rows that cannot be split are computed on every device.
    rows = partition.compute["batch"] if q.shape[0] % partition.row_shards == 0 else None
    heads = partition.compute.get("heads")
    spec = PartitionSpec(rows, None, heads, None)
    specs = ((spec,) * 3 + (PartitionSpec(rows, None),))[: len(given)]
    return jax.shard_map(attend, in_specs=specs, out_specs=spec, check_vma=False)(*given)


def _attention_with_dropout(
    qkv: tuple[jax.Array, jax.Array, jax.Array], starts: jax.Array | None, rate: float, key: jax.Array
) -> jax.Array:
    """Compute causal attention without a fused kernel, because no kernel supports dropout of attention weights."""
    q, k, v = qkv
    positions, head_size = q.shape[-3], q.shape[-1]
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k).astype(jnp.promote_types(q.dtype, jnp.float32))
    seen = jnp.tril(jnp.ones((positions, positions), bool))
    if starts is not None:
        seen = seen & _has_begun(starts, positions)
    weights = jax.nn.softmax(jnp.where(seen, scores * head_size**-0.5, -jnp.inf), axis=-1)
    weights = jnp.where(jax.random.bernoulli(key, 1 - rate, weights.shape), weights / (1 - rate), 0)
    return jnp.einsum("...hqk,...khd->...qhd", weights.astype(v.dtype), v)


def decode_attention(query: NamedArray, keys: NamedArray, values: NamedArray, positions: NamedArray) -> NamedArray:
    """Attend from one position in each row, int32 [batch], to all positions up to and including it.

    The query and the result are [batch, heads, head_size]; keys and values are [batch, kv_heads, position, head_size],
    with the axes in any order.
    """
    axes = tuple(query.resolve_axis(name) for name in ("batch", "heads", "head_size"))
    kv_heads = next(axis.name for axis in keys.axes if axis.name in ("heads", "kv_heads"))
    order = ("batch", "position", kv_heads, "head_size")
    attended = jax.nn.dot_product_attention(
        query.rearrange(axes).array[:, None],
        keys.rearrange(order).array,
        values.rearrange(order).array,
        key_value_seq_lengths=positions.array + 1,
        implementation="xla",
    )
    return hax.named(attended[:, 0], axes)


@dataclass(frozen=True)
class Requirements:
    """Requirements for an attention implementation.

    Attributes:
        platform: `cpu`, `gpu` or `tpu`.
        dtype: dtype of the queries, keys and values.
        positions, head_size: sizes of these axes.
        split_positions: whether positions are split over devices.
        dropout: whether dropout is applied to attention weights.
        documents: whether attention stops at document boundaries.
    """

    platform: str
    dtype: str
    positions: int
    head_size: int
    split_positions: bool = False
    dropout: bool = False
    documents: bool = False


def attention_for(wanted: str, required: Requirements) -> str:
    """Return the requested attention implementation or, for `auto`, the fastest one that meets the requirements.

    Raises:
        InputError: if the requested implementation does not meet the requirements; the error states the reason.
    """
    if wanted == "auto":
        fastest = {"gpu": "cudnn", "tpu": "splash", "cpu": "blocked"}.get(required.platform, "xla")
        return fastest if _why_not(fastest, required) is None else "xla"
    reason = _why_not(wanted, required)
    if reason is not None:
        raise InputError(f"model.attention is {wanted!r}, which {reason}; use auto or xla")
    return wanted


def _why_not(name: str, required: Requirements) -> str | None:
    """Return the reason why an implementation cannot be used, or None if it can."""
    if name == "xla":
        return None
    if required.dropout:
        return "does not support dropout (model.dropout)"
    device = {"cudnn": "gpu", "splash": "tpu"}.get(name, required.platform)
    if required.platform != device:
        return f"requires a {device.upper()}, but this device is a {required.platform.upper()}"
    if required.split_positions:
        return "cannot split positions over devices (mesh.sequence)"
    if name == "cudnn":
        if required.dtype != "bfloat16":
            return f"requires trainer.compute_dtype bfloat16, not {required.dtype}"
        if required.head_size % 8 or required.head_size > 128:
            return f"requires a head size that is a multiple of 8 and at most 128, not {required.head_size}"
        if required.documents:
            # JAX's cuDNN attention accepts masks but no segment ids, and a mask becomes a bias as large as the scores.
            return "does not support document masking (data.mask_documents)"
    elif name == "splash" and required.positions % SPLASH_STEP:
        return f"requires a multiple of {SPLASH_STEP} positions, not {required.positions}"
    return None
