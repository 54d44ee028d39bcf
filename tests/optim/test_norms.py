"""Hyperball and cautious weight decay around an optimizer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers
from trajectories import assert_trees_equal, normal, rate, run

from sophia_levanter.optim import (
    AdamW,
    CautiousWeightDecay,
    Hyperball,
    Muon,
    ParameterGroup,
    ParameterGroups,
    SophiaG,
    hyperball_weight_decay,
)

# Two layers of matrices in x out, whose axes are not the first ones; a table and a norm are none.
MATRICES = {"stack": MuonDimensionNumbers(0, 2), "table": None, "norm": None}
STEPS = 4


def tree(seed):
    shapes = {"stack": (3, 2, 4), "table": (5, 4), "norm": (4,)}
    return {name: normal(*shape, seed=seed + place) for place, (name, shape) in enumerate(shapes.items())}


START, GRADS = tree(90), [tree(10 * step) for step in range(STEPS)]


def signs(weight_decay=0.0, mask=None):
    """AdamW without memory: its direction is the sign of the gradient."""
    return AdamW(rate, b1=0.0, b2=0.0, eps=1e-30, weight_decay=weight_decay, weight_decay_mask=mask)


def doubles(tree):
    return {name: np.asarray(x, np.float64) for name, x in tree.items()}


def on_spheres(theta, g, angle, radii):
    """The update of a stack, layer by layer."""
    moved = theta.copy()
    for layer, radius in enumerate(radii):
        u = np.sign(g[:, layer])
        w = theta[:, layer] - angle * radius * u / np.linalg.norm(u)
        moved[:, layer] = radius * w / np.linalg.norm(w)
    return moved


def test_hyperball_by_hand():
    """With decay outside the spheres, and groups that halve the matrices' angle and triple the norm's rate."""
    decay = hyperball_weight_decay(MATRICES, {"stack": True, "table": True, "norm": False})
    groups = [ParameterGroup("stack", 0.5), ParameterGroup("norm", 3.0)]
    found = run(Hyperball(ParameterGroups(signs(0.3, decay), groups), MATRICES), START, GRADS)
    theta = doubles(START)
    radii = [np.linalg.norm(theta["stack"][:, layer]) for layer in range(2)]
    for t, g in enumerate(map(doubles, GRADS), start=1):
        theta = {
            "stack": on_spheres(theta["stack"], g["stack"], 0.5 * 0.01 * t, radii),
            "table": theta["table"] - 0.01 * t * (np.sign(g["table"]) + 0.3 * theta["table"]),
            "norm": theta["norm"] - 3 * 0.01 * t * np.sign(g["norm"]),
        }
        for name, wanted in theta.items():
            np.testing.assert_allclose(found[t - 1][name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", [SophiaG, AdamW])
def test_matrices_keep_their_norms_and_others_their_steps(kind):
    optimizer = kind(0.1, weight_decay=0.0)
    found, plain = run(Hyperball(optimizer, MATRICES), START, GRADS), run(optimizer, START, GRADS)

    def norms(params):
        return jnp.linalg.norm(params["stack"], axis=(0, 2))

    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_allclose(norms(ours), norms(START), rtol=1e-6)
        for name in ("table", "norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
    assert float(jnp.max(jnp.abs(norms(plain[-1]) / norms(START) - 1))) > 1e-3


def test_a_matrix_of_zeros_takes_the_optimizers_steps():
    start = {"w": jnp.zeros((2, 3)), "v": normal(2, 3)}
    grads = [{"w": normal(2, 3, seed=seed), "v": normal(2, 3, seed=seed)} for seed in range(3)]
    found, plain = run(Hyperball(signs()), start, grads), run(signs(), start, grads)
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-6)
        assert float(jnp.linalg.norm(ours["v"])) == pytest.approx(float(jnp.linalg.norm(start["v"])))


def test_rounding_does_not_add_up():
    """bfloat16 rounds to three digits, and the norm stays within that after two hundred steps."""
    optimizer = Hyperball(AdamW(0.02, b1=0.0, b2=0.0, weight_decay=0.0))
    params = {"w": normal(8, 8).astype(jnp.bfloat16)}

    def step(carry, seed):
        params, state = carry
        grads = {"w": jax.random.normal(jax.random.key(seed), (8, 8), jnp.bfloat16)}
        updates, state = optimizer.update(grads, state, params)
        return (eqx.apply_updates(params, updates), state), None

    (after, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), jnp.arange(200)))(params)
    before, now = (p["w"].astype(jnp.float32) for p in (params, after))
    assert after["w"].dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(now)) == pytest.approx(float(jnp.linalg.norm(before)), rel=1e-2)
    assert float(jnp.linalg.norm(now - before)) > 0.2 * float(jnp.linalg.norm(before))


def test_cautious_weight_decay_by_hand():
    """Where the step is zero the parameter decays, too."""
    mask = {"stack": True, "table": 0.5, "norm": False}
    grads = [g | {"stack": g["stack"].at[0].set(0.0)} for g in GRADS]
    found = run(CautiousWeightDecay(signs(), lambda count: 0.3 + count, mask), START, grads)
    theta = doubles(START)
    for t, g in enumerate(map(doubles, grads), start=1):
        for name, factor in mask.items():
            u = np.sign(g[name])
            decay = (0.3 + t - 1) * factor * (u * theta[name] >= 0)
            theta[name] = theta[name] - 0.01 * t * (u + decay * theta[name])
            np.testing.assert_allclose(found[t - 1][name], theta[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", [SophiaG, AdamW])
def test_an_optimizer_decays_where_its_step_agrees(kind):
    optimizer = kind(0.1, weight_decay=0.0)
    (ours,), (theirs,) = (run(o, START, GRADS[:1]) for o in (CautiousWeightDecay(optimizer, 0.5), optimizer))
    for name, start in START.items():
        step = theirs[name] - start
        wanted = step - jnp.where(step * start <= 0, 0.1 * 0.5 * start, 0)
        np.testing.assert_allclose(ours[name] - start, wanted, rtol=1e-4, atol=1e-6)


def both(**given):
    return Hyperball(CautiousWeightDecay(SophiaG(0.1, weight_decay=0.0, **given), 0.3), MATRICES)


@pytest.mark.parametrize("given", [None, jnp.asarray(False)])
def test_a_step_that_is_not_finite_changes_nothing_but_counts(given):
    optimizer = both()
    update = eqx.filter_jit(optimizer.update)
    _, before = update(GRADS[0], optimizer.init(START), START, jax.tree.map(jnp.square, GRADS[0]))
    bad = GRADS[1] | ({"norm": GRADS[1]["norm"].at[2].set(jnp.nan)} if given is None else {})
    updates, after = update(bad, before, START, finite=given)
    assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, START))
    floats = eqx.filter(before, eqx.is_inexact_array)
    assert_trees_equal(eqx.filter(after, eqx.is_inexact_array), floats)
    assert (int(after.count), int(after.optimizer_state.count)) == (2, 2)
    assert int(optimizer.metrics(after)["skipped_updates"]) == 1


def test_what_is_left_to_the_optimizer():
    optimizer = both(interval=3)
    state = optimizer.init(START)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), START)
    _, state = optimizer.update(GRADS[0], state, START, bad)
    assert bool(state.refresh_pending) and bool(state.optimizer_state.refresh_pending)
    assert not bool(Hyperball(AdamW(), MATRICES).init(START).refresh_pending)
    inner = optimizer.optimizer.optimizer
    assert [optimizer.refresh_due(step) for step in range(4)] == [True, False, False, True]
    assert (optimizer.learning_rate, optimizer.estimator) == (0.1, inner.estimator)
    assert optimizer.estimator_at(state) is inner.estimator
    assert optimizer.metrics(state).keys() == inner.metrics(state.optimizer_state.optimizer_state).keys()
    assert Hyperball(Muon()).matrix_work(1).newton_schulz == 5


def test_errors():
    with pytest.raises(ValueError, match=r"^matrices contains no matrix"):
        Hyperball(AdamW()).init({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"^weight_decay is -1; it must be in \[0, inf\)"):
        CautiousWeightDecay(AdamW(), -1)
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(TypeError, match=r"^state is a BaselineState; it must be the result of init\(model\)"):
        Hyperball(AdamW()).update(params, AdamW().init(params), params)
