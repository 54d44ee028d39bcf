"""SOAP: AdamW in the eigenvectors of the gradients' second moments (Vyas et al. 2024, arXiv 2409.11321)."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from sophia_levanter.optim.baselines import OptaxOptimizer, check_shared
from sophia_levanter.optim.checks import check_count, check_mesh_axis, check_number, python_number, whole_number
from sophia_levanter.optim.kronecker import KroneckerBasis, Turns
from sophia_levanter.optim.matrices import Matrices
from sophia_levanter.optim.protocol import MatrixWork, Scalar, ScalarOrSchedule
from sophia_levanter.optim.trees import WeightDecayMask, decay_mask_tree

PyTree = Any


class SoapState(NamedTuple):
    """The state of `scale_by_soap`.

    Attributes:
        count: int32 scalar, updates so far.
        mu: first moment, like the parameters, in their own coordinates.
        nu: second moment, the same shapes, in the basis.
        basis: the state of the basis.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of that name, which optax hides too
    mu: PyTree
    nu: PyTree
    basis: Turns


class Soap(OptaxOptimizer):
    """SOAP (Vyas et al. 2024, Algorithm 3) for matrices; AdamW for all other parameters.

        L  <- b2 L + (1 - b2) g g^T,   R <- b2 R + (1 - b2) g^T g         every step
        Q_L <- qr(L Q_L),   Q_R <- qr(R Q_R)                              every `interval` steps, and the first ones
        m  <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) (Q_L^T g Q_R)^2
        theta <- theta - lr wd theta - lr Q_L [Q_L^T m' Q_R / (sqrt(v') + eps)] Q_R^T         m', v': bias-corrected

    The basis is `KroneckerBasis`, Sophia's, so that the two differ in what they divide by. Two things differ from the
    authors' code: it starts from the identity with an iteration in each of the first `interval` steps, where theirs
    decomposes the first gradient and takes no step; and v turns with the basis.

    Args:
        learning_rate: a number or a function of the update count.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, multiplied by the learning rate.
        weight_decay_mask: a tree (or prefix) of bools, or a function from parameters to one; None decays every leaf.
        interval: updates between two turns of the basis, at least 1.
        matrices: as for `KroneckerBasis`. None takes the leaves with two axes, embeddings too.
        max_size: a side of a matrix with more coordinates than this keeps them.
        momentum_dtype: of the first moment; None for the parameters'.
        mesh_axis: as for `KroneckerBasis`.
        gradient_transform: an optax transformation that the gradient goes through first; None for none.

    Raises:
        TypeError, ValueError: if a hyper-parameter that is a concrete number is out of its range; from `init` and
            `update`, if `matrices` does not fit the parameters.
    """

    learning_rate: ScalarOrSchedule = eqx.field(default=3e-3, converter=python_number)
    b1: Scalar = eqx.field(default=0.95, converter=python_number)
    b2: Scalar = eqx.field(default=0.95, converter=python_number)
    eps: Scalar = eqx.field(default=1e-8, converter=python_number)
    weight_decay: Scalar = eqx.field(default=0.1, converter=python_number)
    weight_decay_mask: WeightDecayMask = None
    interval: int = eqx.field(default=10, static=True, converter=whole_number)
    matrices: Matrices = None
    max_size: int = eqx.field(default=4096, static=True, converter=whole_number)
    momentum_dtype: Any = eqx.field(default=None, static=True)
    mesh_axis: str | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_shared(self)
        check_number("eps", self.eps, low=0)
        check_count("interval", self.interval)
        check_count("max_size", self.max_size)
        check_mesh_axis(self.mesh_axis)

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        """The optax transformation for these parameters."""
        basis = KroneckerBasis(self.matrices, self.b2, self.max_size, self.mesh_axis)
        return optax.chain(
            scale_by_soap(basis, self.b1, self.b2, self.eps, self.interval, self.momentum_dtype),
            optax.add_decayed_weights(self.weight_decay, decay_mask_tree(self.weight_decay_mask, params)),
            optax.scale_by_learning_rate(self.learning_rate),
        )

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """What the basis does to whole matrices, for the count of FLOPs."""
        # The gradient and the first moment go in, the step out, and both sides' moments are taken; v turns.
        return MatrixWork(4, 1, lambda step: bool(turn_due(step, self.interval)), self.max_size)


def scale_by_soap(
    basis: KroneckerBasis, b1: Scalar, b2: Scalar, eps: Scalar, interval: int, momentum_dtype: Any = None
) -> optax.GradientTransformation:
    """Adam's direction in a basis that turns every `interval` steps; the arguments are those of `Soap`."""

    def init(params: PyTree) -> SoapState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=momentum_dtype), params)
        return SoapState(jnp.zeros((), jnp.int32), mu, zeros, basis.init(params))

    def update(grads: PyTree, state: SoapState, params: PyTree | None = None) -> tuple[PyTree, SoapState]:
        count = optax.safe_increment(state.count)
        turns, nu = jax.lax.cond(
            turn_due(state.count, interval),
            lambda turns, nu: basis.turned(turns, nu),  # jax hashes a branch, and a basis of a tree has no hash
            lambda turns, nu: (turns, nu),
            basis.observed(state.basis, grads),
            state.nu,
        )
        coordinates = basis.at(turns)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(coordinates.enter(grads), nu, b2, 2)
        direction = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps),
            optax.tree.bias_correction(coordinates.enter(mu), b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        return coordinates.leave(direction), SoapState(count, mu, nu, turns)

    return optax.GradientTransformation(init, update)


def turn_due(step: Scalar, interval: int) -> Scalar:
    """Whether the basis turns at this step."""
    return (step < interval) | (step % interval == 0)
