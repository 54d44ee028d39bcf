"""Layers of a block, arranged so that XLA's CPU backend makes few passes over memory and no transposed copies."""

from __future__ import annotations

from functools import partial
from typing import Any

import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray
from haliax.util import ensure_tuple

from sophia_levanter.partition.mesh import active_platform, is_axis_split


def linear(layer: hnn.Linear, x: NamedArray) -> NamedArray:
    """Apply a linear layer as a single product of two matrices, [row, in] and [in, out].

    Flattening the axes avoids transposed copies of the operands, which XLA's CPU backend makes in the backward pass of
    a product over several axes. Axes that are split over devices are not flattened if that would move data.
    """
    In, Out = ensure_tuple(layer.In), ensure_tuple(layer.Out)
    rows = tuple(axis for axis in x.axes if axis not in In)
    joined = _join(_join(x.rearrange((*rows, *In)), rows), In)
    weight = _join(_join(layer.weight, In), Out)
    if active_platform() == "cpu" and weight.ndim == 2 and joined.axes[1:] == weight.axes[:1]:
        y = NamedArray(_matrix_product(joined.array, weight.array), (joined.axes[0], weight.axes[1]))
    else:
        y = hax.dot(joined, weight, axis=[axis for axis in weight.axes if axis in joined.axes])
    y = hax.auto_sharded(y)
    for axes in (rows, Out):
        if _can_join(axes):
            y = y.unflatten_axis(axes[0].name, axes)
    return y if layer.bias is None else hax.auto_sharded(y + layer.bias)


def _can_join(axes: tuple[Axis, ...]) -> bool:
    return len(axes) > 1 and not any(is_axis_split(axis.name) for axis in axes[1:])


def _join(x: NamedArray, axes: tuple[Axis, ...]) -> NamedArray:
    """Flatten adjacent axes into one axis with the name and sharding of the first."""
    return x.flatten_axes(axes, axes[0].name) if _can_join(axes) else x


@jax.custom_vjp
def _matrix_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply [row, in] by [in, out], with a backward pass designed for CPUs."""
    return x @ weight


def _matrix_product_backward(kept: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    # XLA's CPU backend is slow at products whose first factor is transposed. Therefore, copy the smaller factor of the
    # weight gradient; the barriers keep XLA from fusing the copy into the product or the surrounding operations.
    x, weight = kept
    copied = jax.lax.optimization_barrier
    d_weight = copied(x.T) @ d_y if x.shape[1] <= d_y.shape[1] else copied(copied(d_y.T) @ x).T
    return d_y @ weight.T, d_weight


_matrix_product.defvjp(lambda x, weight: (x @ weight, (x, weight)), _matrix_product_backward)


def gelu(x: NamedArray) -> NamedArray:
    """Apply the tanh approximation of GELU. The backward pass recomputes the tanh, which is cheaper than storing it."""
    return NamedArray(_gelu(x.array), x.axes)


_tanh_gelu = partial(jax.nn.gelu, approximate=True)
_gelu = jax.custom_vjp(_tanh_gelu)


def _gelu_backward(x: jax.Array, d_y: jax.Array) -> tuple[jax.Array]:
    # Without the barrier, the compiler would notice that both passes compute the same tanh, and would store it.
    return jax.vjp(_tanh_gelu, jax.lax.optimization_barrier(x))[1](d_y)


_gelu.defvjp(lambda x: (_tanh_gelu(x), x), _gelu_backward)


def normalize(norm: hnn.LayerNorm | hnn.RmsNorm, x: NamedArray) -> NamedArray:
    """Apply a layer norm or an RMS norm; only a layer norm subtracts the mean.

    The statistics are computed in float32 or wider, and the result has the dtype of x.
    """
    (axis,) = ensure_tuple(norm.axis)
    x = x.rearrange((..., axis))
    bias = None if norm.bias is None else norm.bias.array
    centered = not isinstance(norm, hnn.RmsNorm)
    return NamedArray(_normalize(norm.eps, centered, x.array, norm.weight.array, bias), x.axes)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(eps: float, centered: bool, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    return _normalize_forward(eps, centered, x, weight, bias)[0]


def _normalize_forward(
    eps: float, centered: bool, x: jax.Array, weight: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, tuple]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide, -1, keepdims=True) if centered else jnp.zeros((), wide.dtype)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide - mean), -1, keepdims=True) + eps)
    y = (wide - mean) * scale * weight
    return (y if bias is None else y + bias).astype(x.dtype), (x, mean, scale, weight, bias)


def _normalize_backward(eps: float, centered: bool, kept: tuple, d_y: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    x, mean, scale, weight, bias = kept
    normal = (x.astype(mean.dtype) - mean) * scale
    d_y = d_y.astype(mean.dtype)
    d_normal = d_y * weight
    along_mean = jnp.mean(d_normal, -1, keepdims=True) if centered else jnp.zeros_like(mean)
    along_normal = jnp.mean(d_normal * normal, -1, keepdims=True)
    d_x = scale * (d_normal - along_mean - normal * along_normal)
    rows = tuple(range(x.ndim - 1))
    d_weight = jnp.sum(d_y * normal, rows).astype(weight.dtype)
    return d_x.astype(x.dtype), d_weight, None if bias is None else jnp.sum(d_y, rows).astype(bias.dtype)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def rotary(x: NamedArray, positions: NamedArray | None, theta: float) -> NamedArray:
    """Apply rotary position embeddings (Su et al., arXiv 2104.09864), with elements ordered as in transformers' Llama.

    Elements i and i + head_size / 2 of a head form a pair, which is rotated by position * theta^(-2 i / head_size).

    Args:
        x: queries or keys, [..., head_size].
        positions: int32 token positions, [batch] for one token in each row, or [..., position]; None if the tokens
            [..., position] start at position 0.
        theta: the base of the rotation frequencies.

    Returns:
        The rotated `x`, in the same dtype; the angles are float32 or wider.
    """
    whole = x.resolve_axis("head_size")
    half = whole.resize(whole.size // 2)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    at = hax.arange(x.resolve_axis("position")) if positions is None else positions
    angles = at.astype(dtype).broadcast_axis(half) * theta ** (-hax.arange(half, dtype=dtype) / half.size)
    cos, sin = hax.cos(angles), hax.sin(angles)
    first, second = x.split(whole, [half, half])
    parts = [first * cos - second * sin, second * cos + first * sin]
    return hax.concatenate(whole, [part.rearrange(first.axes) for part in parts]).astype(x.dtype)
