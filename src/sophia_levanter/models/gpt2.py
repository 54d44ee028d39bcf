"""GPT-2 (Radford et al. 2019) with Haliax named axes: learned positions, pre-norm blocks, a tied head."""

from __future__ import annotations

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
from haliax import Axis, AxisSpec, NamedArray

from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.models.layers import gelu, linear, normalize
from sophia_levanter.models.transformer import Block, Transformer, dropout, normal_weights

__all__ = ["Gpt2", "Gpt2Config"]


class Attention(eqx.Module):
    """Linear layers of causal multi-head self-attention."""

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
            _linear(config, heads, config.Embed, key=k_proj, residual=True),
        )

    def project(self, x: NamedArray, layer: NamedArray) -> tuple[NamedArray, NamedArray, NamedArray]:
        """Compute queries (scaled by layer, if configured), keys and values, each [..., heads, head_size]."""
        qkv = linear(self.c_attn, x)
        query, keys, values = (part["qkv", 0] for part in qkv.split("qkv", [Axis("qkv", 1)] * 3))
        if self.config.scale_attn_by_inverse_layer_idx:
            query = query / (layer + 1).astype(query.dtype)
        return query, keys, values


class Mlp(eqx.Module):
    """Two linear layers with the tanh approximation of GELU between them, as in GPT-2."""

    c_fc: hnn.Linear  # embed -> mlp
    c_proj: hnn.Linear  # mlp -> embed

    @staticmethod
    def init(config: Gpt2Config, *, key: jax.Array) -> Mlp:
        k_fc, k_proj = jax.random.split(key)
        return Mlp(
            _linear(config, config.Embed, config.Mlp, key=k_fc),
            _linear(config, config.Mlp, config.Embed, key=k_proj, residual=True),
        )

    def __call__(self, x: NamedArray) -> NamedArray:
        return linear(self.c_proj, gelu(linear(self.c_fc, x)))


class Gpt2Block(Block):
    """A pre-norm transformer block."""

    config: Gpt2Config = eqx.field(static=True)
    ln_1: hnn.LayerNorm
    attn: Attention
    ln_2: hnn.LayerNorm
    mlp: Mlp

    @staticmethod
    def init(config: Gpt2Config, *, key: jax.Array) -> Gpt2Block:
        k_attn, k_mlp = jax.random.split(key)
        return Gpt2Block(
            config, _norm(config), Attention.init(config, key=k_attn), _norm(config), Mlp.init(config, key=k_mlp)
        )

    def project(
        self, x: NamedArray, layer: NamedArray, positions: NamedArray | None
    ) -> tuple[NamedArray, NamedArray, NamedArray]:
        return self.attn.project(normalize(self.ln_1, x), layer)

    def project_back(self, attended: NamedArray) -> NamedArray:
        return linear(self.attn.c_proj, attended)

    def apply_mlp(self, x: NamedArray) -> NamedArray:
        return self.mlp(normalize(self.ln_2, x))


class Gpt2(Transformer):
    """A GPT-2 language model. The vocabulary is padded to a multiple of 128; callers never see the padding.

    Attributes:
        config: the model configuration.
        vocab_size: vocabulary size without padding.
        wte: token embedding and output head, [vocab (padded), embed].
        wpe: position embedding, [position, embed].
        blocks: the blocks, stacked over [layers].
        ln_f: the final layer norm.
    """

    config: Gpt2Config = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)
    wte: hnn.Embedding
    wpe: hnn.Embedding
    blocks: hnn.Stacked[Gpt2Block]
    ln_f: hnn.LayerNorm

    @staticmethod
    def init(config: Gpt2Config, *, vocab_size: int, key: jax.Array) -> Gpt2:
        """Initialize the weights as in GPT-2.

        Weights are drawn from a normal distribution with standard deviation `initializer_range`, divided by
        sqrt(2 layers) for projections into the residual stream. Biases are 0, and norm weights are 1.

        Args:
            config: the model configuration.
            vocab_size: vocabulary size without padding.
            key: a JAX random key.
        """
        k_wte, k_wpe, k_blocks = jax.random.split(key, 3)
        Vocab = config.Vocab(vocab_size)
        blocks = hnn.Stacked.init(config.Layers, Gpt2Block)(config, key=jax.random.split(k_blocks, config.num_layers))
        return Gpt2(
            config,
            vocab_size,
            hnn.Embedding(normal_weights(config, (Vocab, config.Embed), k_wte, hidden=False), Vocab, config.Embed),
            hnn.Embedding(
                normal_weights(config, (config.Pos, config.Embed), k_wpe, hidden=False), config.Pos, config.Embed
            ),
            blocks,
            _norm(config),
        )

    def head_weights(self) -> NamedArray:
        return self.wte.weight

    def embed(self, tokens: NamedArray, positions: NamedArray | None, key: jax.Array | None = None) -> NamedArray:
        if positions is None:
            at = self.wpe.weight[{"position": slice(0, tokens.resolve_axis("position").size)}]
        else:
            at = self.wpe.embed(positions)
        return dropout(self.config, self.wte.embed(tokens) + at, key)

    def final_norm(self, x: NamedArray) -> NamedArray:
        return normalize(self.ln_f, x)


def _linear(config: Gpt2Config, In: AxisSpec, Out: AxisSpec, *, key: jax.Array, residual: bool = False) -> hnn.Linear:
    weight = normal_weights(config, hax.concat_axis_specs(In, Out), key, hidden=True, residual=residual)
    bias = hax.zeros(Out) if config.use_bias else None
    return hnn.Linear(weight, bias, In, Out)


def _norm(config: Gpt2Config) -> hnn.LayerNorm:
    return hnn.LayerNorm.init(config.Embed, eps=config.layer_norm_epsilon, use_bias=config.use_bias)
