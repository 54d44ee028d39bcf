"""Groups of parameters around an optimizer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import run

from sophia_levanter.optim import (
    AdamW,
    CautiousWeightDecay,
    Hyperball,
    ParameterGroup,
    ParameterGroups,
    SophiaG,
    group_weight_decay,
    groups_of,
)
from sophia_levanter.optim._groups import ScaledGradients

GROUPS = [ParameterGroup("embed|head", 0.1, 0.0), ParameterGroup("weight", 0.5, 0.3), ParameterGroup("bias", 2.0)]
MASK = {"embed": True, "block": {"weight": True, "bias": False}, "norm": True}


def parameters(seed):
    rng = np.random.default_rng(seed)
    shapes = {"embed": (3, 2), "block": {"weight": (2, 2), "bias": (2,)}, "norm": (2,)}
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple))


def stepped(optimizer):
    return run(optimizer, parameters(0), [parameters(seed) for seed in (1, 2, 3)])[-1]


@pytest.mark.parametrize("kind", [SophiaG, AdamW])
def test_a_group_has_the_steps_of_an_optimizer_with_its_settings(kind):
    """Each array alone moves as under an optimizer with its group's learning rate and decay."""
    mask = group_weight_decay(GROUPS, 0.2, MASK)
    grouped = stepped(ParameterGroups(kind(learning_rate=0.1, weight_decay=1.0, weight_decay_mask=mask), GROUPS))
    wanted = {
        "embed": (0.01, 0.0, lambda p: p["embed"]),
        "weight": (0.05, 0.3, lambda p: p["block"]["weight"]),
        "bias": (0.2, 0.0, lambda p: p["block"]["bias"]),
        "norm": (0.1, 0.2, lambda p: p["norm"]),
    }
    for rate, decay, leaf in wanted.values():
        alone = stepped(kind(learning_rate=jnp.float32(rate), weight_decay=jnp.float32(decay)))  # one program for all
        np.testing.assert_allclose(leaf(grouped), leaf(alone), rtol=1e-5)


def test_a_step_that_is_not_finite_is_skipped():
    optimizer = ParameterGroups(SophiaG(), GROUPS)
    params = parameters(0)
    bad = eqx.tree_at(lambda p: p["norm"], parameters(1), jnp.asarray([1.0, jnp.nan]))
    updates, state = optimizer.update(bad, optimizer.init(params), params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert int(optimizer.metrics(state)["skipped_updates"]) == 1


def test_unclipped_coordinates_are_those_of_the_optimizer():
    params, optimizer = parameters(0), ParameterGroups(SophiaG(rho=0.7), GROUPS)
    _, state = optimizer.update(parameters(1), optimizer.init(params), params, parameters(2))
    found = jax.tree.leaves(optimizer.unclipped(state))
    rate = sum(int(x.sum()) for x in found) / sum(x.size for x in found)
    assert 0 < rate < 1 and rate == pytest.approx(float(optimizer.metrics(state)["win_rate"]))
    for wrapped in (Hyperball(optimizer), ParameterGroups(CautiousWeightDecay(SophiaG(rho=0.7), 0.1), GROUPS)):
        _, state = wrapped.update(parameters(1), wrapped.init(params), params, parameters(2))
        for x, y in zip(jax.tree.leaves(wrapped.unclipped(state)), found, strict=True):
            np.testing.assert_array_equal(x, y)
    clips_none = ParameterGroups(AdamW(), GROUPS)
    assert clips_none.unclipped(clips_none.init(params)) is None


def test_the_first_group_that_matches_counts():
    assert groups_of([ParameterGroup("weight|bias"), ParameterGroup("block|norm")], parameters(0)) == {
        "block.bias": 0,
        "block.weight": 0,
        "norm": 1,
    }


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([ParameterGroup("wte")], r"groups\[0\].match 'wte' matches no parameter; choose from \['block.bias'"),
        (
            [ParameterGroup("block"), ParameterGroup("bias")],
            r"groups\[1\].match 'bias' matches no parameter that is not already in an earlier group",
        ),
    ],
)
def test_a_group_without_parameters_is_an_error(groups, message):
    with pytest.raises(ValueError, match=message):
        ParameterGroups(AdamW(), groups).init(parameters(0))


