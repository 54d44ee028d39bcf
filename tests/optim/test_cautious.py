"""Cautious steps, alone and in Sophia and AdamW."""

import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.optim import AdamW, Sophia
from sophia_levanter.optim._optax import agreeing

STEP = jnp.array([1.0, -0.5, 0.25, 1.0])
GRAD = jnp.array([2.0, 1.0, 0.1, -3.0])  # agrees with the first and the third


def test_what_goes_up_is_left_out_and_the_rest_grows_by_as_much():
    np.testing.assert_allclose(agreeing(STEP, GRAD), [2.0, 0.0, 0.5, 0.0], rtol=1e-6)


def test_no_gradient_at_all_is_no_step():
    np.testing.assert_array_equal(agreeing(STEP, jnp.zeros(4)), np.zeros(4))


def test_few_that_agree_do_not_grow_without_bound():
    step = jnp.ones(10_000)
    grad = -jnp.ones(10_000).at[0].set(-1.0)
    assert agreeing(step, grad).max() == pytest.approx(1e3)


def _momentum_against_gradient(optimizer) -> np.ndarray:
    """The second update after a gradient that turned round in the second coordinate"""
    params = {"w": jnp.array([1.0, 1.0])}
    state = optimizer.init(params)
    h_hat = {"w": jnp.array([100.0, 100.0])} if isinstance(optimizer, Sophia) else None
    _, state = optimizer.update({"w": jnp.array([1.0, 1.0])}, state, params, h_hat)
    updates, _ = optimizer.update({"w": jnp.array([1.0, -0.1])}, state, params)
    return np.asarray(updates["w"])


def test_sophia_leaves_out_what_momentum_alone_wants():
    settings = {"learning_rate": 0.5, "b1": 0.5, "b2": 0.0, "rho": 1.0, "weight_decay": 0.0}
    settings |= {"bias_correct_momentum": False}
    plain = _momentum_against_gradient(Sophia(**settings))
    np.testing.assert_allclose(plain, [-0.5 * 0.75 / 100, -0.5 * 0.2 / 100], rtol=1e-5)
    careful = _momentum_against_gradient(Sophia(**settings, cautious=True))
    np.testing.assert_allclose(careful, [2 * plain[0], 0.0], rtol=1e-6)


def test_weight_decay_is_not_left_out():
    settings = {"learning_rate": 0.5, "b1": 0.5, "b2": 0.0, "rho": 1.0, "weight_decay": 0.1}
    assert _momentum_against_gradient(Sophia(**settings, cautious=True))[1] == pytest.approx(-0.05)
    settings = {"learning_rate": 0.5, "weight_decay": 0.1}
    assert _momentum_against_gradient(AdamW(**settings, cautious=True))[1] == pytest.approx(-0.05)


def test_adamw_is_optax_adam_of_which_the_agreeing_part_is_left():
    settings = {"learning_rate": 0.5, "weight_decay": 0.0}
    plain = _momentum_against_gradient(AdamW(**settings))
    careful = _momentum_against_gradient(AdamW(**settings, cautious=True))
    assert plain[1] < 0
    np.testing.assert_allclose(careful, [2 * plain[0], 0.0], rtol=1e-6)


@pytest.mark.parametrize("optimizer", [Sophia, AdamW])
def test_the_switch_must_be_a_truth_value(optimizer):
    with pytest.raises(TypeError, match="cautious is 1; it must be True or False"):
        optimizer(cautious=1)
