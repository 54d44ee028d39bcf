import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.optim import AdamW, Lion, Muon, Optimizer, Soap, Sophia, SophiaG, SophiaH
from sophia_levanter.optim.protocol import value_at


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
