"""AdEMAMix by hand in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import rate, run

from sophia_levanter.optim import AdEMAMix
from sophia_levanter.optim._ademamix import _slow_average

STEPS = 7
B1, B2, B3, ALPHA, EPS, DECAY = 0.8, 0.9, 0.99, 3.0, 1e-3, 0.3
RNG = np.random.default_rng(0)
START, GRADS = RNG.normal(size=(2, 3)), RNG.normal(size=(STEPS, 2, 3))


def half_life(b):
    return np.log(0.5) / np.log(b)


def schedules(t, warmup):
    """alpha, and b3 by its half-life, which grows linearly."""
    share = min(t / warmup, 1.0) if warmup else 1.0
    return share * ALPHA, 0.5 ** (1 / ((1 - share) * half_life(B1) + share * half_life(B3)))


def by_hand(warmup):
    theta, fast, slow, v = START, *np.zeros((3, 2, 3))
    for t, g in enumerate(GRADS, start=1):
        alpha, b3 = schedules(t, warmup)
        fast, slow, v = B1 * fast + (1 - B1) * g, b3 * slow + (1 - b3) * g, B2 * v + (1 - B2) * g**2
        step = (fast / (1 - B1**t) + alpha * slow) / (np.sqrt(v / (1 - B2**t)) + EPS)
        theta = theta - 0.01 * t * (step + DECAY * theta)
        yield theta


@pytest.mark.parametrize("warmup", [0, 5])
def test_steps_are_those_by_hand(warmup):
    with jax.enable_x64(True):
        start, grads = {"w": jnp.asarray(START)}, [{"w": jnp.asarray(g)} for g in GRADS]
        found = run(AdEMAMix(rate, B1, B2, B3, ALPHA, warmup, EPS, DECAY), start, grads)
        for ours, wanted in zip(found, by_hand(warmup), strict=True):
            np.testing.assert_allclose(ours["w"], wanted, rtol=1e-12)


def test_float32_keeps_the_weight_of_a_very_slow_average():
    """In float32, 1 - 0.9999 is off by 1.7e-4 of itself."""
    settings = AdEMAMix(b3=0.9999, slow_warmup=10)
    alpha, weight = _slow_average(settings, jnp.int32(10), jnp.float32)
    assert (float(alpha), float(weight)) == (5.0, pytest.approx(1e-4, rel=1e-6))
    assert float(_slow_average(settings, jnp.int32(99), jnp.float32)[1]) == float(weight)


@pytest.mark.parametrize("b3", [0.9, 0.0])
def test_without_a_fast_average_the_half_life_grows_from_nothing(b3):
    settings = AdEMAMix(b1=0.0, b3=b3, slow_warmup=4)
    weights = [float(_slow_average(settings, jnp.int32(t), jnp.float32)[1]) for t in (1, 2, 4, 9)]
    assert weights == pytest.approx([1 - b3**4, 1 - b3**2, 1 - b3, 1 - b3], rel=1e-6)


def test_the_slow_averages_stay_wide():
    """After a thousand equal gradients: in bfloat16 they would stop at 4 % and 25 % of them."""
    optimizer = AdEMAMix(b3=0.9999, momentum_dtype=jnp.bfloat16)
    params, grads = {"w": jnp.zeros(2, jnp.bfloat16)}, {"w": jnp.ones(2, jnp.bfloat16)}
    state = optimizer.init(params)
    update = jax.jit(
        lambda state: jax.lax.fori_loop(0, 1000, lambda _, s: optimizer.update(grads, s, params)[1], state)
    )
    after = update(state).optax_state[0]
    found = [tree["w"].dtype for tree in (after.mu, after.mu_slow, after.nu)]
    assert found == [jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_allclose(after.mu_slow["w"], 1 - 0.9999**1000, rtol=1e-3)
    np.testing.assert_allclose(after.nu["w"], 1 - 0.999**1000, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("b3", 1.0, r"^b3 is 1\.0; it must be in \[0, 1\)"),
        ("alpha", -1.0, r"^alpha is -1\.0; it must be in \[0, inf\)"),
        ("slow_warmup", -1, r"^slow_warmup is -1; it must be an integer of at least 0"),
    ],
)
def test_arguments_out_of_range(name, value, message):
    with pytest.raises(ValueError, match=message):
        AdEMAMix(**{name: value})
