"""Hyper-parameters that are NumPy scalars or 0-d arrays give what Python numbers give, in every optimizer."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.optim import AdamW, KroneckerBasis, Lion, Muon, Soap, SophiaG, SophiaH, WinRateController

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
KINDS = {
    "np.float64": np.float64,
    "np.float32": np.float32,
    "0-d float64": lambda value: np.array(value, np.float64),
    "0-d float32": lambda value: np.array(value, np.float32),
    "jnp": jnp.asarray,
}


def train(make, given, dtype):
    """The updates of two steps, the second with an estimate where the optimizer takes one, and the last state."""
    optimizer = make(**given)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"w": jnp.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4), "b": jnp.linspace(0.1, 1, 4, dtype=dtype)}
    state, found = optimizer.init(params), []
    for step, key in enumerate(keys):
        grads = jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape, dtype), params)
        h_hat = jax.tree.map(jnp.square, grads) if optimizer.refresh_due(step) else None
        updates, state = optimizer.update(grads, state, params, h_hat)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        found.append(updates)
    return found, state


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_of_every_kind_give_the_same(name, dtype, x64):
    make, given = OPTIMIZERS[name]
    with jax.enable_x64(True) if x64 else contextlib.nullcontext():
        wanted = train(make, given, dtype)
        for kind, convert in KINDS.items():
            found = train(make, {key: convert(value) for key, value in given.items()}, dtype)
            assert jax.tree.structure(found) == jax.tree.structure(wanted)
            for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                assert ours.dtype == theirs.dtype, kind
                np.testing.assert_array_equal(ours, theirs, err_msg=kind)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_float32_array_keeps_the_dtypes_of_the_state(name):
    """An array may be traced, and is not made a Python number: it is computed with in its own dtype."""
    make, given = OPTIMIZERS[name]
    _, wanted = train(make, given, jnp.bfloat16)
    _, found = train(make, {key: jnp.float32(value) for key, value in given.items()}, jnp.bfloat16)
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, wanted)
