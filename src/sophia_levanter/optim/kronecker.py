"""A basis in which a matrix's curvature is closer to diagonal than in its own coordinates."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from sophia_levanter.optim.checks import check_count, check_number, whole_number
from sophia_levanter.optim.matrices import Matrices, MatrixView, matrix_views
from sophia_levanter.optim.protocol import Scalar
from sophia_levanter.optim.trees import widened

PyTree = Any


class Side(NamedTuple):
    """One side, inputs or outputs, of the matrices of a parameter, in at least float32.

    Attributes:
        moment: [matrix, n, n], the average of m m^T, or m^T m.
        vectors: [matrix, n, n], orthonormal columns, close to its eigenvectors.
    """

    moment: jax.Array
    vectors: jax.Array


Turn = tuple[Side | None, Side | None]
Turns = tuple[Turn | None, ...]


class KroneckerBasis(eqx.Module):
    """Eigenvectors of the second moments of a matrix's momentum on either side, for a diagonal h in their basis.

        L   <- b2 L + (1 - b2) m m^T            R   <- b2 R + (1 - b2) m^T m           at every refresh, m in x out
        Q_L <- qr(L Q_L)                        Q_R <- qr(R Q_R)
        G in the basis is Q_L^T G Q_R

    One step of orthogonal iteration a refresh, from the identity, follows the eigenvectors as they change (as SOAP
    does, Vyas et al. 2024, arXiv 2409.11321; Shampoo, Gupta et al. 2018, arXiv 1802.09568, has such moments of
    gradients). The diagonal in this basis is that of George et al. 2018 (arXiv 1806.03884). When the basis turns by
    A = Q_L^T Q_L,old and C likewise, a diagonal h becomes (A * A) h (C * C)^T, the diagonal of what it was.

    It holds 2 (in^2 + out^2) numbers for a matrix. A step takes the matrix into the basis and out again, by a product
    with a square matrix of each side's size both times.

    Args:
        matrices: a tree (or prefix), or a function from parameters to one, of optax's `MuonDimensionNumbers` where a
            parameter is a matrix and None where it keeps its coordinates. What is neither input nor output axis
            counts matrices. None takes the leaves with two axes: embeddings too, and in a model whose layers are
            stacked the wrong ones. Under `vmap` of the optimizer itself it must be a function or None.
        b2: decay of L and R per refresh, in [0, 1).
        max_size: a side with more coordinates than this keeps them.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of its range.
    """

    matrices: Matrices = None
    b2: Scalar = 0.9
    max_size: int = eqx.field(default=4096, static=True, converter=whole_number)

    def __check_init__(self) -> None:
        check_number("b2", self.b2, low=0, high=1)
        check_count("max_size", self.max_size)

    def init(self, params: PyTree) -> Turns:
        """The basis of the parameters' own coordinates: for each leaf its two sides, or None.

        Raises:
            ValueError, TypeError: if `matrices` does not fit the parameters; names the path.
        """
        views = matrix_views(self.matrices, params)
        return tuple(
            None if view is None else self._start(view, jnp.promote_types(leaf.dtype, jnp.float32))
            for view, leaf in zip(views, jax.tree.leaves(params), strict=True)
        )

    def _start(self, view: MatrixView, dtype: Any) -> Turn:
        count, *sizes = view.sizes

        def side(n: int) -> Side | None:
            if n > self.max_size:
                return None
            return Side(jnp.zeros((count, n, n), dtype), jnp.tile(jnp.eye(n, dtype=dtype), (count, 1, 1)))

        return side(sizes[0]), side(sizes[1])

    def at(self, turns: Turns) -> Coordinates:
        """The coordinates that a state of the basis stands for."""
        return Coordinates(self.matrices, turns)

    def observed(self, turns: Turns, tree: PyTree) -> Turns:
        """The state with the second moments of a momentum, or gradient, like the parameters in its averages.

        Moments that are not finite, as the squares of finite numbers may be, are left out.
        """
        views = matrix_views(self.matrices, tree)
        return tuple(
            None if view is None or turn is None else self._observed(turn, view.matrices(widened(x)))
            for view, turn, x in zip(views, turns, jax.tree.leaves(tree), strict=True)
        )

    def _observed(self, turn: Turn, x: jax.Array) -> Turn:
        def averaged(side: Side, second_moment: jax.Array) -> Side:
            finite = jnp.isfinite(jnp.trace(second_moment, axis1=-2, axis2=-1))[:, None, None]
            moment = self.b2 * side.moment + (1 - self.b2) * second_moment
            return side._replace(moment=jnp.where(finite, moment, side.moment))

        left, right = turn
        return (
            None if left is None else averaged(left, x @ _transposed(x)),
            None if right is None else averaged(right, _transposed(x) @ x),
        )

    def turned(self, turns: Turns, diagonal: PyTree) -> tuple[Turns, PyTree]:
        """The basis one step of orthogonal iteration on, and a diagonal, such as the curvature's, in it.

        Args:
            turns: the state before.
            diagonal: like the parameters, in the basis before.
        """
        views = matrix_views(self.matrices, diagonal)
        leaves, structure = jax.tree.flatten(diagonal)
        after = [
            (turn, h) if view is None or turn is None else self._turned(view, turn, h)
            for view, turn, h in zip(views, turns, leaves, strict=True)
        ]
        return tuple(turn for turn, _ in after), jax.tree.unflatten(structure, [h for _, h in after])

    def _turned(self, view: MatrixView, turn: Turn, h: jax.Array) -> tuple[Turn, jax.Array]:
        h = view.matrices(h)
        left, right = turn
        if left is not None:
            left, overlap = _iterated(left)
            h = jnp.square(overlap) @ h
        if right is not None:
            right, overlap = _iterated(right)
            h = h @ _transposed(jnp.square(overlap))
        return (left, right), view.parameter(h)


def _iterated(side: Side) -> tuple[Side, jax.Array]:
    """The side after, and the old vectors in the new ones' basis."""
    size = jnp.trace(side.moment, axis1=-2, axis2=-1)[:, None, None]
    # Before the first gradient there is nothing to turn to.
    turns = size > 0
    # Gradients are small, and their moments' products would leave float32's range.
    scaled = side.moment / jnp.where(turns, size, 1)
    # One by one: a batch of them takes threads that it waits for, and where all of a pool's wait (eight devices of
    # one CPU do) none is left to go on, in jaxlib 0.10.2.
    vectors = jax.lax.map(lambda x: jnp.linalg.qr(x)[0], scaled @ side.vectors)
    vectors = jnp.where(turns, vectors, side.vectors)
    return side._replace(vectors=vectors), _transposed(vectors) @ side.vectors


