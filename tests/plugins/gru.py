"""A model: one gated recurrent unit between an embedding and a head of its own."""

from dataclasses import dataclass

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp

from sophia_levanter.config.model import ModelConfig
from sophia_levanter.config.settings import setting
from sophia_levanter.models.language_model import LanguageModel


@ModelConfig.register_subclass("gru")
@dataclass(frozen=True)
class GruConfig(ModelConfig):
    """A gated recurrent unit (Cho et al. 2014)."""

    title = "GRU"

    embed_dim: int = setting(64, "width of the embedding and of the state", low=1)

    def build(self, *, vocab_size, key):
        k_wte, k_cell, k_head = jax.random.split(key, 3)
        Vocab, Embed = self.Vocab(vocab_size), hax.Axis("embed", self.embed_dim)
        weights = [hax.random.normal(k, (Vocab, Embed)) * 0.1 for k in (k_wte, k_head)]
        cell = eqx.nn.GRUCell(self.embed_dim, self.embed_dim, key=k_cell)
        wte = hnn.Embedding(weights[0], Vocab, Embed)
        return Gru(config=self, vocab_size=vocab_size, wte=wte, cell=cell, lm_head=weights[1])

    def describe(self):
        return f"{self.embed_dim} wide, {self.seq_len} positions"


class Gru(LanguageModel):
    config: GruConfig = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)
    wte: hnn.Embedding
    cell: eqx.nn.GRUCell
    lm_head: hax.NamedArray

    def head_weights(self):
        return self.lm_head

    def final_hidden(self, tokens, key):
        x = self.wte.embed(tokens).rearrange(("position", ..., "embed"))
        inputs = x.array.reshape(x.array.shape[0], -1, x.array.shape[-1])

        def step(state, given):
            state = jax.vmap(self.cell)(given, state)
            return state, state

        _, states = jax.lax.scan(step, jnp.zeros_like(inputs[0]), inputs)
        return hax.named(states.reshape(x.array.shape), x.axes).rearrange((*tokens.axes, "embed"))
