"""A basis in which the curvature of a matrix is closer to diagonal than in the original coordinates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from sophia_levanter.optim._checks import check_count, check_mesh_axis, check_number, python_number, whole_number
from sophia_levanter.optim._matrices import Matrices, MatrixView, by_matrix, matrix_views
from sophia_levanter.optim._protocol import Scalar
from sophia_levanter.optim._trees import upcast, wide_dtype


class Factor(NamedTuple):
    """Factor of the basis for one side (inputs or outputs) of the matrices in a parameter, in float32 or wider.

    Attributes:
        moment: moving average of m m^T (inputs) or m^T m (outputs).
        vectors: orthonormal columns that approximate the eigenvectors of `moment`.
    """

    moment: Float[Array, "matrix n n"]
    vectors: Float[Array, "matrix n n"]


# Two factors for each leaf that is a matrix, or None for any other leaf. The factor of an unrotated side is None.
BasisState = tuple[tuple[Factor | None, Factor | None] | None, ...]


class KroneckerBasis(eqx.Module):
    """A basis for Sophia's diagonal h: on each side of a matrix, the eigenvectors of the momentum's second moment.

        L   <- b2 L + (1 - b2) m m^T            R   <- b2 R + (1 - b2) m^T m           at every refresh, m in x out
        Q_L <- qr(L Q_L)                        Q_R <- qr(R Q_R)
        G in the basis is Q_L^T G Q_R

    The basis starts at the identity and tracks the eigenvectors with one step of orthogonal iteration at each refresh,
    as in SOAP (Vyas et al. 2024, arXiv 2409.11321). Shampoo (Gupta et al. 2018, arXiv 1802.09568) keeps similar moments
    of gradients; George et al. 2018 (arXiv 1806.03884) use a diagonal in such a basis. When the basis is rotated by
    A = Q_L^T Q_L,old and C = Q_R^T Q_R,old, a diagonal h becomes (A * A) h (C * C)^T, the diagonal of the rotated
    matrix.

    The state stores 2 (in^2 + out^2) values per matrix. A step projects each matrix into the basis and back; each
    projection multiplies it by one square matrix per side.

    Args:
        matrices: as for `Muon`; all other parameters keep their coordinates. `matrices=None` is wrong for models with
            stacked layers. If the optimizer itself is vmapped, `matrices` must be a function or None.
        b2: decay rate of L and R per refresh, in [0, 1).
        max_size: sides with more coordinates than this are not rotated.
        mesh_axis: mesh axis over which to divide the work on matrices; if None, every device does all of it.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or is out of range.

    Examples:
        >>> basis, params = KroneckerBasis(b2=0.0), {"w": jnp.asarray([[2.0, 0.0], [0.0, 1.0]])}
        >>> state, h = basis.rotated(basis.update_moments(basis.init(params), params), params)
        >>> jnp.abs(basis.at(state).project(params)["w"]).tolist()  # the moments are diagonal already
        [[2.0, 0.0], [0.0, 1.0]]
    """

    matrices: Matrices = None
    b2: Scalar = eqx.field(default=0.9, converter=python_number)
    max_size: int = eqx.field(default=4096, static=True, converter=whole_number)
    mesh_axis: str | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_number("b2", self.b2, low=0, high=1)
        check_count("max_size", self.max_size)
        check_mesh_axis(self.mesh_axis)

    def init(self, params: PyTree) -> BasisState:
        """Return the identity basis, that is, the original coordinates of the parameters.

        Raises:
            ValueError, TypeError: if `matrices` does not match the parameters; the error names the path.
        """

        def factor(count: int, n: int, dtype: Any) -> Factor | None:
            if n > self.max_size:
                return None
            return Factor(jnp.zeros((count, n, n), dtype), jnp.tile(jnp.eye(n, dtype=dtype), (count, 1, 1)))

        def factors(view: MatrixView, leaf: Array) -> tuple[Factor | None, Factor | None]:
            count, inputs, outputs = view.sizes
            return factor(count, inputs, wide_dtype(leaf)), factor(count, outputs, wide_dtype(leaf))

        leaves = zip(matrix_views(self.matrices, params), jax.tree.leaves(params), strict=True)
        return tuple(None if view is None else factors(view, leaf) for view, leaf in leaves)

    def width_exponent(self, inputs: int, outputs: int) -> float:
        """Return e such that muP scales the learning rate of a matrix as width^e: -1, plus 1/2 per rotated side."""
        return -1 + 0.5 * (inputs <= self.max_size) + 0.5 * (outputs <= self.max_size)

    def at(self, state: BasisState) -> Coordinates:
        """Return the coordinates defined by a state of the basis."""
        return Coordinates(self.matrices, state, self.mesh_axis)

    def update_moments(self, state: BasisState, tree: PyTree) -> BasisState:
        """Update L and R with a momentum or gradient, structured like the parameters, and return the new state.

        Moments that overflow are skipped.
        """

        def average(factor: Factor | None, x: Array, y: Array) -> Factor | None:
            if factor is None:
                return None
            new = x @ y
            finite = jnp.isfinite(jnp.trace(new, axis1=-2, axis2=-1))[:, None, None]
            moment = self.b2 * factor.moment + (1 - self.b2) * new
            return factor._replace(moment=jnp.where(finite, moment, factor.moment))

        def both(view: MatrixView, stack: Array, left: Factor | None, right: Factor | None) -> tuple:
            x = view.matrices(stack)
            return average(left, x, _transposed(x)), average(right, _transposed(x), x)

        after: list[Any] = [None] * len(state)
        for index, _, factors in self.at(state).by_matrix(jax.tree.map(upcast, tree), both):
            after[index] = factors
        return tuple(after)

    def rotated(self, state: BasisState, diagonal: PyTree) -> tuple[BasisState, PyTree]:
        """Return the basis after one step of orthogonal iteration, and the diagonal in that basis.

        Args:
            state: the old basis.
            diagonal: a diagonal in the old basis, such as the curvature, structured like the parameters.
        """
        factors, structure = jax.tree.flatten(state, is_leaf=lambda x: isinstance(x, Factor))
        iterated = by_matrix(self.mesh_axis, _iterated, factors)

        def with_vectors(part: int) -> BasisState:
            new = [f._replace(vectors=each[part]) for f, each in zip(factors, iterated, strict=True)]
            return jax.tree.unflatten(structure, new)

        # With A * A and C * C as vectors, `project_back` computes (A * A) h (C * C)^T.
        return with_vectors(0), self.at(with_vectors(1)).project_back(diagonal)


def _iterated(moment: Array, vectors: Array) -> tuple[Array, Array]:
    """Return the vectors after one iteration, and the squared coordinates of the old vectors in the new basis."""
    size = jnp.trace(moment, axis1=-2, axis2=-1)[:, None, None]
    # The moments are zero before the first gradient, so keep the identity basis.
    known = size > 0
    # Gradients are small, so products of their moments would underflow in float32.
    scaled = moment / jnp.where(known, size, 1)
    # Decompose one matrix at a time: on CPUs, a batched QR waits for threads from the pool that it runs in. With
    # several batches per step or several devices, all threads may wait and deadlock (jaxlib 0.10.2).
    after = jax.lax.map(lambda x: jnp.linalg.qr(x)[0], scaled @ vectors)
    after = jnp.where(known, after, vectors)
    return after, jnp.square(_transposed(after) @ vectors)


class Coordinates(eqx.Module):
    """Coordinates in a basis (by default, the original coordinates) for trees structured like the parameters.

    Args:
        matrices: as for `KroneckerBasis`.
        state: the state of the basis; None for the original coordinates.
        mesh_axis: as for `KroneckerBasis`.
    """

    matrices: Matrices = None
    state: BasisState | None = None
    mesh_axis: str | None = eqx.field(default=None, static=True)

    def project(self, tree: PyTree) -> PyTree:
        """Project a tree into the basis: Q_L^T G Q_R for each matrix G. Shapes do not change.

        Raises:
            ValueError: if the tree and the parameters have different numbers of leaves.
        """
        return self._map(tree, partial(_times, inverse=True))

    def project_back(self, tree: PyTree) -> PyTree:
        """Project a tree from the basis back into the original coordinates: Q_L G Q_R^T."""
        return self._map(tree, partial(_times, inverse=False))

    def by_matrix(self, tree: PyTree, function: Callable[..., PyTree]) -> list[tuple[int, MatrixView, PyTree]]:
        """Return (index, view, `function(view, stack, left, right)`) for each leaf that has a basis."""
        leaves, state = jax.tree.leaves(tree), self.state or ()
        if len(leaves) != len(state):
            raise ValueError(f"the basis has {len(state)} parameters, but the tree has {len(leaves)}")
        views = matrix_views(self.matrices, tree)
        found = [
            (index, view, (view, view.stack(x), *factors))
            for index, (x, view, factors) in enumerate(zip(leaves, views, state, strict=True))
            if view is not None and factors is not None
        ]
        results = by_matrix(self.mesh_axis, function, [item for _, _, item in found])
        return [(index, view, result) for (index, view, _), result in zip(found, results, strict=True)]

    def _map(self, tree: PyTree, function: Callable[..., Array]) -> PyTree:
        if self.state is None:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        for index, view, x in self.by_matrix(tree, function):
            leaves[index] = view.parameter(x).astype(leaves[index].dtype)
        return jax.tree.unflatten(structure, leaves)


def _times(view: MatrixView, stack: Array, left: Factor | None, right: Factor | None, *, inverse: bool) -> Array:
    x = view.matrices(stack)
    if left is not None:
        x = (_transposed(left.vectors) if inverse else left.vectors) @ x
    if right is not None:
        x = x @ (right.vectors if inverse else _transposed(right.vectors))
    return x.reshape(stack.shape)


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)
