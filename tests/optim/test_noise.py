"""The noise meter against the noise itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.optim import GaussNewtonBartlett, Hutchinson, Sophia, SophiaG

B, SIZE, STEPS, B1 = 64, 400, 300, 0.9


WATCHED = SophiaG(learning_rate=0.0, b1=B1)
PARAMS = {"a": jnp.zeros(SIZE), "b": jnp.zeros((2, SIZE // 2))}
update = jax.jit(lambda grads, state, h_hat=None: WATCHED.update(grads, state, PARAMS, h_hat)[1])


def watched(signal, *, noise=1.0, steps=STEPS, seed=0):
    """Metrics after steps whose gradients have a mean and the variance `noise / B` in each coordinate."""
    state, rng = WATCHED.init(PARAMS), np.random.default_rng(seed)
    h_hat = jax.tree.map(lambda p: jnp.full_like(p, noise), PARAMS)
    for step in range(steps):
        grads = {
            name: np.asarray(signal[name] + rng.normal(size=p.shape) * np.sqrt(noise / B), np.float32)
            for name, p in PARAMS.items()
        }
        state = update(grads, state, h_hat) if WATCHED.refresh_due(step) else update(grads, state)
    return WATCHED.metrics(state, num_targets=B)


@pytest.mark.parametrize("steps", [3, STEPS])
def test_the_critical_batch_is_where_signal_and_noise_are_equal(steps):
    """Also after few steps, when m is an average of few gradients."""
    noise = 4.0
    found = [watched({"a": 0.3, "b": 0.1}, noise=noise, steps=steps, seed=seed) for seed in range(3)]
    critical = 1 / np.mean([1 / float(metrics["critical_batch_tokens"]) for metrics in found])
    assert critical == pytest.approx(2 * SIZE * noise / (SIZE * (0.3**2 + 0.1**2)), rel=0.15)
    for name, mean in (("a", 0.3), ("b", 0.1)):
        ratio = np.mean([float(metrics[f"signal_to_noise/{name}"]) for metrics in found])
        assert ratio == pytest.approx(mean**2 * B / noise, rel=0.2)


def test_without_signal_there_is_almost_none():
    """What m holds of noise alone is taken off."""
    ratios = [float(watched({"a": 0.0, "b": 0.0}, seed=seed)["signal_to_noise/a"]) for seed in range(4)]
    assert max(ratios) < 0.02


def test_a_critical_batch_may_be_infinite():
    optimizer, params = SophiaG(), {"w": jnp.ones(3)}
    _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, params)
    assert np.isinf(float(optimizer.metrics(state, num_targets=8)["critical_batch_tokens"]))


def test_before_the_first_refresh_nothing_is_known():
    optimizer, params = SophiaG(), {"w": jnp.ones(3)}
    _, state = optimizer.update(params, optimizer.init(params), params)
    found = optimizer.metrics(state, num_targets=8)
    assert np.isnan([float(found[name]) for name in ("critical_batch_tokens", "signal_to_noise/w")]).all()


def test_only_curvature_that_is_a_variance_tells_of_noise():
    params = {"w": jnp.ones(3)}
    for optimizer, tells in ((SophiaG(), True), (Sophia(estimator=Hutchinson()), False), (Sophia(), False)):
        state = optimizer.init(params)
        assert ("critical_batch_tokens" in optimizer.metrics(state, num_targets=8)) == tells
        assert "critical_batch_tokens" not in optimizer.metrics(state)
    assert GaussNewtonBartlett().samples_targets
