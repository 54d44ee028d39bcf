import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.optim import Sophia, SophiaG, SophiaH, WinRateController

SIZE = 2000


def controlled(**given):
    """An optimizer whose m is the gradient of the last update and whose h is the last estimate."""
    return Sophia(b1=0.0, b2=0.0, interval=1, rho=WinRateController(**given))


def measured(optimizer, rho_before, wins, size=10):
    """rho after one refresh at which `wins` of `size` coordinates are not clipped."""
    params = jnp.where(jnp.arange(size) < wins, 0.5, 2.0)
    _, state = optimizer.update(params, optimizer.init(params), params)
    state = eqx.tree_at(lambda s: s.rho, state, jnp.float32(rho_before))
    return float(optimizer.refresh(state, jnp.full(size, 1 / rho_before)).rho)


@pytest.mark.parametrize("wins", [0, 3, 4, 10])
def test_one_measurement(wins):
    """rho grows by exp(gain (target - win rate)): m is 0.5 or 2, and rho h is 1."""
    found = measured(controlled(target=0.4, initial=0.1, gain=0.25), 0.2, wins)
    assert found == pytest.approx(0.2 * np.exp(0.25 * (0.4 - wins / 10)), rel=1e-6)


def test_the_defaults_as_documented():
    controller = WinRateController()
    assert (controller.target, controller.initial, controller.gain, controller.span) == (0.3, 0.05, 2.0, 100.0)
    assert float(controller.next(jnp.float32(1.0), jnp.float32(0.2))) == pytest.approx(1.22, abs=2e-3)
    assert measured(SophiaG(b1=0.0, b2=0.0, rho="auto"), 0.05, 0) == pytest.approx(0.05 * np.exp(0.6))


@pytest.mark.parametrize(("wins", "bound"), [(0, 0.05 * 4), (10, 0.05 / 4)])
def test_rho_stays_within_the_span(wins, bound):
    optimizer = controlled(initial=0.05, span=4.0)
    assert measured(optimizer, bound, wins) == pytest.approx(bound)
    assert measured(optimizer, 2 * bound if wins == 0 else bound / 2, wins) == pytest.approx(bound)


@pytest.mark.parametrize(("cls", "initial"), [(Sophia, 0.05), (SophiaG, 0.05), (SophiaH, 0.01)])
def test_auto_begins_at_the_published_rho(cls, initial):
    optimizer = cls(rho="auto")
    params = jnp.ones(2)
    state = optimizer.init(params)
    assert optimizer.rho == WinRateController(initial=initial)
    assert (state.rho.dtype, float(state.rho)) == (jnp.float32, pytest.approx(initial))
    assert float(optimizer.metrics(state)["rho"]) == pytest.approx(initial)
    assert cls().init(params).rho is None


def test_the_first_refreshes_leave_rho_alone():
    """Before an update m is 0, which would count as won everywhere."""
    optimizer = SophiaG(rho="auto")
    params = jnp.ones(3)
    state = optimizer.init(params)
    for _ in range(3):
        state = optimizer.refresh(state, params)
        assert float(state.rho) == pytest.approx(0.05)
    _, state = optimizer.update(params, state, params, params)
    assert float(state.rho) == pytest.approx(0.05)
    _, state = optimizer.update(params, state, params, params)
    # m is all of 0.035 of the first gradient and rho h about 0.002: nothing is won.
    assert float(state.rho) == pytest.approx(0.05 * np.exp(2 * 0.3))
    assert float(optimizer.metrics(state)["rho"]) == float(state.rho)


def test_a_refresh_after_skipped_updates_only_leaves_rho_alone():
    """m is still 0."""
    optimizer = SophiaG(rho="auto")
    params = jnp.ones(3)
    state = optimizer.init(params)
    for grads in (jnp.full(3, jnp.nan), params):
        _, state = optimizer.update(grads, state, params, params)
        assert float(state.rho) == pytest.approx(0.05)
    _, state = optimizer.update(params, state, params, params)
    assert float(state.rho) == pytest.approx(0.05 * np.exp(2 * 0.3))


def test_updates_without_an_estimate_leave_rho_alone():
    optimizer = SophiaG(rho="auto")
    params = jnp.ones(3)
    _, state = optimizer.update(params, optimizer.init(params), params)
    _, state = optimizer.update(params, state, params)
    assert float(state.rho) == pytest.approx(0.05)


def test_the_update_uses_the_rho_in_the_state():
    optimizer = controlled(initial=0.05)
    params = jnp.ones(2)
    state = eqx.tree_at(lambda s: (s.rho, s.curvature), optimizer.init(params), (jnp.float32(0.5), jnp.full(2, 4.0)))
    updates, _ = optimizer.update(params, state, jnp.zeros(2))
    np.testing.assert_allclose(updates, -optimizer.learning_rate * 0.5 * np.ones(2), rtol=1e-6)


def test_the_win_rate_is_of_the_corrected_momentum_and_curvature():
    optimizer = SophiaG(
        b1=0.5, b2=0.75, rho=WinRateController(gain=1.0), bias_correct_momentum=True, bias_correct_curvature=True
    )
    params = jnp.ones(4)
    _, state = optimizer.update(jnp.asarray([0.9, 0.9, 1.1, 1.1]), optimizer.init(params), params)
    # The corrected m is the gradient and the corrected h the estimate: rho h = 1, two of four are won.
    state = optimizer.refresh(state, jnp.full(4, 20.0))
    assert float(state.rho) == pytest.approx(0.05 * np.exp(0.3 - 0.5))


def run(optimizer, steps=120):
    """The win rate after each of some steps, in a scan, where |m| is spread evenly over (0, 1) and h is 5."""

    def step(state, key):
        grads = jax.random.uniform(key, (SIZE,), minval=-1.0)
        _, state = optimizer.update(grads, state, jnp.zeros(SIZE), jnp.full(SIZE, 5.0))
        return state, optimizer.metrics(state)["win_rate"]

    keys = jax.random.split(jax.random.key(0), steps)
    state, rates = jax.lax.scan(step, optimizer.init(jnp.zeros(SIZE)), keys)
    return state.rho, rates


@pytest.mark.parametrize("initial", [0.004, 1.5])
def test_converges_to_the_target_from_either_side(initial):
    """The win rate is rho h = 5 rho here, so that the target 0.4 is at rho = 0.08."""
    rho, rates = jax.jit(lambda: run(controlled(target=0.4, initial=initial)))()
    assert float(rho) == pytest.approx(0.08, rel=0.1)
    assert float(rates[-20:].mean()) == pytest.approx(0.4, abs=0.02)
    assert abs(float(rates[0]) - 0.4) > 0.3


def test_a_batch_of_controllers():
    targets = [0.2, 0.4, 0.8]
    batch = eqx.filter_vmap(lambda target: controlled(target=target, initial=0.05))(jnp.asarray(targets))
    rho, rates = eqx.filter_jit(eqx.filter_vmap(run))(batch)
    np.testing.assert_allclose(5 * rho, targets, rtol=0.1)
    np.testing.assert_allclose(rates[:, -20:].mean(axis=1), targets, atol=0.03)


@pytest.mark.parametrize(
    ("name", "value"),
    [("target", 0.0), ("target", 1.0), ("initial", 0.0), ("gain", 0.0), ("span", 1.0), ("span", float("nan"))],
)
def test_argument_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value}; it must be in \("):
        WinRateController(**{name: value})


def test_argument_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"^target is '0.3'; it must be a number"):
        WinRateController(target="0.3")
