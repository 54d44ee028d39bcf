"""Hyper-parameters of a smaller model: which factors follow from the settings, and what is refused."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.assembly import build_optimizer, describe_transfer
from sophia_levanter.config.baselines import AdamWConfig, AdEMAMixConfig, LionConfig, MuonConfig, SoapConfig
from sophia_levanter.config.groups import GroupConfig
from sophia_levanter.config.model import Gpt2Config, LlamaConfig
from sophia_levanter.config.optimizer import SophiaGConfig, SophiaHConfig
from sophia_levanter.config.transfer import width_exponents
from sophia_levanter.main import main
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.optim import AdamW, KroneckerBasis, Soap, groups_of
from sophia_levanter.optim._trees import trainable
from sophia_levanter.planning.run_plan import describe
from sophia_levanter.planning.target import Target, pretended_target

# Four times as wide and twice as deep as the base.
GROWN = Gpt2Config(
    num_layers=2,
    num_heads=2,
    embed_dim=16,
    seq_len=8,
    use_bias=True,
    parametrization="mup",
    base_embed_dim=4,
    base_head_size=2,
    base_num_layers=1,
)
STANDARD = dataclasses.replace(
    GROWN, parametrization="standard", base_embed_dim=None, base_head_size=None, base_num_layers=None
)
OPTIONS = ("--model.parametrization", "mup", "--model.base_embed_dim")
LINE = (
    "mup, 4 x the base width and 2 x the base depth, queries x 0.5, block outputs x 0.5, logits x 0.25, "
    "matrix learning rates x 0.25, gradients x 4 (x 8 in blocks)"
)


@pytest.mark.parametrize(
    ("config", "exponent"),
    [
        (AdamWConfig(), -1.0),
        (AdEMAMixConfig(), -1.0),
        (LionConfig(), -1.0),
        (SophiaGConfig(), -1.0),
        (SophiaHConfig(refresh_order="after"), -1.0),
        (SophiaGConfig(basis="kronecker"), 0.0),
        (SoapConfig(), 0.0),
        (MuonConfig(), -0.5),
        (AdamWConfig(hyperball=True), -0.5),
        (MuonConfig(hyperball=True), 0.0),
    ],
)
def test_the_exponents_of_the_optimizers(config, exponent):
    assert set(width_exponents(config, GROWN, config.build(10)).values()) == {exponent}


def test_sides_that_are_not_rotated():
    """The MLP's inner side, 64 and at the base 32."""
    model = dataclasses.replace(GROWN, base_embed_dim=8)
    found = width_exponents(SoapConfig(), model, Soap(basis=KroneckerBasis(max_size=16)))
    assert found == {
        "blocks.stacked.attn.c_attn.weight": 0.0,
        "blocks.stacked.attn.c_proj.weight": 0.0,
        "blocks.stacked.mlp.c_fc.weight": -0.5,
        "blocks.stacked.mlp.c_proj.weight": -0.5,
    }


def moved(config, model_config, model, grads):
    """The first step."""
    optimizer = build_optimizer(dataclasses.replace(config, warmup=0, learning_rate=0.01), 10, model_config)
    return optimizer.update(grads, optimizer.init(model), model)[0]


OWN = (GroupConfig("attn|wte", "0.1 x", 0.3), GroupConfig("c_fc", weight_decay=0.0), GroupConfig(role="vector"))


@pytest.mark.parametrize("cautious", [False, True])
def test_matrices_alone_take_smaller_steps_and_decay_as_before(cautious, make_model):
    """Groups of the user stay."""
    model = make_model(embed_dim=16, use_bias=True)
    config = AdamWConfig(groups=OWN, cautious_weight_decay=cautious, weight_decay=0.2)
    undecayed = dataclasses.replace(
        config, weight_decay=0.0, groups=tuple(dataclasses.replace(group, weight_decay=None) for group in OWN)
    )
    # Against the weights, so that cautious weight decay applies everywhere.
    grads = jax.tree.map(lambda p: jnp.sign(p) * 0.1, trainable(model))
    grown, standard, grown_alone, standard_alone = (
        moved(c, m, model, grads) for c in (config, undecayed) for m in (GROWN, STANDARD)
    )
    for (path, step), wanted in zip(
        jax.tree_util.tree_leaves_with_path(grown_alone), jax.tree.leaves(standard_alone), strict=True
    ):
        is_matrix = any(
            name in jax.tree_util.keystr(path) for name in ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        )
        np.testing.assert_allclose(step, (0.25 if is_matrix else 1) * wanted, rtol=1e-5, err_msg=str(path))
    decays = [
        jax.tree.map(lambda a, b: a - b, decayed, alone)
        for decayed, alone in ((grown, grown_alone), (standard, standard_alone))
    ]
    for found, wanted in zip(*map(jax.tree.leaves, decays), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-8)
    assert np.any(decays[0].blocks.stacked.mlp.c_proj.weight.array)


