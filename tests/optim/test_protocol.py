import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_levanter.optim import (
    AdamW,
    KroneckerBasis,
    Lion,
    Muon,
    Optimizer,
    Soap,
    Sophia,
    SophiaG,
    SophiaH,
    WinRateController,
)
from sophia_levanter.optim._checks import value_at


def test_value_at():
    assert value_at("x", 0.5, jnp.int32(3)) == 0.5
    assert value_at("x", lambda count: 2 * count, jnp.int32(3)) == 6


@pytest.mark.parametrize("cls", [Sophia, SophiaG, SophiaH, AdamW, Lion, Muon, Soap])
def test_every_optimizer_can_be_driven_by_the_protocol_alone(cls):
    optimizer: Optimizer = cls(learning_rate=0.1)
    params = {"w": jnp.asarray([1.0, -2.0])}
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(params, state, params, finite=jnp.asarray(True))
    assert (np.sign(updates["w"]) == [-1, 1]).all()
    skipped, _ = jax.jit(optimizer.update)(params, state, params, finite=jnp.asarray(False))
    assert skipped["w"].tolist() == [0, 0]
    assert value_at("learning_rate", optimizer.learning_rate, jnp.int32(0)) == 0.1
    assert optimizer.refresh_due(0) in (True, False)
    assert all(value.shape == () for value in optimizer.metrics(state).values())


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 9, 1e-3)
OPTIMIZERS = {
    "AdamW": AdamW(SCHEDULE),
    "NAdamW": AdamW(SCHEDULE, nesterov=True),
    "cautious AdamW": AdamW(SCHEDULE, cautious=True),
    "Lion": Lion(SCHEDULE),
    "Muon": Muon(SCHEDULE),
    "SOAP": Soap(SCHEDULE),
    "Sophia-G": SophiaG(SCHEDULE),
    "Sophia-H": SophiaH(SCHEDULE),
    "Sophia-G in a basis": SophiaG(SCHEDULE, basis=KroneckerBasis()),
    "Sophia-H with a win rate": SophiaH(SCHEDULE, rho=WinRateController(target=0.9, initial=0.1)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_and_updates_stay_narrow_under_x64(name, dtype):
    optimizer = OPTIMIZERS[name]
    with jax.enable_x64(True):
        params = {"w": jnp.ones((4, 6), dtype), "b": jnp.ones(6, dtype)}
        state = optimizer.init(params)
        h_hat = params if isinstance(optimizer, Sophia) else None
        updates, after = optimizer.update(params, state, params, h_hat)
        for tree in (state, updates, after, optimizer.metrics(after)):
            for path, leaf in jax.tree.leaves_with_path(tree):
                assert leaf.dtype.itemsize < 8, f"{jax.tree_util.keystr(path)} is {leaf.dtype}"
