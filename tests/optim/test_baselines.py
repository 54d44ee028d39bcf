import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_levanter.optim import AdamW, Lion

STEPS = 6
GRADS = np.random.default_rng(0).normal(size=(STEPS, 6)).astype(np.float32)


class Model(eqx.Module):
    weight: jax.Array
    bias: jax.Array
    steps: jax.Array
    name: str = eqx.field(static=True, default="model")

    def __call__(self, x):
        raise AssertionError("the optimizer must not call the model, nor a mask of its shape")


def start():
    return Model(jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), jnp.asarray([4.0, -1.0]), jnp.int32(7))


def grads_at(step):
    zeros = eqx.filter(start(), eqx.is_inexact_array)
    g = GRADS[step]
    return eqx.tree_at(lambda m: (m.weight, m.bias), zeros, (jnp.asarray(g[:4].reshape(2, 2)), jnp.asarray(g[4:])))


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def trajectory(optimizer, transformation=None):
    """Parameters [step, coordinate] under an optimizer, or under an optax transformation."""
    model = start()
    params = eqx.filter(model, eqx.is_inexact_array)
    state = optimizer.init(model) if transformation is None else transformation.init(params)
    update = eqx.filter_jit((optimizer if transformation is None else transformation).update)
    found = []
    for step in range(STEPS):
        updates, state = update(grads_at(step), state, model if transformation is None else params)
        model, params = eqx.apply_updates(model, updates), eqx.apply_updates(params, updates)
        assert (int(model.steps), model.name) == (7, "model")
        found.append(np.concatenate([np.ravel(params.weight), np.ravel(params.bias)]))
    return np.stack(found)


def rate(count):
    return 0.01 * (count + 1)


def test_adamw_is_optax_adamw():
    ours = trajectory(AdamW(rate, 0.8, 0.9, 1e-6, 0.3, matrices))
    theirs = trajectory(None, optax.adamw(rate, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, mask=matrices))
    np.testing.assert_array_equal(ours, theirs)


def test_lion_is_optax_lion():
    ours = trajectory(Lion(rate, 0.8, 0.9, 0.3, matrices))
    theirs = trajectory(None, optax.lion(rate, b1=0.8, b2=0.9, weight_decay=0.3, mask=matrices))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("mask", [None, matrices])
def test_adamw_by_hand(mask):
    theta = np.asarray([1, -2, 0.5, 3, 4, -1], np.float64)
    decayed = np.asarray([1, 1, 1, 1, mask is None, mask is None], np.float64)
    m = v = np.zeros(6)
    wanted = []
    for t, g in enumerate(GRADS.astype(np.float64), start=1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        ratio = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        theta = theta - 0.05 * (ratio + 0.3 * decayed * theta)
        wanted.append(theta)
    np.testing.assert_allclose(trajectory(AdamW(0.05, 0.8, 0.9, 1e-3, 0.3, mask)), wanted, rtol=1e-5)


def test_lion_by_hand():
    theta = np.asarray([1, -2, 0.5, 3, 4, -1], np.float64)
    m, wanted = np.zeros(6), []
    for g in GRADS.astype(np.float64):
        theta = theta - 0.05 * (np.sign(0.8 * m + 0.2 * g) + 0.3 * theta)
        m = 0.9 * m + 0.1 * g
        wanted.append(theta)
    np.testing.assert_allclose(trajectory(Lion(0.05, 0.8, 0.9, 0.3)), wanted, rtol=1e-5)


@pytest.mark.parametrize("cls", [AdamW, Lion])
def test_mask_tree_of_the_models_class(cls):
    mask = matrices(eqx.filter(start(), eqx.is_inexact_array))
    assert callable(mask)
    by_tree = trajectory(cls(0.05, weight_decay=0.3, weight_decay_mask=mask))
    np.testing.assert_array_equal(by_tree, trajectory(cls(0.05, weight_decay=0.3, weight_decay_mask=matrices)))


@pytest.mark.parametrize("cls", [AdamW, Lion])
def test_metrics_and_refresh(cls):
    optimizer = cls(b1=0.5, b2=0.5)
    params = {"w": jnp.zeros(2)}
    state = optimizer.init(params)
    assert optimizer.metrics(state)["momentum_norm"] == 0
    _, state = optimizer.update({"w": jnp.asarray([6.0, 8.0])}, state, params)
    metrics = optimizer.metrics(state)
    assert list(metrics) == ["momentum_norm"]
    assert float(metrics["momentum_norm"]) == pytest.approx(5)
    assert not any(optimizer.refresh_due(step) for step in range(20))


@pytest.mark.parametrize("cls", [AdamW, Lion])
def test_named_arrays(cls):
    named = {"w": hax.named(jnp.asarray([1.0, -2.0]), "embed")}
    optimizer = cls(0.1, weight_decay=0.0)
    updates, _ = optimizer.update(named, optimizer.init(named), named)
    assert updates["w"].axes == named["w"].axes
    assert updates["w"].array.tolist() == pytest.approx([-0.1, 0.1])


@pytest.mark.parametrize("cls", [AdamW, Lion])
@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", -1.0), ("b1", 1.0), ("b1", -0.1), ("b2", 1.0), ("b2", -0.1), ("weight_decay", -1.0)],
)
def test_argument_out_of_range(cls, name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value}; it must be in \[0, "):
        cls(**{name: value})


def test_eps_out_of_range():
    with pytest.raises(ValueError, match=r"^eps is -1\.0; it must be in \[0, inf\)"):
        AdamW(eps=-1.0)


@pytest.mark.parametrize("cls", [AdamW, Lion])
def test_other_trees_are_named(cls):
    params = {"w": jnp.ones(2), "b": jnp.ones(3)}
    optimizer = cls()
    with pytest.raises(ValueError, match=r"grads\['b'\] has shape missing, the parameter has \(3,\)"):
        optimizer.update({"w": jnp.ones(2)}, optimizer.init(params), params)
    with pytest.raises(ValueError, match="weight_decay_mask does not fit"):
        cls(weight_decay_mask={"w": True}).init(params)
