"""Components shared by transformers: scanned blocks, attention, and a cache of keys and values."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import Axis, AxisSpec, NamedArray

from sophia_levanter.config.model import TransformerConfig
from sophia_levanter.models.attention import causal_attention, decode_attention
from sophia_levanter.models.language_model import LanguageModel, write_row
from sophia_levanter.partition.mesh import gather_params, is_split, shard_params


class Block(eqx.Module):
    """A transformer block: attention, then an MLP, each added to the residual stream."""

    config: eqx.AbstractVar[TransformerConfig]

    @abc.abstractmethod
    def project(
        self, x: NamedArray, layer: NamedArray, positions: NamedArray | None
    ) -> tuple[NamedArray, NamedArray, NamedArray]:
        """Compute queries [..., heads, head_size], and keys and values [..., kv_heads, head_size], from the input `x`.

        Args:
            x: [..., embed].
            layer: int scalar, the index of the block.
            positions: as for `models.layers.rotary`.
        """

    @abc.abstractmethod
    def project_back(self, attended: NamedArray) -> NamedArray:
        """Project the attention result [..., heads, head_size] to the residual stream, [..., embed]."""

    @abc.abstractmethod
    def apply_mlp(self, x: NamedArray) -> NamedArray:
        """Compute the contribution of the MLP to the residual stream, [..., embed]."""

    def attention_inputs(
        self, x: NamedArray, layer: NamedArray, positions: NamedArray | None
    ) -> tuple[NamedArray, NamedArray, NamedArray]:
        """Return the queries, keys and values from `project`, with the queries scaled for the parametrization."""
        query, keys, values = self.project(x, layer, positions)
        return scaled(query, self.config.query_factor), keys, values

    def finish(
        self, x: NamedArray, attended: NamedArray, k_attn: jax.Array | None = None, k_mlp: jax.Array | None = None
    ) -> NamedArray:
        """Compute the block output [..., embed] from its input and the attention result [..., heads, head_size].

        Passing keys enables dropout.
        """
        factor = self.config.block_factor
        x = x + scaled(dropout(self.config, self.project_back(attended), k_attn), factor)
        return hax.auto_sharded(x + scaled(dropout(self.config, self.apply_mlp(x), k_mlp), factor))

    def __call__(
        self, x: NamedArray, layer: NamedArray, key: jax.Array | None, document_starts: NamedArray | None = None
    ) -> NamedArray:
        """Compute the block output [..., position, embed] for a context that starts at position 0.

        Passing a key enables dropout. `document_starts` is as for `hidden_in_documents`.
        """
        # Keep the parameters sharded for the backward pass; otherwise the compiler may keep full copies.
        forward = checkpointed(self.config.gradient_checkpointing, Block._forward)
        return forward(shard_params(self), x, layer, key, document_starts)

    def _forward(
        self, x: NamedArray, layer: NamedArray, key: jax.Array | None, document_starts: NamedArray | None
    ) -> NamedArray:
        block = gather_params(self)
        k_weights, k_attn, k_mlp = (None,) * 3 if key is None else jax.random.split(key, 3)
        attended = causal_attention(
            *block.attention_inputs(x, layer, _positions(document_starts)),
            implementation=self.config.attention,
            dropout=self.config.dropout,
            dropout_key=k_weights,
            document_starts=document_starts,
        )
        return block.finish(x, attended, k_attn, k_mlp)


class Cache(eqx.Module):
    """Keys and values of the tokens so far in each row.

    Attributes:
        keys, values: [layers, batch, kv_heads, position, head_size] in the model dtype; entries after the last position
            of a row are never read.
    """

    keys: NamedArray
    values: NamedArray


class Transformer(LanguageModel):
    """A stack of blocks between an embedding and an output head.

    Attributes:
        blocks: the blocks, stacked over [layers].
    """

    config: eqx.AbstractVar[TransformerConfig]
    if TYPE_CHECKING:  # an actual field would come before the fields of subclasses
        blocks: hnn.Stacked[Any]

    @abc.abstractmethod
    def embed(self, tokens: NamedArray, positions: NamedArray | None, key: jax.Array | None = None) -> NamedArray:
        """Compute the first block's input, [..., embed]. A key enables dropout. For positions, see `Block.project`."""

    @abc.abstractmethod
    def final_norm(self, x: NamedArray) -> NamedArray:
        """Apply the final norm to the output of the last block."""

    @property
    def flops_per_token(self) -> float:
        """FLOPs of the forward and backward passes for one token: 6 per weight in a matrix product, plus attention.

        Attention costs 12 * layers * heads * head_size * seq_len (PaLM, arXiv 2204.02311, appendix B).
        """
        config = self.config
        layers = jax.tree.leaves(self.blocks, is_leaf=lambda x: isinstance(x, hnn.Linear))
        weights = sum(layer.weight.size for layer in layers if isinstance(layer, hnn.Linear)) + self.head_weights().size
        return 6.0 * weights + 12.0 * config.num_layers * config.num_heads * config.head_dim * config.seq_len

    def gathered(self) -> Transformer:
        """Return the model with the parameters outside the blocks gathered. Each block gathers its own parameters."""
        outside = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "blocks" and not field.metadata.get("static")
        }
        return dataclasses.replace(self, **gather_params(outside))

    def final_hidden(self, tokens: NamedArray, key: jax.Array | None) -> NamedArray:
        return self.hidden_in_documents(tokens, None, key)

    def hidden_in_documents(
        self, tokens: NamedArray, document_starts: NamedArray | None, key: jax.Array | None
    ) -> NamedArray:
        key = key if self.config.dropout > 0 else None
        k_embed, k_blocks = (None, None) if key is None else jax.random.split(key)
        x = hax.auto_sharded(self.embed(tokens, _positions(document_starts), k_embed))
        layers = hax.arange(self.config.Layers)
        keys = None if k_blocks is None else jax.random.split(k_blocks, self.config.num_layers)
        x = self.blocks.fold(x, layers, keys, document_starts, unroll=self.config.scan_unroll)
        return self.head_inputs(x)

    def head_inputs(self, x: NamedArray) -> NamedArray:
        """Compute the input of the output head from the output of the last block; both are [..., embed]."""
        return scaled(self.final_norm(x), self.config.logits_factor)

    def empty_cache(self, Batch: Axis) -> Cache:
        config = self.config
        # Put the position axis after the heads: on CPUs, attention over many rows is tens of times slower otherwise.
        axes = (config.Layers, Batch, config.KVHeads, config.Pos, config.HeadSize)
        zeros = hax.zeros(axes, self.head_weights().dtype)
        return hax.auto_sharded(Cache(zeros, zeros))

    def prefill(self, cache: Cache, row: jax.Array, tokens: NamedArray) -> Cache:
        model = self.gathered()

        def through(block: Block, x: NamedArray, layer: NamedArray) -> tuple[NamedArray, Cache]:
            block = gather_params(block)
            query, keys, values = block.attention_inputs(x, layer, None)
            attended = causal_attention(query, keys, values, implementation=self.config.attention)
            return block.finish(x, attended), Cache(keys, values)

        scan = model.blocks.scan_via(through, unroll=self.config.scan_unroll)
        _, made = scan(hax.auto_sharded(model.embed(tokens, None)), hax.arange(self.config.Layers))
        keys, values = write_row(cache.keys, row, made.keys), write_row(cache.values, row, made.values)
        return hax.auto_sharded(Cache(keys, values))

    def decode_step(self, cache: Cache, tokens: NamedArray, positions: NamedArray) -> tuple[NamedArray, Cache]:
        model = self.gathered()

        def through(block: Block, x: NamedArray, layer: NamedArray, kept: Cache) -> tuple[NamedArray, Cache]:
            block = gather_params(block)
            query, keys, values = block.attention_inputs(x, layer, positions)
            here = _with(kept, keys, values, positions)
            attended = decode_attention(query, here.keys, here.values, positions)
            return block.finish(x, attended), Cache(keys, values)

        scan = model.blocks.scan_via(through, unroll=self.config.scan_unroll)
        x = hax.auto_sharded(model.embed(tokens, positions))
        x, made = scan(x, hax.arange(self.config.Layers), cache)
        # Write once for all layers, because a scan that returned whole caches would copy them for every token.
        cache = hax.auto_sharded(_with(cache, made.keys, made.values, positions))
        # Use float32, because in bfloat16 many logits would tie for the maximum.
        return model.head(model.head_inputs(x), jnp.float32), cache


