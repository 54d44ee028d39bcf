"""What transformers share: blocks that are scanned, attention, and a cache of keys and values."""

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
        """Queries, [..., heads, head_size], keys and values, each [..., kv_heads, head_size], of the block's input.

        Args:
            x: [..., embed].
            layer: int scalar, the block's index.
            positions: int32, those of the tokens: [batch] for one token in each row, or [..., position]; None for
                tokens [..., position] from position 0 on.
        """

    @abc.abstractmethod
    def project_back(self, attended: NamedArray) -> NamedArray:
        """What attention adds to the residual stream, [..., embed], given its result, [..., heads, head_size]."""

    @abc.abstractmethod
    def apply_mlp(self, x: NamedArray) -> NamedArray:
        """What the MLP adds to the residual stream, [..., embed]."""

    def finish(
        self, x: NamedArray, attended: NamedArray, k_attn: jax.Array | None = None, k_mlp: jax.Array | None = None
    ) -> NamedArray:
        """The block's result, given its input and attention's result; with keys there is dropout.

        Args:
            x: [..., embed].
            attended: [..., heads, head_size].
            k_attn, k_mlp: jax random keys.
        """
        x = x + dropout(self.config, self.project_back(attended), k_attn)
        return hax.auto_sharded(x + dropout(self.config, self.apply_mlp(x), k_mlp))

    def __call__(
        self, x: NamedArray, layer: NamedArray, key: jax.Array | None, document_starts: NamedArray | None = None
    ) -> NamedArray:
        """The block's result for a context from position 0 on; with a key there is dropout.

        Args:
            x: [..., position, embed].
            layer: int scalar, the block's index.
            key: a jax random key, or None.
            document_starts: as `hidden_in_documents` has them.
        """
        # What is kept of the parameters for the backward pass stays split, or the compiler may keep whole copies.
        forward = checkpointed(self.config.gradient_checkpointing, Block._forward)
        return forward(shard_params(self), x, layer, key, document_starts)

    def _forward(
        self, x: NamedArray, layer: NamedArray, key: jax.Array | None, document_starts: NamedArray | None
    ) -> NamedArray:
        block = gather_params(self)
        k_weights, k_attn, k_mlp = (None,) * 3 if key is None else jax.random.split(key, 3)
        attended = causal_attention(
            *block.project(x, layer, _positions(document_starts)),
            implementation=self.config.attention,
            dropout=self.config.dropout,
            dropout_key=k_weights,
            document_starts=document_starts,
        )
        return block.finish(x, attended, k_attn, k_mlp)


class Cache(eqx.Module):
    """What attention needs of the tokens that rows hold so far.

    Attributes:
        keys, values: [layers, batch, kv_heads, position, head_size] in the model's dtype; what a row holds behind its
            last position is never looked at.
    """

    keys: NamedArray
    values: NamedArray


class Transformer(LanguageModel):
    """A stack of blocks between an embedding and an output head.

    Attributes:
        blocks: the blocks, stacked over [layers].
    """

    config: eqx.AbstractVar[TransformerConfig]
    if TYPE_CHECKING:  # a field here would come before a model's own, which have an order
        blocks: hnn.Stacked[Any]

    @abc.abstractmethod
    def embed(self, tokens: NamedArray, positions: NamedArray | None, key: jax.Array | None = None) -> NamedArray:
        """The input of the first block, [..., embed]; with a key there is dropout. Positions are as in `project`."""

    @abc.abstractmethod
    def final_norm(self, x: NamedArray) -> NamedArray:
        """The final hidden states, of the last block's result."""

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward for one token: 6 for each weight in a matrix product, and attention's.

        Attention costs 12 * layers * heads * head_size * seq_len, as PaLM's appendix B (arXiv 2204.02311) counts it.
        """
        config = self.config
        layers = jax.tree.leaves(self.blocks, is_leaf=lambda x: isinstance(x, hnn.Linear))
        weights = sum(layer.weight.size for layer in layers if isinstance(layer, hnn.Linear)) + self.head_weights().size
        return 6.0 * weights + 12.0 * config.num_layers * config.num_heads * config.head_dim * config.seq_len

    def gathered(self) -> Transformer:
        """With whole parameters outside of the blocks, which gather their own."""
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
        return self.final_norm(self.blocks.fold(x, layers, keys, document_starts, unroll=self.config.scan_unroll))

    def empty_cache(self, Batch: Axis) -> Cache:
        config = self.config
        # A head's positions lie together: with heads inside, attention of many rows is tens of times slower on CPUs.
        axes = (config.Layers, Batch, config.KVHeads, config.Pos, config.HeadSize)
        zeros = hax.zeros(axes, self.head_weights().dtype)
        return hax.auto_sharded(Cache(zeros, zeros))

    def prefill(self, cache: Cache, row: jax.Array, tokens: NamedArray) -> Cache:
        model = self.gathered()

        def through(block: Block, x: NamedArray, layer: NamedArray) -> tuple[NamedArray, Cache]:
            block = gather_params(block)
            query, keys, values = block.project(x, layer, None)
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
            query, keys, values = block.project(x, layer, positions)
            here = _with(kept, keys, values, positions)
            attended = decode_attention(query, here.keys, here.values, positions)
            return block.finish(x, attended), Cache(keys, values)

        scan = model.blocks.scan_via(through, unroll=self.config.scan_unroll)
        x = hax.auto_sharded(model.embed(tokens, positions))
        x, made = scan(x, hax.arange(self.config.Layers), cache)
        # One write for all layers: a scan that gave whole caches would copy them at every token.
        cache = hax.auto_sharded(_with(cache, made.keys, made.values, positions))
        # Of logits rounded to bfloat16 many are the likeliest.
        return model.head(model.final_norm(x), jnp.float32), cache


def _positions(document_starts: NamedArray | None) -> NamedArray | None:
    """int32 [..., position], how far each token is in its document; None where documents are not told apart."""
    if document_starts is None:
        return None
    return hax.arange(document_starts.resolve_axis("position")) - document_starts


def _with(cache: Cache, keys: NamedArray, values: NamedArray, positions: NamedArray) -> Cache:
    """A cache, of all layers or one, with a key and a value more in each row."""
    here = ("position", positions)
    return Cache(cache.keys.at[here].set(keys), cache.values.at[here].set(values))


def normal_weights(config: TransformerConfig, axes: AxisSpec, key: jax.Array, *, residual: bool = False) -> NamedArray:
    """Normal weights with `config.initializer_range`; into the residual stream divided by sqrt(2 layers)."""
    std = config.initializer_range * ((2 * config.num_layers) ** -0.5 if residual else 1)
    return hax.random.normal(key, axes) * std


def dropout(config: TransformerConfig, x: NamedArray, key: jax.Array | None) -> NamedArray:
    """Dropout at rate `config.dropout` if a key is given; otherwise the array unchanged."""
    return x if key is None else hnn.dropout(x, config.dropout, inference=False, key=key)


def checkpointed(policy: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its intermediate results kept as a policy says.

    Args:
        policy: `none` computes nothing again, but gathers parameters that are split again; `full` keeps nothing; `dots`
            keeps the results of matrix products (not the attention's, which are quadratic in the positions); `offload`
            keeps the same in the host's memory.
        function: of arrays.
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
    # Inside a scan nothing of the forward pass is there for XLA to reuse.
    return eqx.filter_checkpoint(function, policy=chosen, prevent_cse=False)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whole parameters are the results of sharding constraints, and so not kept."""
    return primitive.name != "sharding_constraint"
