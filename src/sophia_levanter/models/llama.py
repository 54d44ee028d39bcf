"""A Llama-style decoder (Touvron et al. 2023, arXiv 2302.13971) with Haliax named axes.

The model uses RMSNorm before attention and the MLP, rotary position embeddings, SwiGLU, grouped-query attention
(Ainslie et al., arXiv 2305.13245) and no biases. Field names are the module names of Llama in transformers.
"""

from __future__ import annotations

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
from haliax import Axis, AxisSpec, NamedArray

from sophia_levanter.config.model import LlamaConfig
from sophia_levanter.models.layers import linear, normalize, rotary
from sophia_levanter.models.transformer import Block, Transformer, dropout, normal_weights

__all__ = ["Llama", "LlamaConfig"]


class Attention(eqx.Module):
    """Linear layers of causal grouped-query self-attention, with optional norms for queries and keys."""

    q_proj: hnn.Linear  # embed -> (heads, head_size)
    k_proj: hnn.Linear  # embed -> (kv_heads, head_size)
    v_proj: hnn.Linear  # embed -> (kv_heads, head_size)
    o_proj: hnn.Linear  # (heads, head_size) -> embed
    q_norm: hnn.RmsNorm | None  # over head_size
    k_norm: hnn.RmsNorm | None

    @staticmethod
    def init(config: LlamaConfig, *, key: jax.Array) -> Attention:
        k_q, k_k, k_v, k_o = jax.random.split(key, 4)
        queries, keys = (config.Heads, config.HeadSize), (config.KVHeads, config.HeadSize)
        return Attention(
            _linear(config, config.Embed, queries, key=k_q),
            _linear(config, config.Embed, keys, key=k_k),
            _linear(config, config.Embed, keys, key=k_v),
            _linear(config, queries, config.Embed, key=k_o, residual=True),
            _norm(config, config.HeadSize) if config.qk_norm else None,
            _norm(config, config.HeadSize) if config.qk_norm else None,
        )


class Mlp(eqx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    gate_proj: hnn.Linear  # embed -> mlp
    up_proj: hnn.Linear  # embed -> mlp
    down_proj: hnn.Linear  # mlp -> embed

    @staticmethod
    def init(config: LlamaConfig, *, key: jax.Array) -> Mlp:
        k_gate, k_up, k_down = jax.random.split(key, 3)
        return Mlp(
            _linear(config, config.Embed, config.Mlp, key=k_gate),
            _linear(config, config.Embed, config.Mlp, key=k_up),
            _linear(config, config.Mlp, config.Embed, key=k_down, residual=True),
        )

    def __call__(self, x: NamedArray) -> NamedArray:
        return linear(self.down_proj, hnn.silu(linear(self.gate_proj, x)) * linear(self.up_proj, x))


class LlamaBlock(Block):
    """A pre-norm transformer block."""

    config: LlamaConfig = eqx.field(static=True)
    input_layernorm: hnn.RmsNorm
    self_attn: Attention
    post_attention_layernorm: hnn.RmsNorm
    mlp: Mlp

    @staticmethod
    def init(config: LlamaConfig, *, key: jax.Array) -> LlamaBlock:
        k_attn, k_mlp = jax.random.split(key)
        return LlamaBlock(
            config,
            _norm(config, config.Embed),
            Attention.init(config, key=k_attn),
            _norm(config, config.Embed),
            Mlp.init(config, key=k_mlp),
        )

    def project(
        self, x: NamedArray, layer: NamedArray, positions: NamedArray | None
    ) -> tuple[NamedArray, NamedArray, NamedArray]:
        x, attn = normalize(self.input_layernorm, x), self.self_attn
        query, keys, values = (linear(projection, x) for projection in (attn.q_proj, attn.k_proj, attn.v_proj))
        if attn.q_norm is not None:
            query, keys = normalize(attn.q_norm, query), normalize(attn.k_norm, keys)
        theta = self.config.rope_theta
        return rotary(query, positions, theta), rotary(keys, positions, theta), values

    def project_back(self, attended: NamedArray) -> NamedArray:
        return linear(self.self_attn.o_proj, attended)

    def apply_mlp(self, x: NamedArray) -> NamedArray:
        return self.mlp(normalize(self.post_attention_layernorm, x))


class Llama(Transformer):
    """A Llama-style language model. The vocabulary is padded to a multiple of 128; callers never see the padding.

    Attributes:
        config: the model configuration.
        vocab_size: vocabulary size without padding.
        embed_tokens: token embedding, [vocab (padded), embed].
        blocks: the blocks, stacked over [layers].
        norm: the final norm.
        lm_head: output head, [vocab (padded), embed]; None if the head is tied to the token embedding.
    """

    config: LlamaConfig = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)
    embed_tokens: hnn.Embedding
    blocks: hnn.Stacked[LlamaBlock]
    norm: hnn.RmsNorm
    lm_head: hnn.Embedding | None

    @staticmethod
    def init(config: LlamaConfig, *, vocab_size: int, key: jax.Array) -> Llama:
        """Initialize the weights. The arguments and the distribution are those of `Gpt2.init`."""
        k_embed, k_blocks, k_head = jax.random.split(key, 3)

        def embedding(key: jax.Array) -> hnn.Embedding:
            Vocab = config.Vocab(vocab_size)
            return hnn.Embedding(normal_weights(config, (Vocab, config.Embed), key, hidden=False), Vocab, config.Embed)

        blocks = hnn.Stacked.init(config.Layers, LlamaBlock)(config, key=jax.random.split(k_blocks, config.num_layers))
        head = None if config.tie_embeddings else embedding(k_head)
        return Llama(config, vocab_size, embedding(k_embed), blocks, _norm(config, config.Embed), head)

    def head_weights(self) -> NamedArray:
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    def embed(self, tokens: NamedArray, positions: NamedArray | None, key: jax.Array | None = None) -> NamedArray:
        return dropout(self.config, self.embed_tokens.embed(tokens), key)

    def final_norm(self, x: NamedArray) -> NamedArray:
        return normalize(self.norm, x)


def _linear(config: LlamaConfig, In: AxisSpec, Out: AxisSpec, *, key: jax.Array, residual: bool = False) -> hnn.Linear:
    weight = normal_weights(config, hax.concat_axis_specs(In, Out), key, hidden=True, residual=residual)
    return hnn.Linear(weight, None, In, Out)


def _norm(config: LlamaConfig, axis: Axis) -> hnn.RmsNorm:
    return hnn.RmsNorm.init(axis, eps=config.layer_norm_epsilon, use_bias=False)
