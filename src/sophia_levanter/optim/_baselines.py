"""AdamW, Lion and Muon, with the same interface as Sophia."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree
from optax.contrib import MuonState

from sophia_levanter.optim._checks import (
    check_bool,
    check_dtype,
    check_mesh_axis,
    check_number,
    check_parameters,
    python_number,
)
from sophia_levanter.optim._matrices import Matrices, MatrixView, by_matrix, matrix_views
from sophia_levanter.optim._optax import cautious, check_gradient_transform, init_transform, prepared_gradient
from sophia_levanter.optim._protocol import MatrixWork, Scalar, ScalarOrSchedule
from sophia_levanter.optim._trees import WeightDecayMask, decay_mask_tree, trainable


class BaselineState(NamedTuple):
    """State of an `OptaxOptimizer`.

    Attributes:
        optax_state: the state of the optax transformation.
        gradient_state: the state of `gradient_transform`, or None.
    """

    optax_state: PyTree
    gradient_state: PyTree | None


class OptaxOptimizer(eqx.Module):
    """Base class for optimizers that apply an optax transformation to the trainable part of a model."""

    gradient_transform: optax.GradientTransformation | None = eqx.field(default=None, kw_only=True)
    estimator: ClassVar[None] = None

    def __check_init__(self) -> None:
        check_gradient_transform(self.gradient_transform)

    @abc.abstractmethod
    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        """Return the optax transformation for these parameters."""

    def init(self, model: PyTree) -> BaselineState:
        """Return the state before the first step.

        Raises:
            ValueError: if the model has no floating-point leaf.
            TypeError: if a leaf is complex; the error names its path.
        """
        check_parameters(model)
        params = trainable(model)
        return BaselineState(self.transformation(params).init(params), init_transform(self.gradient_transform, params))

    def update(
        self,
        grads: PyTree,
        state: BaselineState,
        model: PyTree,
        h_hat: Any = None,
        *,
        finite: Bool[Array, ""] | None = None,
    ) -> tuple[PyTree, BaselineState]:
        """Return the step to add to the model, and the next state, given the gradient of the mean loss.

        If the gradient is not finite, the step is zero and only the counts in the state advance. `finite` states
        whether it is finite; if None, this is checked. `h_hat` must be None; it exists for loops that also run Sophia.

        Raises:
            ValueError: if `h_hat` is given, or if `grads` and `model` differ in structure; the error names the path.
        """
        if h_hat is not None:
            raise ValueError(f"h_hat was given, but {type(self).__name__} uses no curvature; check refresh_due first")
        if not isinstance(state, BaselineState):
            raise TypeError(f"state is a {type(state).__name__}; it must be the result of init(model)")
        params = trainable(model)
        grads, gradient_state, finite = prepared_gradient(
            self.gradient_transform, grads, state.gradient_state, params, finite
        )
        updates, new_state = self.transformation(params).update(grads, state.optax_state, params)
        # Integer leaves are counts, which always advance.
        new_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old).astype(old.dtype) if eqx.is_inexact_array(new) else new,
            new_state,
            state.optax_state,
        )
        # Updates from wide gradients would promote narrow parameters.
        updates = jax.tree.map(lambda u, p: jnp.where(finite, u, 0).astype(p.dtype), updates, params)
        return updates, BaselineState(new_state, gradient_state)

    def refresh_due(self, step: int) -> bool:
        """Return False, because the optimizer does not use curvature."""
        return False

    def metrics(
        self, state: BaselineState, num_targets: float | Float[Array, ""] | None = None
    ) -> dict[str, Float[Array, ""]]:
        """Return `momentum_norm`, the global 2-norm of the stored first moment over all parameter groups."""
        found = optax.tree.get_all_with_path(state.optax_state, "mu")
        # A parameter may also be called mu, but only the path of a moment ends in a named-tuple field.
        moments = [mu for path, mu in found if isinstance(path[-1], optax.tree_utils.NamedTupleKey)]
        return {"momentum_norm": optax.tree.norm(moments)}

    def estimator_at(self, state: BaselineState) -> None:
        """Return None, because the optimizer does not use curvature."""

    def width_exponent(self, inputs: int, outputs: int) -> float | None:
        """Return e such that muP scales the learning rate of an `inputs` x `outputs` matrix as width^e.

        `model.parametrization: mup` rejects optimizers that return None, as this class does.
        """
        return None

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """Return an empty `MatrixWork`. Optimizers that perform whole-matrix operations override this method."""
        return MatrixWork()


class AdamW(OptaxOptimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); see `optax.adamw`.

    Args:
        learning_rate: a number or a function of the update count.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        weight_decay_mask: a pytree of bools (or a prefix of one), or a function that maps the parameters to one. If
            None, weight decay applies to all leaves.
        nesterov: whether to use Nesterov momentum (NAdamW; Dozat 2016).
        cautious: whether to zero the coordinates in which the step ascends the current gradient, and to scale up the
            others (arXiv 2411.16085).
        momentum_dtype: dtype of the first moment; None uses the parameter dtypes.
        gradient_transform: an optax transformation applied to the gradient first, or None.

    Raises:
        TypeError, ValueError: if a concrete hyper-parameter is out of range.

    Examples:
        >>> optimizer, params = AdamW(learning_rate=0.1, weight_decay=0.0), {"w": jnp.ones(2)}
        >>> updates, state = optimizer.update({"w": jnp.asarray([3.0, -5.0])}, optimizer.init(params), params)
        >>> [f"{x:.3f}" for x in updates["w"]]
        ['-0.100', '0.100']
    """

    learning_rate: ScalarOrSchedule = eqx.field(default=6e-4, converter=python_number)
    b1: Scalar = eqx.field(default=0.9, converter=python_number)
    b2: Scalar = eqx.field(default=0.95, converter=python_number)
    eps: Scalar = eqx.field(default=1e-8, converter=python_number)
    weight_decay: Scalar = eqx.field(default=0.1, converter=python_number)
    weight_decay_mask: WeightDecayMask = None
    nesterov: bool = eqx.field(default=False, static=True)
    cautious: bool = eqx.field(default=False, static=True)
    momentum_dtype: Any = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_shared(self)
        check_number("eps", self.eps, low=0)
        check_bool("nesterov", self.nesterov)
        check_bool("cautious", self.cautious)

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.momentum_dtype, nesterov=self.nesterov)
        return decayed_and_scaled(self, cautious(adam) if self.cautious else adam, params)

    def width_exponent(self, inputs: int, outputs: int) -> float:
        """Return e such that muP scales the learning rate of a matrix as width^e."""
        return -1.0


