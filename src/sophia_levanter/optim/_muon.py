"""Muon: AdamW with the steps of matrices orthogonalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from optax.contrib import MuonState

from sophia_levanter.optim._baselines import OptaxOptimizer, check_shared
from sophia_levanter.optim._checks import check_mesh_axis, check_number, python_number
from sophia_levanter.optim._matrices import Matrices, MatrixView, by_matrix, matrix_views
from sophia_levanter.optim._protocol import MatrixWork, Scalar, ScalarOrSchedule
from sophia_levanter.optim._trees import WeightDecayMask, decay_mask_tree

# Liu et al. 2025, section 2.2: the root mean square of AdamW's steps, so that the learning rate is on its scale.
ADAMW_RMS = 0.2
# Of the quintic iteration, chosen for its slope at 0 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(OptaxOptimizer):
    """Muon (Jordan et al. 2024), scaled and decayed as in Liu et al. 2025 (arXiv 2502.16982).

    The step of an in x out matrix is learning_rate * 0.2 * sqrt(max(in, out)) times its Nesterov momentum,
    orthogonalised by five Newton-Schulz iterations: singular values come out between about 0.7 and 1.2, not at 1. All
    other parameters take the steps of AdamW with Nesterov momentum, at the same learning rate. The state and the steps
    are those of `optax.contrib.muon`.

    Args:
        learning_rate: a number or a function of the update count, for all parameters.
        beta: decay of the matrices' momentum, in [0, 1).
        b1: decay of the first moment of the other parameters, in [0, 1).
        b2: decay of their second moment, in [0, 1).
        eps: added to the root of their second moment, and to the norm that a matrix is divided by at first.
        weight_decay: decoupled decay of all parameters, multiplied by the learning rate.
        weight_decay_mask: a tree (or prefix) of bools, or a function from parameters to one; None decays every leaf.
        matrices: a tree (or prefix), or a function from parameters to one, of optax's `MuonDimensionNumbers` where a
            parameter is orthogonalised and None elsewhere. They number its input (reduction) and output axes; each
            index of the axes left is a matrix of its own. None takes the leaves with two axes, embeddings too.
        momentum_dtype: of momentum and first moment; None for the parameters'.
        mesh_axis: axis of the mesh whose devices share the matrices among them, each with its own to orthogonalise;
            None for all of them on every device.
        gradient_transform: an optax transformation that the gradient goes through first; None for none.

    Raises:
        TypeError, ValueError: if a hyper-parameter that is a concrete number is out of its range; from `init` and
            `update`, if `matrices` does not fit the parameters.

    Examples:
        >>> optimizer, params = Muon(learning_rate=1.0, weight_decay=0.0), {"w": jnp.eye(4)}
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> bool(0.7 < -updates["w"][0, 0] / (0.2 * 4**0.5) < 1.2)
        True
    """

    learning_rate: ScalarOrSchedule = eqx.field(default=6e-4, converter=python_number)
    beta: Scalar = eqx.field(default=0.95, converter=python_number)
    b1: Scalar = eqx.field(default=0.9, converter=python_number)
    b2: Scalar = eqx.field(default=0.95, converter=python_number)
    eps: Scalar = eqx.field(default=1e-8, converter=python_number)
    weight_decay: Scalar = eqx.field(default=0.1, converter=python_number)
    weight_decay_mask: WeightDecayMask = None
    matrices: Matrices = None
    momentum_dtype: Any = eqx.field(default=None, static=True)
    mesh_axis: str | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_shared(self)
        check_number("beta", self.beta, low=0, high=1)
        check_number("eps", self.eps, low=0)
        check_mesh_axis(self.mesh_axis)

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        """The optax transformation for these parameters."""
        views = matrix_views(self.matrices, params)
        labels = ["adam" if view is None else "muon" for view in views]
        groups = jax.tree.unflatten(jax.tree.structure(params), labels)
        matrices = [view for view in views if view is not None]
        # Chains of one element keep the state paths of optax.contrib.muon, so that older checkpoints load.
        direction = optax.partition(
            {
                "muon": optax.chain(scale_by_muon(matrices, self.beta, self.eps, self.momentum_dtype, self.mesh_axis)),
                "adam": optax.chain(
                    optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.momentum_dtype, nesterov=True)
                ),
            },
            # A function, since a tree of a model's class may itself be callable.
            lambda _: groups,
        )
        return optax.chain(
            direction,
            optax.add_decayed_weights(self.weight_decay, decay_mask_tree(self.weight_decay_mask, params)),
            optax.scale_by_learning_rate(self.learning_rate),
        )

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """Newton-Schulz iterations, for the count of FLOPs."""
        return MatrixWork(newton_schulz=ITERATIONS)


def scale_by_muon(
    views: Sequence[MatrixView], beta: Scalar, eps: Scalar, momentum_dtype: Any = None, mesh_axis: str | None = None
) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum times 0.2 sqrt(max(in, out)): `optax.contrib.scale_by_muon`, whose state it has.

    Args:
        views: of each parameter, in the order of their leaves.
        beta, eps, momentum_dtype, mesh_axis: as for `Muon`.
    """

    def init(params: PyTree) -> MuonState:
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=momentum_dtype), params)
        # Without a dtype, jax_enable_x64 would put float64 into the checkpoints of float32 parameters.
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        return MuonState(jnp.zeros((), jnp.int32), mu, jnp.asarray(COEFFICIENTS, dtype))

    def update(grads: PyTree, state: MuonState, params: PyTree | None = None) -> tuple[PyTree, MuonState]:
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, beta, 1)
        ahead = jax.tree.map(
            lambda m, g: beta * m + (1 - beta) * g,
            optax.tree.bias_correction(mu, beta, optax.safe_increment(count)),
            optax.tree.bias_correction(grads, beta, count),
        )
        leaves, structure = jax.tree.flatten(ahead)
        stacks = [(view, view.stack(x)) for view, x in zip(views, leaves, strict=True)]

        def step(view: MatrixView, stack: Array) -> Array:
            orthogonal = jax.vmap(lambda x: orthogonalized(x, state.ns_coeffs, eps))(view.matrices(stack))
            return (jnp.sqrt(jnp.maximum(*view.sizes[1:])) * ADAMW_RMS * orthogonal).reshape(stack.shape)

        steps = [view.parameter(x) for view, x in zip(views, by_matrix(mesh_axis, step, stacks), strict=True)]
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        return jax.tree.unflatten(structure, steps), MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def orthogonalized(x: Array, coefficients: Array, eps: Scalar) -> Array:
    """X <- a X + (b X X^T + c (X X^T)^2) X, five times, from X / |X|; [in, out] in the shorter side's products."""
    if x.shape[0] > x.shape[1]:
        return orthogonalized(x.T, coefficients, eps).T
    a, b, c = coefficients.astype(x.dtype)
    x = x / (jnp.linalg.norm(x) + eps)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
