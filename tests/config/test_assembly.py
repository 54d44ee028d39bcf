"""What the settings of every optimizer put around it, and what becomes of its weight decay there."""

import dataclasses

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.config.assembly import build_optimizer
from sophia_levanter.config.baselines import AdamWConfig
from sophia_levanter.config.groups import GroupConfig
from sophia_levanter.config.optimizer import OptimizerConfig, SophiaGConfig
from sophia_levanter.errors import InputError
from sophia_levanter.optim import AdamW, CautiousWeightDecay, Hyperball, ParameterGroups
from sophia_levanter.optim._trees import decay_mask_tree, trainable
from sophia_levanter.run.summary import describe_groups, describe_optimizer

GROUPS = (GroupConfig(role="vector", learning_rate="0.5 x", weight_decay=0.25),)
ALL = AdamWConfig(warmup=0, hyperball=True, cautious_weight_decay=True, groups=GROUPS)


@pytest.mark.parametrize("name", list(OptimizerConfig.get_known_choices()))
def test_every_optimizer_takes_all_of_it(name):
    config = OptimizerConfig.get_choice_class(name)(hyperball=True, cautious_weight_decay=True, groups=GROUPS)
    optimizer = build_optimizer(config, 100)
    assert type(optimizer) is Hyperball
    assert type(optimizer.optimizer) is ParameterGroups
    cautious = optimizer.optimizer.optimizer
    assert type(cautious) is CautiousWeightDecay
    assert type(cautious.optimizer) is type(config.build(100))
    decay = cautious.optimizer.weight_decay
    assert getattr(decay, "rate", decay) == 0.0


def test_nothing_is_around_an_optimizer_unless_asked_for():
    assert type(build_optimizer(AdamWConfig(), 100)) is AdamW
    assert type(build_optimizer(AdamWConfig(hyperball=True), 100).optimizer) is AdamW
    assert type(build_optimizer(AdamWConfig(cautious_weight_decay=True), 100).optimizer) is AdamW


@pytest.mark.parametrize("cautious", [False, True])
def test_what_decays(cautious, make_model):
    """Embeddings by the setting, vectors by their group's, and matrices not at all."""
    model = make_model()
    config = dataclasses.replace(ALL, weight_decay=0.5, cautious_weight_decay=cautious)
    decaying = build_optimizer(config, 100).optimizer.optimizer
    rates = decay_mask_tree(decaying.weight_decay_mask, trainable(model))
    assert decaying.weight_decay == 1.0
    assert (rates.wte.weight.array, rates.ln_f.weight.array) == (0.5, 0.25)
    block = rates.blocks.stacked
    assert {block.attn.c_attn.weight.array, block.mlp.c_proj.weight.array} == {False}


def test_a_step_of_a_model(make_model):
    """Queries, keys and values of each layer keep their norms apart; vectors move by half the rate."""
    model = make_model()
    config = dataclasses.replace(ALL, learning_rate=0.02, weight_decay=0.0, groups=(GroupConfig("ln", "0.5 x"),))
    optimizer = build_optimizer(config, 100)
    grads = jax.tree.map(jnp.cos, trainable(model))
    updates, _ = eqx.filter_jit(optimizer.update)(grads, optimizer.init(model), model)

    def norms(model):
        weight = model.blocks.stacked.attn.c_attn.weight
        sides = [axis.name for axis in weight.axes if axis.name not in ("layers", "qkv")]
        return hax.sqrt(hax.sum(hax.square(weight), axis=sides)).array

    before, after = norms(model), norms(eqx.apply_updates(model, updates))
    assert before.shape == (2, 3)
    np.testing.assert_allclose(after, before, rtol=1e-5)
    np.testing.assert_allclose(jnp.abs(updates.ln_f.weight.array), 0.01, rtol=1e-4)
    np.testing.assert_allclose(jnp.abs(updates.wte.weight.array), 0.02, rtol=1e-4)


def test_the_lines_that_say_so(make_model):
    assert list(describe_groups(ALL, make_model())) == [
        "role vector: 3 arrays, learning rate 0.0003, weight decay 0.25"
    ]
    mixed = dataclasses.replace(ALL, groups=(GroupConfig("ln|mlp", weight_decay=0.25),))
    assert list(describe_groups(mixed, make_model())) == [
        "ln|mlp: 5 arrays, learning rate 0.0006, weight decay 0.25 for the 3 arrays not on a sphere"
    ]
    line = "adamw, weight decay 0.1, cautious; hyperball: the matrices in 4 arrays keep their norms and do not decay"
    assert describe_optimizer(ALL, make_model()) == line
    assert describe_optimizer(SophiaGConfig(), make_model()) == "sophia_g, weight decay 0.2"


def test_a_class_without_a_mask_has_one_weight_decay():
    """A group's own would reach the class as a rate of 1.0 for every parameter."""

    class Plain:
        def __init__(self, learning_rate, weight_decay):
            pass

    for groups in ((), (GroupConfig("wte", "0.5 x"),)):
        assert AdamWConfig(groups=groups).arguments(Plain, 100)["weight_decay"] == 0.1
    groups = (GroupConfig("ln"), GroupConfig("wte", weight_decay=0.25))
    AdamWConfig(groups=groups, cautious_weight_decay=True).arguments(Plain, 100)
    with pytest.raises(InputError) as raised:
        AdamWConfig(groups=groups).arguments(Plain, 100)
    assert str(raised.value) == (
        "optimizer.groups or model.parametrization mup sets weight_decay 0.25 for some parameters, but "
        f"{Plain.__qualname__} decays all parameters alike; add the field weight_decay_mask to it, or remove "
        "weight_decay from the groups"
    )
