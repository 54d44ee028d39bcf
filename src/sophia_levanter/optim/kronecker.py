"""A basis in which a matrix's curvature is closer to diagonal than in its own coordinates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from sophia_levanter.optim.checks import check_count, check_mesh_axis, check_number, python_number, whole_number
from sophia_levanter.optim.matrices import Matrices, MatrixView, by_matrix, matrix_views
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
        mesh_axis: axis of the mesh whose devices share the matrices among them, each with its own to decompose and to
            rotate; None for all of them on every device.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of its range.
    """

    matrices: Matrices = None
    b2: Scalar = eqx.field(default=0.9, converter=python_number)
    max_size: int = eqx.field(default=4096, static=True, converter=whole_number)
    mesh_axis: str | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_number("b2", self.b2, low=0, high=1)
        check_count("max_size", self.max_size)
        check_mesh_axis(self.mesh_axis)

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
        return Coordinates(self.matrices, turns, self.mesh_axis)

    def observed(self, turns: Turns, tree: PyTree) -> Turns:
        """The state with the second moments of a momentum, or gradient, like the parameters in its averages.

        Moments that are not finite, as the squares of finite numbers may be, are left out.
        """
        after: list[Turn | None] = [None] * len(turns)
        for index, _, turn in self.at(turns).by_matrix(jax.tree.map(widened, tree), self._averaged):
            after[index] = turn
        return tuple(after)

    def _averaged(self, view: MatrixView, x: jax.Array, left: Side | None, right: Side | None) -> Turn:
        def average(side: Side, second_moment: jax.Array) -> Side:
            finite = jnp.isfinite(jnp.trace(second_moment, axis1=-2, axis2=-1))[:, None, None]
            moment = self.b2 * side.moment + (1 - self.b2) * second_moment
            return side._replace(moment=jnp.where(finite, moment, side.moment))

        x = view.matrices(x)
        return (
            None if left is None else average(left, x @ _transposed(x)),
            None if right is None else average(right, _transposed(x) @ x),
        )

    def turned(self, turns: Turns, diagonal: PyTree) -> tuple[Turns, PyTree]:
        """The basis one step of orthogonal iteration on, and a diagonal, such as the curvature's, in it.

        Args:
            turns: the state before.
            diagonal: like the parameters, in the basis before.
        """
        sides, structure = jax.tree.flatten(turns, is_leaf=lambda x: isinstance(x, Side))
        iterated = by_matrix(self.mesh_axis, _iterated, sides)

        def with_vectors(part: int) -> Turns:
            vectors = [each[part] for each in iterated]
            return jax.tree.unflatten(structure, [s._replace(vectors=v) for s, v in zip(sides, vectors, strict=True)])

        # With A * A and C * C as vectors, `leave` computes (A * A) h (C * C)^T.
        return with_vectors(0), self.at(with_vectors(1)).leave(diagonal)


def _iterated(moment: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The vectors after, and the squares of the old ones' coordinates in them."""
    size = jnp.trace(moment, axis1=-2, axis2=-1)[:, None, None]
    # The moments are zero before the first gradient: the vectors stay.
    turns = size > 0
    # Gradients are small, and their moments' products would leave float32's range.
    scaled = moment / jnp.where(turns, size, 1)
    # One by one. On CPUs a batch waits for threads of the pool that it runs in: with several batches in a step, or
    # several devices, every thread may wait and none is left to finish (jaxlib 0.10.2).
    after = jax.lax.map(lambda x: jnp.linalg.qr(x)[0], scaled @ vectors)
    after = jnp.where(turns, after, vectors)
    return after, jnp.square(_transposed(after) @ vectors)


class Coordinates(eqx.Module):
    """The basis of a state, for trees like the parameters; by default their own coordinates.

    Args:
        matrices: as for `KroneckerBasis`.
        turns: the state; None for the parameters' own coordinates.
        mesh_axis: as for `KroneckerBasis`.
    """

    matrices: Matrices = None
    turns: Turns | None = None
    mesh_axis: str | None = eqx.field(default=None, static=True)

    def enter(self, tree: PyTree) -> PyTree:
        """A tree in the basis: Q_L^T G Q_R for matrices. The shapes stay.

        Raises:
            ValueError: if the tree has another number of leaves than the parameters.
        """
        return self._map(tree, partial(_times, inverse=True))

    def leave(self, tree: PyTree) -> PyTree:
        """A tree that is in the basis in the parameters' own coordinates again: Q_L G Q_R^T."""
        return self._map(tree, partial(_times, inverse=False))

    def by_matrix(self, tree: PyTree, function: Callable[..., PyTree]) -> list[tuple[int, MatrixView, PyTree]]:
        """`function(view, stack, left, right)` of each leaf that is in the basis, with its number and view.

        Raises:
            ValueError: if the tree has another number of leaves than the parameters.
        """
        leaves, turns = jax.tree.leaves(tree), self.turns or ()
        if len(leaves) != len(turns):
            raise ValueError(f"the basis is of {len(turns)} parameters, and here are {len(leaves)}")
        found = [
            (index, view, (view, view.stack(x), *turn))
            for index, (x, view, turn) in enumerate(zip(leaves, matrix_views(self.matrices, tree), turns, strict=True))
            if view is not None and turn is not None
        ]
        results = by_matrix(self.mesh_axis, function, [item for _, _, item in found])
        return [(index, view, result) for (index, view, _), result in zip(found, results, strict=True)]

    def _map(self, tree: PyTree, function: Callable[..., jax.Array]) -> PyTree:
        if self.turns is None:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        for index, view, x in self.by_matrix(tree, function):
            leaves[index] = view.parameter(x).astype(leaves[index].dtype)
        return jax.tree.unflatten(structure, leaves)


def _times(view: MatrixView, stack: jax.Array, left: Side | None, right: Side | None, *, inverse: bool) -> jax.Array:
    x = view.matrices(stack)
    if left is not None:
        x = (_transposed(left.vectors) if inverse else left.vectors) @ x
    if right is not None:
        x = x @ (right.vectors if inverse else _transposed(right.vectors))
    return x.reshape(stack.shape)


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)