def test_no_wrapper_at_the_base():
    same = dataclasses.replace(GROWN, base_embed_dim=16, base_head_size=None, base_num_layers=None)
    for model in (same, STANDARD):
        assert type(build_optimizer(AdamWConfig(), 10, model)) is AdamW
        assert set(model.forward_factors().values()) == {1.0}
        assert describe_transfer(TrainConfig(model=model)) is None
    heads = dataclasses.replace(same, base_head_size=2)
    basis = SophiaGConfig(basis="kronecker", hyperball=True)  # refused at any other size
    assert str(describe_transfer(TrainConfig(model=heads, optimizer=basis))).endswith(
        "queries x 0.5, block outputs x 1, logits x 1"
    )


def test_matrices_of_a_llama():
    model = LlamaConfig(
        num_layers=4, num_heads=4, num_kv_heads=2, embed_dim=32, qk_norm=True, parametrization="mup", base_embed_dim=8
    )
    (group,) = build_optimizer(AdamWConfig(), 10, model).groups
    assert group.learning_rate == 0.25
    found = {path.split(".")[-2] for path in groups_of([group], abstract_model(model, 257))}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert model.forward_factors() == {"queries": 1.0, "block outputs": 1.0, "logits": 0.25}


def test_the_factors_are_shown(monkeypatch):
    config = TrainConfig(model=GROWN, optimizer=AdamWConfig())
    monkeypatch.setattr(Target, "devices", lambda _: jax.devices()[:1])  # a process of its own would pretend to one
    planned = itertools.islice(describe(config, "tiny", pretended_target(1, "h100"), 0.4), 5)
    assert f"parametrization   {LINE}" in list(planned)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--model.base_num_layers", "1"),
            "model.base_num_layers is 1, but model.parametrization is 'standard'; use mup or omit it",
        ),
        (
            (*OPTIONS, "8", "--model.base_num_layers", "1", "--model.scale_attn_by_inverse_layer_idx", "true"),
            "model.base_num_layers is 1, but model.scale_attn_by_inverse_layer_idx makes attention scores depend on ",
        ),
        (OPTIONS[:2], "model.base_embed_dim is missing; model.parametrization mup requires the width at which "),
        ((*OPTIONS, "0"), "model.base_embed_dim is 0; it must be between 1 and 1048576"),
        (("--model.parametrization", "mu"), "model.parametrization is 'mu'; it must be standard or mup"),
        (
            (*OPTIONS, "8", "--plugins", "adan", "--optimizer.type", "adan"),
            "model.parametrization is 'mup', but optimizer.type adan does not define how its learning rate scales "
            "with width; define width_exponent() in Adan, or set model.parametrization to standard",
        ),
        (
            (*OPTIONS, "8", "--optimizer.basis", "kronecker", "--optimizer.basis_max_size", "32"),
            "optimizer.basis_max_size: blocks.stacked.mlp.c_fc.weight (16 x 64) is not rotated on the same sides as in "
            "the base model; with model.parametrization mup, set it to at least 64",
        ),
        (
            (*OPTIONS, "32", "--optimizer.basis", "kronecker", "--optimizer.basis_max_size", "64"),
            "optimizer.basis_max_size: blocks.stacked.mlp.c_fc.weight (16 x 64) is not rotated on the same sides as in "
            "the base model; with model.parametrization mup, set it to at least 128",
        ),
        (
            (*OPTIONS, "8", "--optimizer.basis", "kronecker", "--optimizer.hyperball", "true"),
            "model.parametrization is 'mup', which does not support optimizer.hyperball with a Kronecker basis; ",
        ),
    ],
)
def test_what_is_refused(words, message, config_file, plugin_folder, capsys):
    assert main(["--config", str(config_file), *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1
