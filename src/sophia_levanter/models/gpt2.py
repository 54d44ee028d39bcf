"""GPT-2 (Radford et al. 2019) with Haliax named axes: learned positions, pre-norm blocks, a tied head."""

from __future__ import annotations

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
from haliax import Axis, AxisSpec, NamedArray
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers

from sophia_levanter.batch import Batch
from sophia_levanter.config.model import Gpt2Config, pad_vocab
from sophia_levanter.models.attention import causal_attention
from sophia_levanter.models.layers import gelu, layer_norm, linear
from sophia_levanter.models.loss import Targets, blocked_cross_entropy
from sophia_levanter.models.rematerialisation import checkpointed
from sophia_levanter.partition.mesh import at_rest, in_use

__all__ = ["Gpt2", "Gpt2Config"]


class Attention(eqx.Module):
    """Causal multi-head self-attention."""

    config: Gpt2Config = eqx.field(static=True)
    c_attn: hnn.Linear  # embed -> (qkv, heads, head_size)
    c_proj: hnn.Linear  # (heads, head_size) -> embed

    @staticmethod
    def init(config: Gpt2Config, *, key: jax.Array) -> Attention:
        k_attn, k_proj = jax.random.split(key)
        heads = (config.Heads, config.HeadSize)
        return Attention(
            config,
            _linear(config, config.Embed, (Axis("qkv", 3), *heads), key=k_attn),
            _linear(config, heads, config.Embed, key=k_proj, std=_residual_std(config)),
        )

    def __call__(self, x: NamedArray, layer: NamedArray, *, key: jax.Array | None) -> NamedArray:
        attended = causal_attention(
            *self.project(x, layer),
            implementation=self.config.attention,
            dropout=self.config.dropout,
            dropout_key=key,
        )
        return linear(self.c_proj, attended)

    def project(self, x: NamedArray, layer: NamedArray) -> tuple[NamedArray, NamedArray, NamedArray]:
        """Queries, keys and values, each [..., heads, head_size], the queries scaled as the layer has it."""
        qkv = linear(self.c_attn, x)
        query, keys, values = (part["qkv", 0] for part in qkv.split("qkv", [Axis("qkv", 1)] * 3))
        if self.config.scale_attn_by_inverse_layer_idx:
            query = query / (layer + 1).astype(query.dtype)
        return query, keys, values


class Mlp(eqx.Module):
    """Two linear layers with GPT-2's tanh approximation of GELU between them."""

    c_fc: hnn.Linear  # embed -> mlp
    c_proj: hnn.Linear  # mlp -> embed

    @staticmethod
    def init(config: Gpt2Config, *, key: jax.Array) -> Mlp:
        k_fc, k_proj = jax.random.split(key)
        return Mlp(
            _linear(config, config.Embed, config.Mlp, key=k_fc),
            _linear(config, config.Mlp, config.Embed, key=k_proj, std=_residual_std(config)),
        )

    def __call__(self, x: NamedArray) -> NamedArray:
        return linear(self.c_proj, gelu(linear(self.c_fc, x)))


class Block(eqx.Module):
    """A pre-norm transformer block."""

    config: Gpt2Config = eqx.field(static=True)
    ln_1: hnn.LayerNorm
    attn: Attention
    ln_2: hnn.LayerNorm
    mlp: Mlp

    @staticmethod
    def init(config: Gpt2Config, *, key: jax.Array) -> Block:
        k_attn, k_mlp = jax.random.split(key)
        return Block(
            config, _norm(config), Attention.init(config, key=k_attn), _norm(config), Mlp.init(config, key=k_mlp)
        )

    def __call__(self, x: NamedArray, layer: NamedArray, key: jax.Array | None) -> NamedArray:
        # What is kept of the parameters for the backward pass stays split, or the compiler may keep whole copies.
        forward = checkpointed(self.config.gradient_checkpointing, Block._forward)
        return forward(at_rest(self), x, layer, key)

    def _forward(self, x: NamedArray, layer: NamedArray, key: jax.Array | None) -> NamedArray:
        block = in_use(self)
        k_weights, k_attn, k_mlp = (None,) * 3 if key is None else jax.random.split(key, 3)
        return block.combine(x, block.attn(layer_norm(block.ln_1, x), layer, key=k_weights), k_attn, k_mlp)

    def combine(
        self, x: NamedArray, attention: NamedArray, k_attn: jax.Array | None = None, k_mlp: jax.Array | None = None
    ) -> NamedArray:
        """The block's result, given what it is applied to and the attention's result; with keys there is dropout."""
        x = x + _dropout(self.config, attention, k_attn)
        return hax.auto_sharded(x + _dropout(self.config, self.mlp(layer_norm(self.ln_2, x)), k_mlp))


