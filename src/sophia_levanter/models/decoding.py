"""GPT-2 one token at a time, with the keys and values of the tokens before it kept."""

from __future__ import annotations

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from sophia_levanter.models.attention import causal_attention
from sophia_levanter.models.gpt2 import Block, Gpt2
from sophia_levanter.models.layers import layer_norm
from sophia_levanter.partition.mesh import in_use


class Cache(eqx.Module):
    """What attention needs of the tokens that rows hold so far.

    Attributes:
        keys, values: [layers, batch, heads, position, head_size] in the model's dtype; what a row holds behind its
            last position is never looked at.
    """

    keys: NamedArray
    values: NamedArray

    @staticmethod
    def init(model: Gpt2, Batch: Axis) -> Cache:
        """An empty cache for the model's whole context.

        Args:
            model: the model.
            Batch: the axis of the rows, `batch`.
        """
        config = model.config
        # A head's positions lie together: with heads inside, attention of many rows is tens of times slower on CPUs.
        axes = (config.Layers, Batch, config.Heads, config.Pos, config.HeadSize)
        zeros = hax.zeros(axes, model.wpe.weight.dtype)
        return hax.auto_sharded(Cache(zeros, zeros))


def prefill(model: Gpt2, cache: Cache, row: jax.Array, tokens: NamedArray) -> Cache:
    """The cache with one row begun anew: with the keys and values of some tokens, at positions from 0 on.

    Args:
        model: the model.
        cache: of any rows.
        row: which of them, an int scalar.
        tokens: int32 [position], no more than the context has. Those behind the row's last may be any: tokens do not
            look ahead, and what is decoded after the last takes their places.
    """
    model = model.gathered()
    positions = model.wpe.weight["position", slice(0, tokens.resolve_axis("position").size)]

    def through(block: Block, x: NamedArray, layer: NamedArray) -> tuple[NamedArray, Cache]:
        block = in_use(block)
        query, keys, values = block.attn.project(layer_norm(block.ln_1, x), layer)
        attended = causal_attention(query, keys, values, implementation=model.config.attention)
        return block.combine(x, block.attn.c_proj(attended)), Cache(keys, values)

    layers = hax.arange(model.config.Layers)
    scan = model.blocks.scan_via(through, unroll=model.config.scan_unroll)
    _, made = scan(hax.auto_sharded(model.wte.embed(tokens) + positions), layers)

    def written(old: NamedArray, new: NamedArray) -> NamedArray:
        # Not at an index of the rows, which may be spread over devices: each would gather the whole.
        here = {"position": slice(0, new.resolve_axis("position").size)}
        chosen = hax.where(hax.arange(old.resolve_axis("batch")) == row, new, old[here])
        return old.at[here].set(chosen.rearrange(old.axes))

    return hax.auto_sharded(Cache(written(cache.keys, made.keys), written(cache.values, made.values)))


def decode_step(model: Gpt2, cache: Cache, tokens: NamedArray, positions: NamedArray) -> tuple[NamedArray, Cache]:
    """What the model predicts after one more token of each row.

    Args:
        model: the model.
        cache: of all positions before.
        tokens: int32 [batch].
        positions: int32 [batch], where each row has its token; less than the context's length.

    Returns:
        Logits over the true vocabulary, float32 [batch, vocab], and the cache with these tokens.
    """
    model = model.gathered()

    def through(block: Block, x: NamedArray, layer: NamedArray, kept: Cache) -> tuple[NamedArray, Cache]:
        block = in_use(block)
        query, keys, values = block.attn.project(layer_norm(block.ln_1, x), layer)
        attended = _attention(query, _with(kept, keys, values, positions), positions)
        return block.combine(x, block.attn.c_proj(attended)), Cache(keys, values)

    layers = hax.arange(model.config.Layers)
    scan = model.blocks.scan_via(through, unroll=model.config.scan_unroll)
    x, made = scan(hax.auto_sharded(model.wte.embed(tokens) + model.wpe.embed(positions)), layers, cache)
    # One write for all layers: a scan that gave whole caches would copy them at every token.
    cache = hax.auto_sharded(_with(cache, made.keys, made.values, positions))
    # Of logits rounded to bfloat16 many are the likeliest.
    return model.head(layer_norm(model.ln_f, x), jnp.float32), cache


def _with(cache: Cache, keys: NamedArray, values: NamedArray, positions: NamedArray) -> Cache:
    """A cache, of all layers or one, with a key and a value more in each row."""
    here = ("position", positions)
    return Cache(cache.keys.at[here].set(keys), cache.values.at[here].set(values))


def _attention(query: NamedArray, cache: Cache, positions: NamedArray) -> NamedArray:
    """Attention of one position of each row, [batch, heads, head_size], over those up to it."""
    axes = tuple(query.resolve_axis(name) for name in ("batch", "heads", "head_size"))
    order = ("batch", "position", "heads", "head_size")
    keys, values = (x.rearrange(order).array for x in (cache.keys, cache.values))
    attended = jax.nn.dot_product_attention(
        query.rearrange(axes).array[:, None],
        keys,
        values,
        key_value_seq_lengths=positions.array + 1,
        implementation="xla",
    )
    return hax.named(attended[:, 0], axes)
