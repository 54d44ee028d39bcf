"""Mean and variance of each coordinate of a tree, one value after another (Welford's recurrence)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Moments(NamedTuple):
    """Running moments of a tree of arrays.

    Attributes:
        number: int32 scalar, values so far.
        mean: the mean of each coordinate.
        squares: the sum of squared differences from that mean.
    """

    number: jax.Array
    mean: PyTree
    squares: PyTree

    @staticmethod
    def like(tree: PyTree) -> Moments:
        """Those of no values, for values like a tree of arrays or `jax.ShapeDtypeStruct`s."""
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
        return Moments(jnp.zeros((), jnp.int32), zeros, zeros)

    def with_value(self, x: PyTree) -> Moments:
        """Those of one value more."""
        number = self.number + 1
        mean = jax.tree.map(lambda mean, x: mean + (x - mean) / number, self.mean, x)
        squares = jax.tree.map(
            lambda s, x, before, after: s + (x - before) * (x - after), self.squares, x, self.mean, mean
        )
        return Moments(number, mean, squares)
