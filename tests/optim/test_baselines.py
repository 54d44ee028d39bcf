"""AdamW and Lion against optax, and what Muon and Soap share with them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import rate

from sophia_levanter.optim import AdamW, AdEMAMix, Lion, Muon, Soap

BASELINES = [AdamW, Lion, Muon, Soap, AdEMAMix]
STEPS = 6
GRADS = np.random.default_rng(0).normal(size=(STEPS, 6)).astype(np.float32)


class Model(eqx.Module):
    weight: jax.Array
    bias: jax.Array
    steps: jax.Array
    name: str = eqx.field(static=True, default="model")

    def __call__(self, x):
        raise AssertionError("the optimizer must not call the model, nor a mask of its shape")


START = Model(jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), jnp.asarray([4.0, -1.0]), jnp.int32(7))
PARAMS = eqx.filter(START, eqx.is_inexact_array)


def flat(model):
    return np.concatenate([np.ravel(model.weight), np.ravel(model.bias)])


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def trajectory(optimizer, model):
    """Parameters [step, coordinate] under an optimizer, or under an optax transformation."""
    state, update, found = optimizer.init(model), eqx.filter_jit(optimizer.update), []
    for g in jnp.asarray(GRADS):
        grads = eqx.tree_at(lambda m: (m.weight, m.bias), PARAMS, (g[:4].reshape(2, 2), g[4:]))
        updates, state = update(grads, state, model)
        model = eqx.apply_updates(model, updates)
        found.append(flat(model))
    return np.stack(found), model


ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.3}
LION = {"b1": 0.8, "b2": 0.9, "weight_decay": 0.3}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (AdamW(rate, 0.8, 0.9, 1e-3, 0.3), optax.adamw(rate, **ADAM)),
        (
            AdamW(rate, 0.8, 0.9, 1e-3, 0.3, matrices, nesterov=True),
            optax.adamw(rate, **ADAM, mask=matrices, nesterov=True),
        ),
        (Lion(rate, 0.8, 0.9, 0.3, matrices), optax.lion(rate, **LION, mask=matrices)),
    ],
    ids=["adamw", "nadamw", "lion"],
)
def test_steps_are_those_of_optax(ours, theirs):
    found, model = trajectory(ours, START)
    assert (int(model.steps), model.name) == (7, "model")
    np.testing.assert_array_equal(found, trajectory(theirs, PARAMS)[0])


@pytest.mark.parametrize("cls", BASELINES)
def test_a_mask_tree_of_the_models_class_is_not_called(cls):
    mask = matrices(PARAMS)
    assert callable(mask)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for given in (mask, matrices):
        optimizer = cls(0.5, weight_decay=0.2, weight_decay_mask=given)
        updates, _ = optimizer.update(zeros, optimizer.init(START), START)
        np.testing.assert_allclose(updates.weight, -0.1 * START.weight, rtol=1e-6)
        assert not updates.bias.any()


@pytest.mark.parametrize("cls", BASELINES)
def test_metrics_and_refresh(cls):
    """Also where a parameter has the name of the moment."""
    optimizer = cls(b1=0.5, b2=0.5)
    params = {"mu": jnp.zeros(2)}
    state = optimizer.init(params)
    assert optimizer.metrics(state)["momentum_norm"] == 0
    _, state = optimizer.update({"mu": jnp.asarray([6.0, 8.0])}, state, params)
    metrics = optimizer.metrics(state)
    assert list(metrics) == ["momentum_norm"]
    assert float(metrics["momentum_norm"]) == pytest.approx(5)
    assert not any(optimizer.refresh_due(step) for step in range(20))


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", -1.0), ("b1", 1.0), ("b1", -0.1), ("b2", 1.0), ("b2", -0.1), ("weight_decay", -1.0)],
)
def test_argument_out_of_range(name, value):
    """All baselines check these in one place, as the next test shows."""
    with pytest.raises(ValueError, match=rf"^{name} is {value}; it must be in \[0, "):
        AdamW(**{name: value})


@pytest.mark.parametrize("cls", BASELINES)
def test_argument_of_the_wrong_kind(cls):
    with pytest.raises(
        TypeError, match=r"^learning_rate is '0\.1'; it must be a number or a function of the update count"
    ):
        cls(learning_rate="0.1")
    with pytest.raises(TypeError, match=r"^weight_decay is a function; it must be a number"):
        cls(weight_decay=lambda count: 0.1)


@pytest.mark.parametrize("cls", [AdamW, Muon, Soap, AdEMAMix])
def test_eps_out_of_range(cls):
    with pytest.raises(ValueError, match=r"^eps is -1\.0; it must be in \[0, inf\)"):
        cls(eps=-1.0)


def test_nesterov_is_a_switch():
    with pytest.raises(TypeError, match=r"^nesterov is 1; it must be True or False"):
        AdamW(nesterov=1)
