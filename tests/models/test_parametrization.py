"""The maximal-update parametrization of the forward pass, and how it is exported."""

import dataclasses
import re

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.config.model import Gpt2Config, LlamaConfig
from sophia_levanter.data.tokenizer import load_tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.interop.architectures import architecture_of
from sophia_levanter.interop.pretrained import read_pretrained
from sophia_levanter.interop.state_dict import model_on_host, to_state_dict

SHAPE = {"num_layers": 2, "num_heads": 2, "embed_dim": 16, "seq_len": 6, "gradient_checkpointing": "none"}
GROWN = {"parametrization": "mup", "base_embed_dim": 4, "base_head_size": 2, "base_num_layers": 1}
KINDS = {
    "gpt2": Gpt2Config(**SHAPE, use_bias=True),
    "llama": LlamaConfig(**SHAPE, num_kv_heads=1),
    "qwen": LlamaConfig(**SHAPE, qk_norm=True, tie_embeddings=True),
}
TOKENS = hax.named(jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 6)), jnp.int32), ("batch", "position"))


def built(config):
    return config.build(vocab_size=100, key=jax.random.key(0))


def jaxpr(config):
    """The forward pass as it is traced, without addresses of functions."""
    traced = str(jax.make_jaxpr(lambda model: model(TOKENS).array)(built(config)))
    return re.sub("0x[0-9a-f]+", "", traced)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_a_standard_model(kind):
    base = dataclasses.replace(KINDS[kind], parametrization="mup", base_embed_dim=16)
    for a, b in zip(jax.tree.leaves(built(KINDS[kind])), jax.tree.leaves(built(base)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jaxpr(base) == jaxpr(KINDS[kind]) != jaxpr(dataclasses.replace(base, **GROWN))


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights(kind):
    """A hidden matrix is drawn 1 / sqrt(4) as large, one into the residual stream for one layer in place of two."""
    config = dataclasses.replace(KINDS[kind], **GROWN)
    standard, grown = (to_state_dict(built(c)) for c in (KINDS[kind], config))
    for name, array in standard.items():
        vector = array.ndim == 1 or "emb" in name or "wte" in name or "wpe" in name or "lm_head" in name
        into_stream = name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight"))
        factor = 1 if vector else 0.5 * (2**0.5 if into_stream else 1)
        np.testing.assert_allclose(grown[name], array * factor, rtol=1e-6, err_msg=name)


def logits(config, weights):
    """Those of a model with these weights."""
    return jax.tree.map(jnp.asarray, model_on_host(config, weights))(TOKENS).array


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_computes_the_same(kind):
    """The factors are in the weights, and the model is a standard one."""
    config = dataclasses.replace(KINDS[kind], **GROWN)
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), built(config))
    weights = architecture_of(config).fold_factors(config, to_state_dict(model))
    wanted = model(TOKENS).array
    np.testing.assert_allclose(logits(KINDS[kind], weights), wanted, rtol=0, atol=1e-4)
    assert np.abs(wanted - logits(KINDS[kind], to_state_dict(model))).max() > 0.1


def test_scores_are_divided_by_the_heads_size():
    """Times the root of the base's, so that there they are the usual ones."""
    config = dataclasses.replace(KINDS["gpt2"], **GROWN)
    block = built(config).blocks.unstacked()[0]
    rng = np.random.default_rng(0)
    x = hax.named(jnp.asarray(rng.normal(size=(2, 16)), jnp.float32), ("position", "embed"))
    plain, _, _ = block.project(x, hax.named(jnp.asarray(0), ()), None)
    query, _, _ = block.attention_inputs(x, hax.named(jnp.asarray(0), ()), None)
    # Attention divides by sqrt(8); the base's heads have 2 coordinates, and their scores are divided by sqrt(2).
    np.testing.assert_allclose(query.array / 8**0.5, plain.array * 2**0.5 / 8, rtol=1e-6)


def test_weights_of_a_standard_model_are_refused(gpt2_folder):
    config = Gpt2Config(num_layers=2, num_heads=2, embed_dim=16, seq_len=16, use_bias=True, **GROWN)
    with pytest.raises(InputError) as raised:
        read_pretrained(str(gpt2_folder), config, load_tokenizer("bytes"), dtype="float32", report=print)
    assert str(raised.value) == (
        f"model.parametrization is 'mup', but {gpt2_folder} contains the weights of a standard model; "
        "set --model.parametrization standard"
    )
