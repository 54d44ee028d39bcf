"""A few steps of an optimizer on small arrays."""

import equinox as eqx
import jax
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


def dtypes(tree):
    """The dtype in the place of each array."""
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


def assert_trees_equal(found, wanted):
    """Equal numbers, of random keys as well."""

    def compare(one, other):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)

    jax.tree.map(compare, found, wanted)
