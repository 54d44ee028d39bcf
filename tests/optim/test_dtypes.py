"""Which dtypes states and steps have, whatever the dtypes of parameters, gradients and hyper-parameters."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import assert_trees_equal, dtypes

from sophia_levanter.optim import (
    AdamW,
    AdEMAMix,
    KroneckerBasis,
    Lion,
    Muon,
    OptaxOptimizer,
    Soap,
    Sophia,
    SophiaG,
    SophiaH,
    WinRateController,
)

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 9, 1e-3)
# Each is exact in float32, so that every kind of number holds the same.
RATES = {name: float(np.float32(value)) for name, value in {"learning_rate": 1e-3, "weight_decay": 0.1}.items()}
DECAYS = {name: float(np.float32(value)) for name, value in {"b1": 0.965, "b2": 0.99}.items()}
EPS = {"eps": float(np.float32(1e-8))}
SOPHIA = RATES | DECAYS | EPS | {"rho": float(np.float32(0.05))}
OPTIMIZERS = {
    "AdamW": (AdamW, RATES | DECAYS | EPS),
    "NAdamW": (functools.partial(AdamW, nesterov=True), RATES | DECAYS | EPS),
    "cautious AdamW": (functools.partial(AdamW, cautious=True), RATES | DECAYS | EPS),
    "Lion": (Lion, RATES | DECAYS),
    "Muon": (Muon, RATES | DECAYS | EPS | {"beta": float(np.float32(0.95))}),
    "Soap": (Soap, RATES | DECAYS | EPS),
    "AdEMAMix": (
        functools.partial(AdEMAMix, slow_warmup=3),
        RATES | DECAYS | EPS | {"b3": float(np.float32(0.9999)), "alpha": 5.0},
    ),
    "SophiaG": (SophiaG, SOPHIA),
    "SophiaH": (functools.partial(SophiaH, cautious=True), SOPHIA),
    "Kronecker": (
        lambda b2, basis_b2, **given: SophiaG(b2=b2, basis=KroneckerBasis(b2=basis_b2), **given),
        SOPHIA | {"basis_b2": float(np.float32(0.9))},
    ),
    "win rate": (
        lambda target, gain, rho, **given: SophiaG(rho=WinRateController(target, rho, gain), **given),
        SOPHIA | {"target": float(np.float32(0.3)), "gain": 2.0},
    ),
}
NUMPY = [np.float64, np.float32, lambda value: np.array(value, np.float64), lambda value: np.array(value, np.float32)]


def typed_leaves(optimizer):
    return [(type(leaf), leaf) for leaf in jax.tree.leaves(optimizer) if not callable(leaf)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numpy_numbers_become_python_numbers(name):
    """So that the steps are the same, and bfloat16 is not promoted."""
    make, given = OPTIMIZERS[name]
    wanted = typed_leaves(make(**given))
    assert len(wanted) >= len(given)
    for convert in NUMPY:
        assert typed_leaves(make(**{key: convert(value) for key, value in given.items()})) == wanted


def params_of(dtype):
    return {"w": jnp.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4), "b": jnp.linspace(0.1, 1, 4, dtype=dtype)}


def two_steps(make, given, dtype):
    """The updates of two steps, the first with an estimate where the optimizer takes one, and the last state."""
    optimizer, params, found = make(**given), params_of(dtype), []
    state = optimizer.init(params)
    for step, key in enumerate(jax.random.split(jax.random.key(0), 2)):
        grads = jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape, dtype), params)
        h_hat = jax.tree.map(jnp.square, grads) if optimizer.refresh_due(step) else None
        updates, state = optimizer.update(grads, state, params, h_hat)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        found.append(updates)
    return found, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_jax_numbers_give_the_same_steps(name):
    """float64 numbers would promote bfloat16 if they were not weakly typed, as would float32 numbers."""
    make, given = OPTIMIZERS[name]
    with jax.enable_x64(True):
        wanted = two_steps(make, given, jnp.bfloat16)
        found = two_steps(make, {key: jnp.asarray(value) for key, value in given.items()}, jnp.bfloat16)
        assert dtypes(found) == dtypes(wanted)
        assert_trees_equal(found, wanted)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_float32_array_keeps_the_dtypes_of_the_state(name):
    """An array may be traced, and is not made a Python number: it is computed with in its own dtype."""
    make, given = OPTIMIZERS[name]
    arrays = {key: jnp.float32(value) for key, value in given.items()}
    _, wanted = jax.eval_shape(lambda: two_steps(make, given, jnp.bfloat16))
    _, found = jax.eval_shape(lambda: two_steps(make, arrays, jnp.bfloat16))
    assert dtypes(found) == dtypes(wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_dtype_is_wider_than_that_of_the_parameters_under_x64(name, dtype):
    make, given = OPTIMIZERS[name]
    optimizer = make(**given | {"learning_rate": SCHEDULE})

    def step(params):
        state = optimizer.init(params)
        updates, after = optimizer.update(params, state, params, params if optimizer.refresh_due(0) else None)
        return state, updates, after, optimizer.metrics(after)

    with jax.enable_x64(True):
        params = params_of(dtype)
        found = state, updates, after, _ = jax.eval_shape(step, params)
    assert dtypes(updates) == dtypes(params)
    assert dtypes(after) == dtypes(state)
    for path, leaf in jax.tree.leaves_with_path(found):
        assert dtype == "float64" or leaf.dtype.itemsize < 8, f"{jax.tree_util.keystr(path)} is {leaf.dtype}"


class PlugIn(OptaxOptimizer):
    learning_rate: float = 0.1

    def transformation(self, params):
        return optax.sgd(self.learning_rate, momentum=0.9)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "plug-in"])
def test_wide_gradients_leave_narrow_parameters_narrow(name):
    """The trainer sums gradients in float32."""
    make, given = (OPTIMIZERS | {"plug-in": (PlugIn, {})})[name]
    params, optimizer = params_of(jnp.bfloat16), make(**given)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params_of(jnp.float32), state, params)
    assert dtypes(updates) == dtypes(params)
    assert dtypes(after) == dtypes(state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_sophias_state_goes_through_scans_with_wide_gradients(dtype):
    with jax.enable_x64(True):
        params, wide = {"w": jnp.ones(2, dtype)}, {"w": jnp.ones(2, jnp.float64)}
        optimizer = SophiaG.paper(learning_rate=jnp.asarray(0.1), b1=jnp.asarray(0.9), rho="auto")
        state = eqx.filter_eval_shape(optimizer.init, params)
        updates, after = eqx.filter_eval_shape(optimizer.update, params, state, params, wide)
        assert dtypes(after) == dtypes(state)
        assert (updates["w"].dtype, after.momentum["w"].dtype) == (dtype, dtype)
        assert after.curvature["w"].dtype == jnp.promote_types(dtype, jnp.float32)


def test_a_strongly_typed_b2_leaves_the_curvatures_dtype():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(2, jnp.float32)}
        optimizer = SophiaG(b2=jnp.float64(0.99))
        assert optimizer.refresh(optimizer.init(params), params).curvature["w"].dtype == jnp.float32


def test_a_hundred_small_averages_of_bfloat16_parameters():
    optimizer = SophiaG(1.0, weight_decay=0.0, rho=1.0, bias_correct_momentum=False, bias_correct_curvature=False)
    start = {"w": jnp.ones(1, jnp.bfloat16)}
    state, refresh = optimizer.init(start), eqx.filter_jit(optimizer.refresh)
    # With weight 0.01 each they would stop growing near 0.5 in bfloat16.
    for _ in range(100):
        state = refresh(state, start)
    assert float(state.curvature["w"][0]) == pytest.approx(1 - 0.99**100, rel=1e-4)
    updates, _ = optimizer.update({"w": jnp.ones(1)}, state, start)
    assert float(updates["w"][0]) == pytest.approx(-0.035 / (1 - 0.99**100), rel=1e-2)


def test_momentum_and_curvature_may_be_narrow():
    params = {"w": jnp.asarray([1.0, -2.0])}
    settings = {"b1": 0.5, "b2": 0.75, "rho": 0.5}
    narrow = Sophia(**settings, momentum_dtype=jnp.bfloat16, curvature_dtype=jnp.bfloat16)
    # Numbers that bfloat16 has, so that only the order of rounding could tell.
    grads, h_hat = {"w": jnp.asarray([0.5, 0.25])}, {"w": jnp.asarray([2.0, 0.5])}
    (ours, after), (theirs, expected) = (
        optimizer.update(grads, optimizer.init(params), params, h_hat) for optimizer in (narrow, Sophia(**settings))
    )
    assert_trees_equal(ours, theirs)
    for found, wanted in ((after.momentum, expected.momentum), (after.curvature, expected.curvature)):
        assert (found["w"].dtype, wanted["w"].dtype, ours["w"].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
        np.testing.assert_array_equal(found["w"].astype(jnp.float32), wanted["w"])


def test_narrow_averages_are_computed_wide():
    """In bfloat16 the sum of 1 and 0.01 times 1.9 would be rounded twice."""
    params, ones = {"w": jnp.ones(1)}, {"w": jnp.ones(1, jnp.bfloat16)}
    optimizer = Sophia(b1=0.9, b2=0.99, momentum_dtype=jnp.bfloat16, curvature_dtype=jnp.bfloat16)
    state = optimizer.init(params)._replace(momentum=ones, curvature=ones)
    after = optimizer.refresh(state, {"w": jnp.full(1, 1.9)})
    assert after.curvature["w"] == jnp.asarray(0.99 + 0.01 * 1.9, jnp.bfloat16)
    _, after = optimizer.update({"w": jnp.full(1, 1.3)}, state, params)
    assert after.momentum["w"] == jnp.asarray(0.9 + 0.1 * 1.3, jnp.bfloat16)


@pytest.mark.parametrize("basis", [None, KroneckerBasis()])
def test_narrow_states_keep_their_dtypes(basis):
    params = {"w": jnp.ones((3, 4))}
    optimizer = Sophia(basis=basis, momentum_dtype=jnp.bfloat16, curvature_dtype=jnp.bfloat16)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params, params)
    assert dtypes(after) == dtypes(state)
    assert updates["w"].dtype == jnp.float32


@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap, AdEMAMix])
def test_a_narrow_momentum_of_a_baseline(cls):
    """Its dtype stays, and the steps stay near those of a wide one."""
    params = {"w": jnp.asarray([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])}

    def run(optimizer):
        state, steps, update = optimizer.init(params), [], eqx.filter_jit(optimizer.update)
        for step in range(5):
            updates, state = update({"w": np.cos(params["w"] + step)}, state, params)
            steps.append(updates["w"])
        return jnp.stack(steps), state

    (narrow, state), (wide, _) = run(cls(0.1, momentum_dtype=jnp.bfloat16)), run(cls(0.1))
    assert jnp.dtype(jnp.bfloat16) in {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert narrow.dtype == jnp.float32
    assert jnp.linalg.norm(narrow - wide) < 0.05 * jnp.linalg.norm(wide)


@pytest.mark.parametrize("name", ["momentum_dtype", "curvature_dtype"])
@pytest.mark.parametrize("value", ["bfloat17", jnp.int32, 3.0])
def test_what_is_not_a_dtype_is_refused(name, value):
    with pytest.raises(
        TypeError, match=rf"^{name} is .*; it must be a floating-point dtype such as jnp.bfloat16, or None$"
    ):
        Sophia(**{name: value})