class Gpt2(eqx.Module):
    """A GPT-2 language model. The vocabulary is padded to a multiple of 128 inside and never seen so outside.

    Attributes:
        config: the model's shape.
        vocab_size: classes that can be predicted.
        wte: token embedding and output head, [vocab (padded), embed].
        wpe: position embedding, [position, embed].
        blocks: the blocks, stacked over [layers].
        ln_f: the final layer norm.
    """

    config: Gpt2Config = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)
    wte: hnn.Embedding
    wpe: hnn.Embedding
    blocks: hnn.Stacked[Block]
    ln_f: hnn.LayerNorm

    @staticmethod
    def init(config: Gpt2Config, *, vocab_size: int, key: jax.Array) -> Gpt2:
        """Weights drawn as GPT-2's: normal with `initializer_range`, projections into the residual stream divided by
        sqrt(2 layers), zero biases, unit norms.

        Args:
            config: the model's shape.
            vocab_size: classes that can be predicted.
            key: a jax random key.
        """
        k_wte, k_wpe, k_blocks = jax.random.split(key, 3)
        Vocab = Axis("vocab", pad_vocab(config.embedding_rows(vocab_size)))
        blocks = hnn.Stacked.init(config.Layers, Block)(config, key=jax.random.split(k_blocks, config.num_layers))
        return Gpt2(
            config,
            vocab_size,
            hnn.Embedding(_normal(config, (Vocab, config.Embed), k_wte), Vocab, config.Embed),
            hnn.Embedding(_normal(config, (config.Pos, config.Embed), k_wpe), config.Pos, config.Embed),
            blocks,
            _norm(config),
        )

    def hidden(self, tokens: NamedArray, *, key: jax.Array | None = None) -> NamedArray:
        """The final hidden states, after the last layer norm.

        Args:
            tokens: int32 [..., position], of at most `config.seq_len` positions.
            key: a jax random key for dropout; None for no dropout.

        Returns:
            [..., position, embed] in the parameters' dtype.
        """
        return self.gathered()._hidden(tokens, key)

    def gathered(self) -> Gpt2:
        """With whole parameters outside of the blocks, which gather their own."""
        parts = (self.wte, self.wpe, self.ln_f)
        return eqx.tree_at(lambda model: (model.wte, model.wpe, model.ln_f), self, in_use(parts))

    def _hidden(self, tokens: NamedArray, key: jax.Array | None) -> NamedArray:
        num_positions = tokens.resolve_axis("position").size
        positions = self.wpe.weight[{"position": slice(0, num_positions)}]
        k_embed, k_blocks = (None, None) if key is None else jax.random.split(key)
        x = hax.auto_sharded(_dropout(self.config, self.wte.embed(tokens) + positions, k_embed))
        layers = hax.arange(self.config.Layers)
        keys = None if k_blocks is None else jax.random.split(k_blocks, self.config.num_layers)
        x = self.blocks.fold(x, layers, keys, unroll=self.config.scan_unroll)
        return layer_norm(self.ln_f, x)

    def __call__(self, tokens: NamedArray, *, key: jax.Array | None = None) -> NamedArray:
        """Logits over the true vocabulary.

        Args:
            tokens: int32 [..., position], of at most `config.seq_len` positions.
            key: a jax random key for dropout; None for no dropout.

        Returns:
            [..., position, vocab] in the parameters' dtype.
        """
        model = self.gathered()
        return model.head(model._hidden(tokens, key))

    def head(self, hidden: NamedArray, dtype: DTypeLike | None = None) -> NamedArray:
        """Logits over the true vocabulary.

        Args:
            hidden: final hidden states, [..., embed].
            dtype: of the logits; that of the hidden states if not given.

        Returns:
            [..., vocab].
        """
        logits = hax.dot(hidden, self.wte.weight, axis=self.config.Embed, preferred_element_type=dtype)
        return logits[{"vocab": slice(0, self.vocab_size)}]

    def losses(
        self, batch: Batch, *, samples: NamedArray | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Sums of the next-token losses, of the true and of sampled labels, without whole logits.

        Args:
            batch: [batch, position].
            samples: [batch, position] float32 uniforms to draw labels with, or int labels; None for no second loss.
            key: a jax random key for dropout; None for no dropout.

        Returns:
            Two float32 scalars in nats; see `models.loss.blocked_cross_entropy`.
        """

        def array(x: NamedArray) -> jax.Array:
            return x.rearrange(("batch", "position", ...)).array

        model = self.gathered()
        hidden = model._hidden(batch.tokens, key).rearrange(("batch", "position", "embed"))
        targets = Targets(array(batch.targets), array(batch.weights), None if samples is None else array(samples))
        head = model.wte.weight.rearrange(("vocab", "embed")).array
        return blocked_cross_entropy(self.vocab_size, self.config.loss_block_size, hidden.array, head, targets)


def decay_mask(model: Gpt2) -> Gpt2:
    """True where GPT-2's weight decay applies: matrices and embeddings, never biases and norms, whatever their shape.

    Returns:
        A prefix tree of bools for the model's parameters.
    """

    def mask(layer: object) -> object:
        params = eqx.filter(layer, eqx.is_inexact_array)
        matrix = isinstance(layer, hnn.Linear | hnn.Embedding)
        decays = jax.tree.map(lambda _: False, params)
        return eqx.tree_at(lambda x: x.weight.array, decays, True) if matrix else decays

    return jax.tree.map(mask, model, is_leaf=_is_layer)


def matrix_axes(model: Gpt2) -> Gpt2:
    """The matrices that Muon orthogonalises: the linear maps of the blocks, one for each layer, and of c_attn one for
    each of query, key and value. Embeddings (the output head with them), norms and biases are Adam's.

    Returns:
        A prefix tree for the model's parameters: `optax.contrib.MuonDimensionNumbers`, or None.
    """

    def axes(layer: object) -> object:
        if not isinstance(layer, hnn.Linear):
            return None
        # qkv is no axis of the matrices: like layers, it counts them.
        position = {axis.name: i for i, axis in enumerate(layer.weight.axes)}
        inputs, outputs = (
            tuple(position[axis.name] for axis in hax.util.ensure_tuple(spec) if axis.name != "qkv")
            for spec in (layer.In, layer.Out)
        )
        entries = (MuonDimensionNumbers(inputs, outputs), None)
        return eqx.tree_at(lambda x: (x.weight, x.bias), layer, entries, is_leaf=lambda x: x is None)

    return jax.tree.map(axes, model, is_leaf=_is_layer)


def _is_layer(x: object) -> bool:
    return isinstance(x, hnn.Linear | hnn.Embedding | hnn.LayerNorm)


def _normal(config: Gpt2Config, axes: AxisSpec, key: jax.Array, std: float | None = None) -> NamedArray:
    return hax.random.normal(key, axes) * (std or config.initializer_range)


def _residual_std(config: Gpt2Config) -> float:
    return config.initializer_range * (2 * config.num_layers) ** -0.5


def _linear(config: Gpt2Config, In: AxisSpec, Out: AxisSpec, *, key: jax.Array, std: float | None = None) -> hnn.Linear:
    weight = _normal(config, hax.concat_axis_specs(In, Out), key, std)
    bias = hax.zeros(Out) if config.use_bias else None
    return hnn.Linear(weight, bias, In, Out)


def _norm(config: Gpt2Config) -> hnn.LayerNorm:
    return hnn.LayerNorm.init(config.Embed, eps=config.layer_norm_epsilon, use_bias=config.use_bias)


def _dropout(config: Gpt2Config, x: NamedArray, key: jax.Array | None) -> NamedArray:
    return x if key is None else hnn.dropout(x, config.dropout, inference=False, key=key)