ROLES = {"embed": "embedding", "block": {"weight": "matrix", "bias": "vector"}, "norm": "vector"}
BY_ROLE = [ParameterGroup("bias", 2.0), ParameterGroup(role="vector", learning_rate=0.5, weight_decay=0.3)]


def test_groups_by_role():
    """With groups by path in their order; roles may be a prefix or a function."""
    for roles in (ROLES, lambda params: ROLES, ROLES | {"block": "vector"}):
        found = groups_of(BY_ROLE, parameters(0), roles)
        assert found.pop("block.weight", 1) == 1
        assert found == {"block.bias": 0, "norm": 1}
    mask = group_weight_decay(BY_ROLE, 0.2, MASK, ROLES)
    assert mask(parameters(0)) == {"embed": 0.2, "block": {"weight": 0.2, "bias": 0.0}, "norm": 0.3}
    optimizer = ParameterGroups(AdamW(0.1, weight_decay=0.0), BY_ROLE, ROLES)
    updates, _ = optimizer.update(parameters(1), optimizer.init(parameters(0)), parameters(0))
    sizes = {name: float(jnp.max(jnp.abs(x))) for name, x in (updates | updates["block"]).items() if name != "block"}
    assert sizes == pytest.approx({"embed": 0.1, "weight": 0.1, "bias": 0.2, "norm": 0.05}, rel=1e-5)


@pytest.mark.parametrize(
    ("groups", "roles", "message"),
    [
        (
            ["head"],
            ROLES,
            r"^groups\[0\]\.role 'head' matches no parameter; choose from \['embedding', 'matrix', 'vector'\]",
        ),
        (
            ["vector", "vector"],
            ROLES,
            r"^groups\[1\]\.role 'vector' matches no parameter that is not already in an",
        ),
        (["vector"], None, r"^a group has the role 'vector', but roles is None; it must specify each parameter's role"),
        (["vector"], {"embed": "embedding"}, r"^roles does not match the parameters: it has no entry for \['block'\]"),
    ],
)
def test_roles_that_do_not_fit(groups, roles, message):
    with pytest.raises(ValueError, match=message):
        ParameterGroups(AdamW(), [ParameterGroup(role=role) for role in groups], roles).init(parameters(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "match is None and role is None; specify exactly one of them"),
        (("a", 1.0, None, "matrix"), "match is 'a' and role is 'matrix'; specify exactly one of them"),
        (("(",), "match '\\(' is not a valid regular expression"),
        (("a", -1.0), "learning_rate"),
        (("a", 1.0, -1.0), "weight_decay"),
    ],
)
def test_bad_groups(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParameterGroup(*arguments)


@pytest.mark.parametrize(
    ("scaled", "plain", "curvature"),
    [(AdamW(eps=0.5), AdamW(eps=0.125), None), (SophiaG(rho=0.5, eps=0.5), SophiaG(rho=2.0, eps=0.125), True)],
    ids=["adamw", "sophia_g"],
)
def test_scaled_gradients_are_another_eps_and_rho(scaled, plain, curvature):
    """4 times the gradient and 16 times the curvature is a fourth of eps and 4 times rho."""
    params, grads = parameters(0), parameters(1)
    h_hat = None if curvature is None else jax.tree.map(jnp.square, parameters(2))
    scaled = ScaledGradients(scaled, lambda _: 4.0, lambda _: 16.0)
    found, _ = scaled.update(grads, scaled.init(params), params, h_hat)
    wanted, _ = plain.update(grads, plain.init(params), params, h_hat)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