def _positions(document_starts: NamedArray | None) -> NamedArray | None:
    """Return the position of each token in its document, int32 [..., position], or None without document starts."""
    if document_starts is None:
        return None
    return hax.arange(document_starts.resolve_axis("position")) - document_starts


def _with(cache: Cache, keys: NamedArray, values: NamedArray, positions: NamedArray) -> Cache:
    """Return the cache of one or all layers with one more key and value in each row."""
    here = ("position", positions)
    return Cache(cache.keys.at[here].set(keys), cache.values.at[here].set(values))


def normal_weights(
    config: TransformerConfig, axes: AxisSpec, key: jax.Array, *, hidden: bool, residual: bool = False
) -> NamedArray:
    """Draw weights from a normal distribution. The keyword arguments are passed to `config.weight_std`.

    `hidden` states whether the weights map between hidden states, so that muP divides their variance by the width.
    """
    return hax.random.normal(key, axes) * config.weight_std(hidden=hidden, residual=residual)


def scaled(x: NamedArray, factor: float) -> NamedArray:
    """Multiply the array by a factor. A factor of 1 requires no computation."""
    return x if factor == 1 else x * factor


def dropout(config: TransformerConfig, x: NamedArray, key: jax.Array | None) -> NamedArray:
    """Apply dropout at rate `config.dropout` if a key is given; otherwise return the array unchanged."""
    return x if key is None else hnn.dropout(x, config.dropout, inference=False, key=key)


def checkpointed(policy: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with gradient checkpointing.

    Args:
        policy: `none` keeps all results and only gathers split parameters again; `full` keeps no intermediate results;
            `dots` keeps the results of matrix products, except in attention, where they are quadratic in the number of
            positions; `offload` keeps the same results in host memory.
    """
    if policy == "none" and not is_split():
        return function
    policies = jax.checkpoint_policies
    chosen: Callable[..., Any] = {
        "none": _all_but_gathered,
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[policy]
    # Inside a scan, XLA cannot reuse the forward pass, so prevent_cse is not needed.
    return eqx.filter_checkpoint(function, policy=chosen, prevent_cse=False)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Checkpoint policy that keeps everything except gathered parameters, which result from sharding constraints."""
    return primitive.name != "sharding_constraint"