class Lion(OptaxOptimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675); see `optax.lion`.

    The arguments are those of `AdamW` except eps, nesterov and cautious. b2 is the decay rate of the single moment, and
    b1 is its weight in the step.

    Examples:
        >>> optimizer, params = Lion(learning_rate=0.5, weight_decay=0.0), {"w": jnp.ones(2)}
        >>> updates, state = optimizer.update({"w": jnp.asarray([3.0, -5.0])}, optimizer.init(params), params)
        >>> updates["w"].tolist()
        [-0.5, 0.5]
    """

    learning_rate: ScalarOrSchedule = eqx.field(default=1e-4, converter=python_number)
    b1: Scalar = eqx.field(default=0.95, converter=python_number)
    b2: Scalar = eqx.field(default=0.98, converter=python_number)
    weight_decay: Scalar = eqx.field(default=0.2, converter=python_number)
    weight_decay_mask: WeightDecayMask = None
    momentum_dtype: Any = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_shared(self)

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        return decayed_and_scaled(self, optax.scale_by_lion(self.b1, self.b2, self.momentum_dtype), params)

    def width_exponent(self, inputs: int, outputs: int) -> float:
        """Return e such that muP scales the learning rate of a matrix as width^e."""
        return -1.0


def decayed_and_scaled(
    optimizer: Any, direction: optax.GradientTransformation, params: PyTree
) -> optax.GradientTransformation:
    """Add decoupled weight decay to a direction, and multiply the sum by the learning rate.

    The fields `weight_decay`, `weight_decay_mask` and `learning_rate` of the optimizer are used.
    """
    return optax.chain(
        direction,
        _add_decayed_weights(optimizer.weight_decay, decay_mask_tree(optimizer.weight_decay_mask, params)),
        optax.scale_by_learning_rate(optimizer.learning_rate),
    )


def _add_decayed_weights(rate: Scalar, factors: PyTree[bool | float]) -> optax.GradientTransformation:
    """Add decayed weights like `optax.add_decayed_weights`, but scale the rate by a factor for each parameter."""
    if all(isinstance(factor, bool) for factor in jax.tree.leaves(factors)):
        return optax.add_decayed_weights(rate, factors)

    def decayed(updates: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(lambda u, p, f: u + rate * f * p if f else u, updates, params, factors)

    return optax.stateless(decayed)


def check_shared(optimizer: Any) -> None:
    """Raise an error if a concrete hyper-parameter that all baselines share is out of range."""
    check_number("learning_rate", optimizer.learning_rate, low=0, schedule=True)
    check_number("b1", optimizer.b1, low=0, high=1)
    check_number("b2", optimizer.b2, low=0, high=1)
    check_number("weight_decay", optimizer.weight_decay, low=0)
    check_dtype("momentum_dtype", optimizer.momentum_dtype)


# RMS of AdamW steps (Liu et al. 2025, section 2.2). Scaling by it makes the learning rate comparable to AdamW's.
ADAMW_RMS = 0.2
# Coefficients of the quintic Newton-Schulz iteration, chosen to maximize its slope at 0 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(OptaxOptimizer):
    """Muon (Jordan et al. 2024), with the update scale and weight decay of Liu et al. 2025 (arXiv 2502.16982).

    The step for an in x out matrix is learning_rate * 0.2 * sqrt(max(in, out)) times its Nesterov momentum,
    orthogonalized by five Newton-Schulz iterations. These bring the singular values to between about 0.7 and 1.2, not
    exactly to 1. All other parameters are updated by AdamW with Nesterov momentum and the same learning rate. The state
    and the steps are the same as in `optax.contrib.muon`.

    Args:
        beta: decay rate of the momentum for matrices, in [0, 1).
        b1, b2: decay rates of the first and second moments for the other parameters, in [0, 1).
        eps: added to the square root of the second moment, and to the norm by which a matrix is initially divided.
        matrices: a pytree (or a prefix of one), or a function that maps the parameters to one. Its leaves are
            `optax.contrib.MuonDimensionNumbers`, which specify the input (reduction) and output axes of a parameter to
            orthogonalize, or None for other parameters. Any further axes enumerate matrices. If `matrices` is None,
            every leaf with two axes is a matrix, including embeddings.
        momentum_dtype: dtype of the momentum and the first moment; None uses the parameter dtypes.
        mesh_axis: mesh axis over which to divide the orthogonalization; if None, every device does all of it.
        learning_rate, weight_decay, weight_decay_mask, gradient_transform: as for `AdamW`, for all parameters.

    Raises:
        TypeError, ValueError: if a concrete hyper-parameter is out of range; from `init` and `update`, if `matrices`
            does not match the parameters.

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
        views = matrix_views(self.matrices, params)
        labels = ["adam" if view is None else "muon" for view in views]
        groups = jax.tree.unflatten(jax.tree.structure(params), labels)
        matrices = [view for view in views if view is not None]
        # Single-element chains keep the state paths of optax.contrib.muon, so that older checkpoints load.
        direction = optax.partition(
            {
                "muon": optax.chain(scale_by_muon(self, matrices)),
                "adam": optax.chain(
                    optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.momentum_dtype, nesterov=True)
                ),
            },
            # Pass a function, because the tree may be a model that is itself callable.
            lambda _: groups,
        )
        return decayed_and_scaled(self, direction, params)

    def width_exponent(self, inputs: int, outputs: int) -> float:
        """Return e such that muP scales the learning rate of a matrix as width^e."""
        return -0.5

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """Return the number of Newton-Schulz iterations, for counting FLOPs."""
        return MatrixWork(newton_schulz=ITERATIONS)


