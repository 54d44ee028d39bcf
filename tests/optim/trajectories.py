"""A few steps of an optimizer on small arrays."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np


def normal(*shape, seed=0):
    """float32 of these axes."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def run(optimizer, params, grads):
    """The parameters after each gradient of a list."""
    state, update, found = optimizer.init(params), eqx.filter_jit(optimizer.update), []
    for g in grads:
        updates, state = update(g, state, params)
        params = eqx.apply_updates(params, updates)
        found.append(params)
    return found


def rate(count):
    """A learning rate that grows."""
    return 0.01 * (count + 1)
