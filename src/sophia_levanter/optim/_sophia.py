"""Sophia: momentum divided by a diagonal curvature, clipped in each coordinate (arXiv 2305.14342, Algorithm 3)."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from equinox import AbstractClassVar
from jaxtyping import Array, Bool, Float, Key, PyTree

from sophia_levanter.optim._checks import (
    check_bool,
    check_flag,
    check_number,
    check_parameters,
    check_same_structure,
    python_number,
    value_at,
)
from sophia_levanter.optim._kronecker import Coordinates, KroneckerBasis
from sophia_levanter.optim._optax import (
    agreeing,
    as_optax,
    check_gradient_transform,
    init_transform,
    prepared_gradient,
)
from sophia_levanter.optim._protocol import MatrixWork, Scalar, ScalarOrSchedule
from sophia_levanter.optim._state import (
    COUNTS,
    Curvature,
    Momentum,
    ScheduledRho,
    SophiaState,
    WeightDecay,
    WinRateController,
    check_state,
    gradient_noise,
    rho_rule,
    state_metrics,
)
from sophia_levanter.optim._trees import (
    WeightDecayMask,
    all_finite,
    decay_mask_tree,
    num_coordinates,
    select,
    total,
    trainable,
    upcast,
    wide_dtype,
)


class AbstractSophia(eqx.Module):
    """Sophia (Algorithm 3) with any estimator. `Sophia`, `SophiaG` and `SophiaH` differ only in their defaults.

        m     <- b1 m + (1 - b1) g                       every step
        h     <- b2 h + (1 - b2) h_hat                   every `interval` steps, before the update
        theta <- theta - lr wd theta - lr clip(m / max(rho h, eps), -1, 1)  (m and h bias-corrected by default)

    With a basis, m is projected into it before the division, and the clipped ratio is projected back.

    If the gradient is not finite, the update is zero and m and h do not change. If an estimate is not finite, h does
    not change and `state.refresh_pending` requests a new one. The state counts both cases; neither raises an error.

    Args:
        learning_rate: a number or a function of the update count.
        b1, b2: decay rates of m per update and of h per refresh, in [0, 1).
        rho: scale of h, above 0: a number, a function of the update count, a `WinRateController`, or "auto" for a
            controller with default arguments. The paper calls it gamma. The default is 0.05, or 0.01 for `SophiaH`.
        eps: lower bound on rho h, above 0. Where h is negative or tiny, the step is the sign of m.
        weight_decay: decoupled weight decay (a number or a function of the update count), scaled by the learning rate.
        interval: number of updates between refreshes, at least 1.
        estimator: called by `estimate` as estimator(function, model, microbatches, key=key) -> h_hat.
        basis: a `KroneckerBasis` for matrices, in which h is diagonal and steps are clipped; None for the original
            coordinates. Every refresh updates the basis from the momentum.
        cautious: whether to zero the coordinates in which the step ascends the current gradient, and to scale up the
            others by a factor of at most 1000, possibly beyond the clipping bound (arXiv 2411.16085).
        initial_refreshes, bias_correct_momentum, bias_correct_curvature, momentum_dtype, curvature_dtype: see
            `Momentum` and `Curvature`.
        weight_decay_mask, gradient_transform: as for `AdamW`.

    Raises:
        TypeError, ValueError: if a hyper-parameter has the wrong type, or a concrete number is out of range.
    """

    learning_rate: ScalarOrSchedule
    momentum: Momentum
    curvature: Curvature
    rho: ScheduledRho | WinRateController
    eps: Scalar
    weight_decay: WeightDecay
    estimator: Any
    gradient_transform: optax.GradientTransformation | None
    cautious: bool = eqx.field(static=True)

    default_rho: ClassVar[float] = 0.05
    default_estimator: AbstractClassVar[Any]

    def __init__(
        self,
        learning_rate: ScalarOrSchedule = 6e-4,
        b1: Scalar = 0.965,
        b2: Scalar = 0.99,
        rho: ScalarOrSchedule | WinRateController | str | None = None,
        eps: Scalar = 1e-12,
        weight_decay: ScalarOrSchedule = 0.2,
        interval: int = 10,
        *,
        weight_decay_mask: WeightDecayMask = None,
        estimator: Any = None,
        basis: KroneckerBasis | None = None,
        gradient_transform: optax.GradientTransformation | None = None,
        cautious: bool = False,
        initial_refreshes: int = 0,
        bias_correct_momentum: bool = True,
        bias_correct_curvature: bool = True,
        momentum_dtype: Any = None,
        curvature_dtype: Any = None,
    ) -> None:
        self.learning_rate = python_number(learning_rate)
        self.momentum = Momentum(b1, bias_correct_momentum, momentum_dtype)
        self.curvature = Curvature(b2, interval, initial_refreshes, bias_correct_curvature, curvature_dtype, basis)
        self.rho = rho_rule(self.default_rho if rho is None else rho, self.default_rho)
        self.eps = python_number(eps)
        self.weight_decay = WeightDecay(weight_decay, weight_decay_mask)
        self.estimator = self.default_estimator if estimator is None else estimator
        self.gradient_transform = gradient_transform
        self.cautious = cautious

    def __check_init__(self) -> None:
        check_number("learning_rate", self.learning_rate, low=0, schedule=True)
        check_number("eps", self.eps, low=0, low_open=True)
        check_gradient_transform(self.gradient_transform)
        check_bool("cautious", self.cautious)
        usable = callable(self.estimator) or hasattr(self.estimator, "gradient_and_estimate")
        if self.estimator is not None and (isinstance(self.estimator, type) or not usable):
            raise TypeError(f"estimator is {self.estimator!r}; it must be an instance, such as GaussNewtonBartlett()")

    @property
    def basis(self) -> KroneckerBasis | None:
        """The basis in which h is diagonal; None for the original coordinates of the parameters."""
        return self.curvature.basis

    def init(self, model: PyTree) -> SophiaState:
        """Return the state before the first step: m = 0 and h = 0.

        Raises:
            ValueError: if the model has no floating-point leaf, or if a basis is given but no leaf is a matrix.
            TypeError: if a leaf is complex; the error names its path.
        """
        check_parameters(model)
        state = self._init_params(trainable(model))
        if state.basis is not None and not any(state.basis):
            raise ValueError(
                "basis has no matrix to rotate, because no parameter has two axes; "
                "specify the matrices with KroneckerBasis(matrices=...)"
            )
        return state

    def _init_params(self, params: PyTree) -> SophiaState:
        """Return the initial state for parameters that may be empty, such as a group in `optax.multi_transform`."""
        # Use a separate array for each count, so that a state can be donated.
        counts = {name: jnp.zeros((), jnp.int32) for name in COUNTS}
        return SophiaState(
            **counts,
            momentum=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=self.momentum.dtype), params),
            curvature=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=self.curvature.dtype or wide_dtype(p)), params),
            refresh_pending=jnp.zeros((), bool),
            rho=self.rho.start(),
            gradient_state=init_transform(self.gradient_transform, params),
            basis=None if self.basis is None else self.basis.init(params),
        )

    def estimate(
        self,
        function: Callable[..., Any],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: Key[Array, ""],
        weights: Any = None,
        state: SophiaState | None = None,
    ) -> PyTree:
        """Estimate the diagonal of the curvature. The result is structured like the trainable part of the model.

        Args:
            function: a function of the model, or of the model and a microbatch. For `SophiaG`, it returns the outputs
                (logits [..., classes] for the categorical likelihood); for `SophiaH`, the scalar mean loss.
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...] to process one at a time; None for a single pass.
            key: a JAX random key for the sampled targets or the probe.
            weights: for `SophiaG`, the weight of each target in the mean loss (0 excludes the target); for `SophiaH`,
                the weight of each microbatch.
            state: the optimizer state, which contains the basis; required only with a `basis`.

        Raises:
            ValueError, TypeError: as raised by the estimator and by `estimator_at`.
        """
        given = {} if weights is None else {"weights": weights}
        if state is not None:
            check_state(self, state)
            check_same_structure("state.momentum", state.momentum, trainable(model))
        return self.estimator_at(state)(function, model, microbatches, key=key, **given)

    def estimator_at(self, state: SophiaState | None) -> Any:
        """Return an estimator of the diagonal in the basis of a state, or `estimator` itself if `basis` is None.

        Raises:
            ValueError: if the optimizer has no estimator, or has a basis but no state is given.
            TypeError: if the optimizer has a basis but its estimator has no `coordinates` field.
        """
        if self.estimator is None:
            raise ValueError("estimator is not set; use SophiaG, SophiaH or Sophia(estimator=...)")
        if self.basis is None:
            return self.estimator
        if state is None:
            raise ValueError("state is missing; the estimate depends on its basis, so call estimate(..., state=state)")
        check_state(self, state)
        fields = dataclasses.fields(self.estimator) if dataclasses.is_dataclass(self.estimator) else ()
        if "coordinates" not in [field.name for field in fields]:
            raise TypeError(
                f"estimator is {self.estimator!r}; with a basis, it must have a `coordinates` field, like Hutchinson"
            )
        return dataclasses.replace(self.estimator, coordinates=self.basis.at(state.basis))

    def update(
        self,
        grads: PyTree,
        state: SophiaState,
        model: PyTree,
        h_hat: PyTree | None = None,
        *,
        finite: Bool[Array, ""] | None = None,
    ) -> tuple[PyTree, SophiaState]:
        """Compute one step from the gradient of the mean loss; see `Optimizer.update`.

        Raises:
            ValueError: if `grads` and `model` differ in structure; the error names the path.
        """
        params = trainable(model)
        check_state(self, state)
        check_same_structure("state.momentum", state.momentum, params)
        grads, gradient_state, finite = prepared_gradient(
            self.gradient_transform, grads, state.gradient_state, params, finite
        )
        return self._step(grads, h_hat, state._replace(gradient_state=gradient_state), params, finite)

    def _step(
        self, grads: PyTree, h_hat: PyTree | None, state: SophiaState, params: PyTree, finite: Bool[Array, ""]
    ) -> tuple[PyTree, SophiaState]:
        """Refresh h if an estimate is given, then compute the update."""
        if h_hat is not None:
            state = self.refresh(state, h_hat, finite=finite)
        momentum = jax.tree.map(self.momentum.next, state.momentum, grads)
        after = state._replace(
            count=state.count + 1,
            momentum=select(finite, momentum, state.momentum),
            skipped_updates=state.skipped_updates + ~finite,
            steps_since_refresh=state.steps_since_refresh + 1,
        )
        coordinates = self._coordinates(state)
        direction = jax.tree.map(lambda m, d: jnp.clip(m / d, -1, 1), *self._ratio(after))
        if self.cautious:
            direction = jax.tree.map(agreeing, direction, coordinates.project(grads))
        direction = coordinates.project_back(direction)

        learning_rate = value_at("learning_rate", self.learning_rate, state.count)
        decay = learning_rate * value_at("weight_decay", self.weight_decay.rate, state.count)

        def step(p: Array, u: Array, decayed: bool | float) -> Array:
            rate = decay if decayed is True else decayed * decay
            change = learning_rate * u + rate * p if decayed else learning_rate * u
            return jnp.where(finite, -change, 0).astype(p.dtype)

        return jax.tree.map(step, params, direction, decay_mask_tree(self.weight_decay.mask, params)), after

    def _ratio(self, state: SophiaState) -> tuple[PyTree, PyTree]:
        """Return the numerator and denominator of the ratio to clip, given a state after an update."""
        momentum = self._coordinates(state).project(jax.tree.map(upcast, state.momentum))
        momentum = jax.tree.map(lambda m: self.momentum.corrected(m, state.count - state.skipped_updates), momentum)
        rho = self._last_rho(state)
        denominator = jax.tree.map(
            lambda h: self.denominator(rho * self.curvature.corrected(h, state.refresh_count)), state.curvature
        )
        return momentum, denominator

    def _coordinates(self, state: SophiaState) -> Coordinates:
        """Return the coordinates in which h is diagonal."""
        return Coordinates() if self.basis is None else self.basis.at(state.basis)

    def _last_rho(self, state: SophiaState) -> Any:
        """Return the rho used by the update that produced this state."""
        return self.rho.at(state.rho, jnp.maximum(state.count - 1, 0))

    def denominator(self, scaled: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the denominator of the step, given rho h."""
        return jnp.maximum(scaled, self.eps)

    def refresh(self, state: SophiaState, h_hat: PyTree, *, finite: Bool[Array, ""] | None = None) -> SophiaState:
        """Refresh the curvature: h <- b2 h + (1 - b2) h_hat.

        Then the basis, if any, is rotated along with h, and the controller, if any, sets rho. The refresh is skipped
        unless the estimate and the gradient of the step are finite.

        Args:
            state: the state before the refresh.
            h_hat: an estimate of the diagonal of the curvature, structured like the trainable part of the model.
            finite: whether the gradient of the same step is finite; the estimate is always checked.

        Raises:
            ValueError: if `h_hat` and `state.curvature` differ in structure; the error names the path.
        """
        check_state(self, state)
        check_same_structure("h_hat", h_hat, state.curvature)
        finite = check_flag("finite", True if finite is None else finite)
        averaged = jax.tree.map(self.curvature.next, state.curvature, trainable(h_hat))
        # Check h instead of the estimate, to also detect values that overflow the dtype of h.
        sound = finite & all_finite(averaged)
        curvature, basis = select(sound, averaged, state.curvature), state.basis
        if self.basis is not None:
            rotated = self.basis.rotated(self.basis.update_moments(basis, state.momentum), curvature)
            basis, curvature = select(sound, rotated, (basis, state.curvature))
        after = state._replace(
            refresh_count=state.refresh_count + sound,
            curvature=curvature,
            basis=basis,
            refresh_pending=~sound,
            skipped_refreshes=state.skipped_refreshes + ~sound,
            steps_since_refresh=jnp.where(sound, 0, state.steps_since_refresh),
        )
        if after.rho is None:
            return after
        # Before the first update that was not skipped, m is 0 and the win rate is meaningless.
        measured = sound & (state.count > state.skipped_updates)
        return after._replace(rho=select(measured, self.rho.next(state.rho, self._win_rate(after)), state.rho))

    def refresh_due(self, step: int) -> bool:
        """Return whether an estimate is due, based only on the step number. This runs on the host.

        An estimate is also due if `state.refresh_pending` is True. Reading it makes the host wait for the device, so
        read it only after steps with an estimate.
        """
        return (step >= 0) & ((step < self.curvature.initial_refreshes) | (step % self.curvature.interval == 0))

    def metrics(
        self, state: SophiaState, num_targets: float | Float[Array, ""] | None = None
    ) -> dict[str, Float[Array, ""]]:
        """Return float32 scalars that describe a state after an update.

        `win_rate` is the fraction of coordinates whose step is not clipped: h > 0 and |m| below the denominator, both
        as used in the update. `curvature_nonpositive` is the fraction with h <= 0. The norms are global 2-norms of the
        stored m and h. `rho` is the value used by the last update or, with a controller, the current value, which
        changes at each refresh. `skipped_updates` and `skipped_refreshes` are counts. If `steps_since_refresh` exceeds
        `interval`, an estimate was due but not given; without estimates, Sophia reduces to sign descent.

        Args:
            state: a state after an update.
            num_targets: B, the number of targets in a batch. If it is given and the estimator samples targets, the
                metrics of `gradient_noise` are included.
        """
        found = state_metrics(state) | {"win_rate": self._win_rate(state), "rho": self._last_rho(state)}
        if num_targets is not None and getattr(self.estimator, "samples_targets", False):
            found |= gradient_noise(self.momentum, self.curvature, state, num_targets)
        return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}

    def unclipped(self, state: SophiaState) -> PyTree[Bool[Array, "..."]]:
        """Return a mask of the coordinates counted by `win_rate`, structured like the trainable part of the model."""
        # Exclude coordinates with h <= 0, such as embeddings of unseen tokens.
        return jax.tree.map(lambda m, d, h: (jnp.abs(m) < d) & (h > 0), *self._ratio(state), state.curvature)

    def _win_rate(self, state: SophiaState) -> Float[Array, ""]:
        return total(self.unclipped(state)) / num_coordinates(state.momentum)

    def width_exponent(self, inputs: int, outputs: int) -> float:
        """Return e such that muP scales the learning rate of a matrix as width^e."""
        return -1.0 if self.basis is None else self.basis.width_exponent(inputs, outputs)

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """Return the whole-matrix operations of the basis, for counting FLOPs."""
        if self.basis is None:
            return MatrixWork()
        # A step projects the momentum, projects the result back and, if cautious, projects the gradient. A refresh
        # projects the estimate, updates the moments of both sides, and rotates h.
        changes = 3 if self.cautious else 2
        estimated = 0 if self.estimator is None else self.estimator.changes_of_basis(num_microbatches)
        return MatrixWork(changes, estimated + 2, self.refresh_due, self.basis.max_size)

    def as_optax(self) -> optax.GradientTransformationExtraArgs:
        """Return Sophia as an optax transformation; `update` takes the estimate as an extra argument `h_hat`.

        It works in `optax.chain`, `optax.multi_transform`, `optax.apply_if_finite` and similar wrappers. Call
        `estimate` outside the transformation, at steps for which `refresh_due` is True.
        """
        return as_optax(self)