class Coordinates(eqx.Module):
    """The basis of a state, for trees like the parameters; by default their own coordinates.

    Args:
        matrices: as for `KroneckerBasis`.
        turns: the state; None for the parameters' own coordinates.
    """

    matrices: Matrices = None
    turns: Turns | None = None

    def enter(self, tree: PyTree) -> PyTree:
        """A tree in the basis: Q_L^T G Q_R for matrices. The shapes stay.

        Raises:
            ValueError: if the tree has another number of leaves than the parameters.
        """
        return self._map(tree, lambda x, left, right: _times(left, x, right, inverse=True))

    def leave(self, tree: PyTree) -> PyTree:
        """A tree that is in the basis in the parameters' own coordinates again: Q_L G Q_R^T."""
        return self._map(tree, lambda x, left, right: _times(left, x, right, inverse=False))

    def _map(self, tree: PyTree, function: Any) -> PyTree:
        if self.turns is None:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        if len(leaves) != len(self.turns):
            raise ValueError(f"the basis is of {len(self.turns)} parameters, and here are {len(leaves)}")
        views = matrix_views(self.matrices, tree)
        mapped = [
            x if view is None or turn is None else view.parameter(function(view.matrices(x), *turn)).astype(x.dtype)
            for x, view, turn in zip(leaves, views, self.turns, strict=True)
        ]
        return jax.tree.unflatten(structure, mapped)


def _times(left: Side | None, x: jax.Array, right: Side | None, *, inverse: bool) -> jax.Array:
    if left is not None:
        x = (_transposed(left.vectors) if inverse else left.vectors) @ x
    if right is not None:
        x = x @ (right.vectors if inverse else _transposed(right.vectors))
    return x


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)
