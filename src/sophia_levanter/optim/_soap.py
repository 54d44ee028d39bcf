"""SOAP: AdamW in the eigenbasis of the second moments of gradients (Vyas et al. 2024, arXiv 2409.11321)."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from sophia_levanter.optim._baselines import OptaxOptimizer, check_shared, decayed_and_scaled
from sophia_levanter.optim._checks import check_count, check_number, python_number, whole_number
from sophia_levanter.optim._kronecker import BasisState, KroneckerBasis
from sophia_levanter.optim._protocol import MatrixWork, Scalar, ScalarOrSchedule
from sophia_levanter.optim._trees import WeightDecayMask


class SoapState(NamedTuple):
    """State of `scale_by_soap`.

    Attributes:
        count: int32 scalar, the number of updates so far.
        mu: first moment, structured like the parameters, in the original coordinates.
        nu: second moment, with the same shapes, in the basis.
        basis: the state of the basis.
    """

    count: Array  # type: ignore[assignment]  # shadows tuple.count, as in optax
    mu: PyTree
    nu: PyTree
    basis: BasisState


class Soap(OptaxOptimizer):
    """SOAP (Vyas et al. 2024, Algorithm 3) for matrices, and AdamW for all other parameters.

        L  <- b2 L + (1 - b2) g g^T,   R <- b2 R + (1 - b2) g^T g         every step, with the basis's b2
        Q_L <- qr(L Q_L),   Q_R <- qr(R Q_R)                  each of the first `interval` steps, then every `interval`
        m  <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) (Q_L^T g Q_R)^2
        theta <- theta - lr wd theta - lr Q_L [Q_L^T m' Q_R / (sqrt(v') + eps)] Q_R^T         m', v': bias-corrected

    SOAP uses Adam's second moment in Sophia's `KroneckerBasis`, so the two optimizers differ in their denominators.
    There are three differences from the authors' code. First, the basis starts at the identity and is iterated in each
    of the first `interval` steps; their code instead uses the first step only to decompose the gradient. Second, L, R
    and the basis are updated before the step, not after it. Third, v is rotated with the basis.

    Args:
        interval: number of updates between rotations of the basis, at least 1.
        basis: the basis, which also specifies the decay rate of L and R.
        learning_rate, b1, b2, eps, weight_decay, weight_decay_mask, momentum_dtype, gradient_transform: as for `AdamW`.

    Raises:
        TypeError, ValueError: if a concrete hyper-parameter is out of range; from `init` and `update`, if
            `basis.matrices` does not match the parameters.

    Examples:
        >>> optimizer, params = Soap(basis=KroneckerBasis(b2=0.95, max_size=512)), {"w": jnp.ones((2, 3))}
        >>> optimizer.init(params).optax_state[0].basis[0][1].vectors.shape  # the outputs' eigenvectors: 3 x 3
        (1, 3, 3)
    """

    learning_rate: ScalarOrSchedule = eqx.field(default=3e-3, converter=python_number)
    b1: Scalar = eqx.field(default=0.95, converter=python_number)
    b2: Scalar = eqx.field(default=0.95, converter=python_number)
    eps: Scalar = eqx.field(default=1e-8, converter=python_number)
    weight_decay: Scalar = eqx.field(default=0.1, converter=python_number)
    weight_decay_mask: WeightDecayMask = None
    interval: int = eqx.field(default=10, static=True, converter=whole_number)
    basis: KroneckerBasis = KroneckerBasis(b2=0.95)
    momentum_dtype: Any = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_shared(self)
        check_number("eps", self.eps, low=0)
        check_count("interval", self.interval)
        if not isinstance(self.basis, KroneckerBasis):
            raise TypeError(f"basis is {self.basis!r}; it must be a KroneckerBasis")

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        return decayed_and_scaled(self, scale_by_soap(self), params)

    def width_exponent(self, inputs: int, outputs: int) -> float:
        """Return e such that muP scales the learning rate of a matrix as width^e."""
        return self.basis.width_exponent(inputs, outputs)

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """Return the whole-matrix operations of the basis, for counting FLOPs."""
        # Each step projects the gradient and the first moment, projects the step back, and updates the moments of both
        # sides. A rotation of the basis also rotates v.
        return MatrixWork(4, 1, lambda step: bool(rotation_due(step, self.interval)), self.basis.max_size)


def scale_by_soap(settings: Soap) -> optax.GradientTransformation:
    """Return a transformation that computes Soap's direction, without weight decay or the learning rate."""
    basis, b1, b2 = settings.basis, settings.b1, settings.b2

    def init(params: PyTree) -> SoapState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=settings.momentum_dtype), params)
        return SoapState(jnp.zeros((), jnp.int32), mu, zeros, basis.init(params))

    def update(grads: PyTree, state: SoapState, params: PyTree | None = None) -> tuple[PyTree, SoapState]:
        count = optax.safe_increment(state.count)
        new_basis, nu = jax.lax.cond(
            rotation_due(state.count, settings.interval),
            lambda new_basis, nu: basis.rotated(new_basis, nu),  # not the bound method, which JAX cannot hash
            lambda new_basis, nu: (new_basis, nu),
            basis.update_moments(state.basis, grads),
            state.nu,
        )
        coordinates = basis.at(new_basis)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(coordinates.project(grads), nu, b2, 2)
        direction = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + settings.eps),
            optax.tree.bias_correction(coordinates.project(mu), b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        return coordinates.project_back(direction), SoapState(count, mu, nu, new_basis)

    return optax.GradientTransformation(init, update)


def rotation_due(step: Scalar, interval: int) -> Scalar:
    """Return whether the basis is rotated at this step."""
    return (step < interval) | (step % interval == 0)
