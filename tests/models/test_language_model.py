"""What the trainer knows of any model: the roles of its parameters, and the matrices that keep their norms."""

import dataclasses
import re

import equinox as eqx
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import pytest

from sophia_levanter.config.assembly import check_optimizer
from sophia_levanter.config.baselines import AdamWConfig, SoapConfig
from sophia_levanter.config.groups import GroupConfig
from sophia_levanter.config.model import Gpt2Config, LlamaConfig
from sophia_levanter.config.optimizer import SophiaGConfig
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import (
    LanguageModel,
    abstract_model,
    count_parameters,
    hyperball_matrices,
    parameter_roles,
    paths_on_hyperball,
)
from sophia_levanter.optim import ParameterGroup, groups_of
from sophia_levanter.optim._matrices import matrices_tree

SHAPE = {"num_layers": 2, "num_heads": 2, "embed_dim": 8, "seq_len": 8}
GPT2 = Gpt2Config(**SHAPE, use_bias=True)
LLAMA = LlamaConfig(**SHAPE, tie_embeddings=False)


def paths_with(role, model):
    return set(groups_of([ParameterGroup(role=role)], model, parameter_roles))


@pytest.mark.parametrize("array", [jnp.zeros, jax.ShapeDtypeStruct])
def test_only_floating_point_arrays_are_parameters(array):
    assert count_parameters({"weight": array((2, 3), jnp.bfloat16), "ids": array((5,), jnp.int32), "name": "a"}) == 6


def test_roles_of_gpt2():
    model = abstract_model(GPT2, 100)
    assert paths_with("embedding", model) == {"wte.weight", "wpe.weight"}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert paths_with("matrix", model) == {f"blocks.stacked.{layer}.weight" for layer in layers}
    vectors = {f"blocks.stacked.{layer}.bias" for layer in layers}
    vectors |= {f"{norm}.{part}" for norm in ("blocks.stacked.ln_1", "blocks.stacked.ln_2", "ln_f") for part in PARTS}
    assert paths_with("vector", model) == vectors
    with pytest.raises(ValueError, match=r"role 'head' matches no parameter"):
        paths_with("head", model)


PARTS = ("weight", "bias")


def test_an_output_head_of_its_own_is_one_and_keeps_its_norm():
    model = abstract_model(LLAMA, 100)
    assert paths_with("head", model) == {"lm_head.weight"}
    assert paths_with("embedding", model) == {"embed_tokens.weight"}
    assert len(paths_on_hyperball(model)) == 7 + 1
    entries = matrices_tree(hyperball_matrices, model)
    assert entries.lm_head.weight.array is not None and entries.embed_tokens.weight.array is None
    assert len(paths_on_hyperball(abstract_model(LlamaConfig(**SHAPE, tie_embeddings=True), 100))) == 7


def test_roles_of_arrays_that_are_traced():
    """As in a compiled step."""
    roles = {}

    def trace(model):
        roles.update(groups_of([ParameterGroup(role="head")], model, parameter_roles))

    eqx.filter_eval_shape(trace, abstract_model(LLAMA, 100))
    assert roles == {"lm_head.weight": 0}


def test_roles_of_a_plugins_model(plugin_folder):
    """Its head is a bare array, and its cell is not made of Haliax's layers."""
    from gru import GruConfig

    model = abstract_model(GruConfig(embed_dim=4), 100)
    assert paths_with("embedding", model) == {"wte.weight"}
    assert paths_with("head", model) == {"lm_head"}
    assert {path.split(".")[0] for path in paths_with("vector", model)} == {"cell"}


class Unigrams(LanguageModel):
    config: Gpt2Config = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)
    wte: hnn.Embedding

    def head_weights(self):
        return self.wte.weight

    def final_hidden(self, tokens, key):
        return self.wte.embed(tokens)


class UnigramsConfig(Gpt2Config):
    def build(self, *, vocab_size, key):
        Vocab = self.Vocab(vocab_size)
        return Unigrams(self, vocab_size, hnn.Embedding.init(Vocab, self.Embed, key=key))


def test_a_hyperball_without_matrices_is_refused():
    with pytest.raises(
        InputError, match=r"^optimizer\.hyperball is true, but the model has no matrices; set it to false$"
    ):
        check_optimizer(AdamWConfig(hyperball=True), UnigramsConfig(**SHAPE), 100)
    check_optimizer(AdamWConfig(hyperball=True), GPT2, 100)
    check_optimizer(AdamWConfig(), UnigramsConfig(**SHAPE), 100)


def test_a_group_that_decays_only_what_a_hyperball_keeps_is_refused():
    """Not where it decays something besides, or nothing."""
    alone = AdamWConfig(groups=(GroupConfig(role="vector"), GroupConfig(role="matrix", weight_decay=0.1)))
    message = (
        "optimizer.groups[1].weight_decay is 0.1, but optimizer.hyperball keeps the norms of all parameters in this "
        "group fixed; remove weight_decay from the group"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_optimizer(dataclasses.replace(alone, hyperball=True), GPT2, 100)
    check_optimizer(dataclasses.replace(alone, hyperball=True), GPT2, 100, resumes=True)
    check_optimizer(alone, GPT2, 100)
    for group in (GroupConfig("blocks", weight_decay=0.1), GroupConfig(role="matrix", weight_decay=0.0)):
        check_optimizer(AdamWConfig(hyperball=True, groups=(group,)), GPT2, 100)


def test_a_basis_that_rotates_nothing_is_refused():
    """A run that began so may resume."""
    message = (
        "optimizer.basis_max_size is 7, but the shortest side of a matrix is 8, so the Kronecker basis rotates "
        "nothing; set it to at least 8"
    )
    for config in (SoapConfig(basis_max_size=7), SophiaGConfig(basis="kronecker", basis_max_size=7)):
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            check_optimizer(config, GPT2, 100)
        check_optimizer(config, GPT2, 100, resumes=True)
        check_optimizer(config, UnigramsConfig(**SHAPE), 100)
        check_optimizer(dataclasses.replace(config, basis_max_size=8), GPT2, 100)
    check_optimizer(SophiaGConfig(basis_max_size=7), GPT2, 100)