def scale_by_muon(settings: Muon, views: Sequence[MatrixView]) -> optax.GradientTransformation:
    """Orthogonalize Nesterov momentum and multiply it by 0.2 sqrt(max(in, out)), with the same state as in optax.

    `views` holds the matrix view of each parameter, in leaf order.
    """
    beta = settings.beta

    def init(params: PyTree) -> MuonState:
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=settings.momentum_dtype), params)
        # Without an explicit dtype, jax_enable_x64 would put float64 into the checkpoints of float32 parameters.
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
            orthogonal = jax.vmap(lambda x: orthogonalized(x, state.ns_coeffs, settings.eps))(view.matrices(stack))
            return (jnp.sqrt(jnp.maximum(*view.sizes[1:])) * ADAMW_RMS * orthogonal).reshape(stack.shape)

        scaled = by_matrix(settings.mesh_axis, step, stacks)
        steps = [view.parameter(x) for view, x in zip(views, scaled, strict=True)]
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        return jax.tree.unflatten(structure, steps), MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def orthogonalized(x: Array, coefficients: Array, eps: Scalar) -> Array:
    """Iterate X <- a X + (b X X^T + c (X X^T)^2) X five times, starting from X / |X|.

    `x` is [in, out]. A tall matrix is transposed first, so that X X^T is small.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalized(x.T, coefficients, eps).T
    a, b, c = coefficients.astype(x.dtype)
    x = x / (jnp.linalg.norm(x) + eps)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
