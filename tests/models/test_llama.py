"""The Llama-style model against transformers' Llama and Qwen3."""

from pathlib import Path

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import Golden
from haliax import Axis

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.model import LlamaConfig
from sophia_levanter.config.run import check_parameters
from sophia_levanter.errors import InputError
from sophia_levanter.interop.architectures import Description, architecture_of_type
from sophia_levanter.interop.state_dict import model_on_host, to_state_dict
from sophia_levanter.models.language_model import decay_mask, matrix_axes
from sophia_levanter.models.layers import rotary
from sophia_levanter.optim._matrices import matrices_tree
from sophia_levanter.optim._trees import decay_mask_tree, trainable


def model_of(transformers, **changes):
    """The model with transformers' weights."""
    file = Path("config.json")
    architecture = architecture_of_type(file, transformers.config["model_type"])
    fields = architecture.fields(Description(file, transformers.config))
    config = LlamaConfig(**(fields | {"seq_len": 40, "gradient_checkpointing": "none"} | changes))
    return jax.tree.map(jnp.asarray, model_on_host(config, transformers.weights))


@pytest.fixture(params=["llama_forward", "qwen3_forward"])
def transformers(request, golden):
    return Golden(golden(request.param))


def test_logits_are_those_of_transformers(transformers):
    """With one implementation of attention; on CPUs the gradients have the other."""
    logits = eqx.filter_jit(lambda m, tokens: m(tokens).array)(
        model_of(transformers, attention="xla"), transformers.batch.tokens
    )
    # float32's rounding of logits up to 9; GPT-2's golden logits, up to 1.3, are held to 1e-5.
    np.testing.assert_allclose(logits, transformers.arrays["logits"], rtol=0, atol=2e-5)


def test_loss_and_gradients_are_those_of_transformers(transformers):
    model = model_of(transformers, attention="blocked", loss_block_size=16, gradient_checkpointing="full")
    loss, grads = eqx.filter_jit(eqx.filter_value_and_grad(lambda m, batch: m.losses(batch)[0]))(
        model, transformers.batch
    )
    transformers.check(loss, to_state_dict(grads))


def test_rotated_products_depend_on_the_distance_alone():
    Head, Position = Axis("head_size", 8), Axis("position", 6)
    query, key = (hax.random.normal(jax.random.key(i), Head) for i in range(2))
    queries, keys = (rotary(x.broadcast_axis(Position), None, 100.0) for x in (query, key))
    products = hax.dot(queries.rename({"position": "query"}), keys, axis=Head).array
    for distance in range(5):
        np.testing.assert_allclose(np.diagonal(products, distance), products[0, distance], rtol=1e-4)
    assert products[0, 3] != pytest.approx(float(products[0, 0]), rel=1e-2)
    at = hax.named(jnp.array([3, 1]), "batch")
    np.testing.assert_allclose(
        rotary(query.broadcast_axis(Axis("batch", 2)), at, 100.0).array, queries.array[np.array([3, 1])], rtol=1e-6
    )


def test_rotation_of_bfloat16_has_its_angles_in_float32():
    x = hax.random.normal(jax.random.key(0), (Axis("position", 600), Axis("head_size", 4)))
    half = rotary(x.astype(jnp.bfloat16), None, 1e4)
    assert half.dtype == jnp.bfloat16
    wanted = rotary(x.astype(jnp.bfloat16).astype(jnp.float32), None, 1e4).array.astype(jnp.bfloat16)
    np.testing.assert_array_equal(half.array, wanted)


def test_what_decays_and_what_has_a_basis(make_model):
    model = make_model(config_class=LlamaConfig, num_kv_heads=1, qk_norm=True, tie_embeddings=False)
    params = trainable(model)
    decays = to_state_dict(jax.tree.map(jnp.full_like, params, decay_mask_tree(decay_mask, params)))
    assert {name.split(".")[-2] for name, leaf in decays.items() if not leaf.all()} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "q_norm",
        "k_norm",
    }
    found = {}

    def note(path, leaf, entry):
        found[".".join(key.name for key in path if hasattr(key, "name")).removeprefix("blocks.stacked.")] = entry

    jax.tree_util.tree_map_with_path(note, params, matrices_tree(matrix_axes, params))
    assert {name: tuple(entry) for name, entry in found.items() if entry} == {
        # [layers, embed, heads, head_size] and [layers, heads, head_size, embed]
        "self_attn.q_proj.weight": ((1,), (2, 3)),
        "self_attn.k_proj.weight": ((1,), (2, 3)),
        "self_attn.v_proj.weight": ((1,), (2, 3)),
        "self_attn.o_proj.weight": ((1, 2), (3,)),
        # [layers, embed, mlp] and [layers, mlp, embed]
        "mlp.gate_proj.weight": ((1,), (2,)),
        "mlp.up_proj.weight": ((1,), (2,)),
        "mlp.down_proj.weight": ((1,), (2,)),
    }
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight", "self_attn.q_norm.weight"} < set(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, r"^model\.num_kv_heads 3 does not divide model\.num_heads 4; use a divisor, such as \d$"),
        ({"num_heads": 3}, r"^model\.num_heads 3 does not divide model\.embed_dim 8; use a divisor, such as \d$"),
        ({"head_size": 3}, r"^the head size is 3, but rotary position embeddings require an even size"),
        ({"num_heads": 8}, r"^the head size is 1, but rotary position embeddings require an even size"),
        ({"embed_dim": 6, "head_size": 2}, r"^model\.num_heads 4 does not divide model\.embed_dim 6"),
        ({"rope_theta": 0.0}, r"^model\.rope_theta is 0\.0; it must be above 0"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        LlamaConfig(**({"num_heads": 4, "embed_dim": 8} | changes))


def test_heads_of_keys_and_values_must_divide_over_the_devices():
    model = LlamaConfig(num_heads=8, num_kv_heads=2, embed_dim=128)
    check_parameters(TrainConfig(model=model, mesh=MeshConfig(model=2)), 2)
    with pytest.raises(
        InputError,
        match=r"^model\.num_kv_heads 2 is not divisible by the 4 devices on mesh\.model; .* or mesh\.heads null",
    ):
        check_parameters(TrainConfig(model=model, mesh=MeshConfig(model=4)), 4)


def test_sizes_that_follow_from_others():
    config = LlamaConfig(num_heads=4, embed_dim=128)
    assert (config.mlp_dim, config.kv_heads, config.head_dim) == (384, 4, 32)
    assert config.explicit() == LlamaConfig(
        num_heads=4, embed_dim=128, intermediate_dim=384, num_kv_heads=4, head_size=32
    )
    assert "4 heads (2 key/value heads)" in LlamaConfig(num_heads=4, num_kv_heads=2, embed_dim=8).describe()
