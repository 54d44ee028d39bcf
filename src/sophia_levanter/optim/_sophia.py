"""Sophia: momentum over a diagonal curvature, clipped in each coordinate (arXiv 2305.14342, Algorithm 3)."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from equinox import AbstractClassVar
from jaxtyping import Array, Bool, Float, Key, PyTree

from sophia_levanter.optim._algorithm import last_rho, refreshed, unclipped, updated, win_rate
from sophia_levanter.optim._averages import (
    COUNTS,
    Curvature,
    Momentum,
    SophiaState,
    WeightDecay,
    check_state,
    gradient_noise,
    state_metrics,
)
from sophia_levanter.optim._checks import (
    check_bool,
    check_flag,
    check_number,
    check_parameters,
    check_same_structure,
    python_number,
)
from sophia_levanter.optim._kronecker import KroneckerBasis
from sophia_levanter.optim._optax import (
    as_optax,
    check_gradient_transform,
    init_transform,
    transform_gradient,
)
from sophia_levanter.optim._protocol import MatrixWork, Scalar, ScalarOrSchedule
from sophia_levanter.optim._rho import ScheduledRho, WinRateController, rho_rule
from sophia_levanter.optim._trees import (
    WeightDecayMask,
    all_finite,
    trainable,
    wide_dtype,
)


class AbstractSophia(eqx.Module):
    """Algorithm 3 with any estimator. `Sophia`, `SophiaG` and `SophiaH` differ only in their defaults.

        m     <- b1 m + (1 - b1) g                       every step
        h     <- b2 h + (1 - b2) h_hat                   every `interval` steps, before the update
        theta <- theta - lr wd theta - lr clip(m / max(rho h, eps), -1, 1)

    If the gradient is not finite, the update is zero and m and h do not change. If an estimate is not finite, h does
    not change and `state.refresh_pending` asks for a new one. The state counts both cases; neither raises an error.

    Args:
        learning_rate: a number or a function of the update count.
        b1: decay of m, in [0, 1).
        b2: decay of h per refresh, in [0, 1).
        rho: scale of h, above 0: a number, a function of the update count, a `WinRateController`, or "auto" for one
            with default arguments. The paper calls it gamma. The default is 0.05, or 0.01 for `SophiaH`.
        eps: floor of rho h, above 0. Where h is negative or tiny, the step is the sign of m.
        weight_decay: decoupled decay, multiplied by the learning rate; a number or a function of the update count.
        interval: updates between two refreshes, at least 1.
        weight_decay_mask: a tree or prefix of bools, or a function from parameters to one; if None, every leaf decays.
        estimator: (function of the model, model, microbatches, key=...) -> h_hat; `estimate` calls it.
        basis: a `KroneckerBasis` in which the matrices' h is diagonal and their steps are clipped; None for the
            parameters' own coordinates. Every refresh updates the basis with the momentum.
        gradient_transform: an optax transformation that is applied to the gradient first, such as
            `optax.clip_by_global_norm(1.0)`, or None.
        cautious: whether to zero the coordinates whose step points up this batch's gradient and to scale up the others
            to make up for them, by a factor of at most 1000 and possibly beyond the clip (arXiv 2411.16085).
        initial_refreshes, bias_correct_momentum, bias_correct_curvature, momentum_dtype, curvature_dtype: see
            `Momentum` and `Curvature`.

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
        """The basis in which h is diagonal; None for the parameters' own coordinates."""
        return self.curvature.basis

    def init(self, model: PyTree) -> SophiaState:
        """The state before the first step: m = 0 and h = 0.

        Raises:
            ValueError: if the model has no floating-point leaf, or a basis is given but no leaf is a matrix.
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
        """The same, for parameters that may be empty, such as a group in `optax.multi_transform`."""
        # One array for each count, so that a state can be donated.
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
        """The estimator's estimate of the curvature's diagonal, structured like the model's trainable part.

        Args:
            function: a function of the model, or of the model and a microbatch. For `SophiaG` it returns the outputs
                (logits [..., classes] for the categorical likelihood); for `SophiaH` it returns the scalar mean loss.
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...] to process one at a time; None for a single pass.
            key: a JAX random key for the sampled targets, or the probe.
            weights: for `SophiaG`, the weight of each target in the mean loss, where 0 leaves it out; for `SophiaH`,
                the weight of each microbatch.
            state: the state that the estimate is for; needed only with a `basis`.

        Raises:
            ValueError, TypeError: as raised by the estimator and by `estimator_at`.
        """
        given = {} if weights is None else {"weights": weights}
        if state is not None:
            check_state(self, state)
            check_same_structure("state.momentum", state.momentum, trainable(model))
        return self.estimator_at(state)(function, model, microbatches, key=key, **given)

    def estimator_at(self, state: SophiaState | None) -> Any:
        """The estimator of the diagonal in a state's basis, or `estimator` itself without a `basis`.

        Raises:
            ValueError: if the optimizer has no estimator, or has a basis but no state is given.
            TypeError: if the optimizer has a basis but its estimator has no field `coordinates`.
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
        """One step from the gradient of the mean loss.

        Args:
            grads: the gradient, structured like the model's trainable part.
            state: the state before the step.
            model: the model before the step.
            h_hat: an estimate that refreshes the curvature before the update.
            finite: whether the gradient is finite; if None, it is checked.

        Returns:
            The step to add to the model (`eqx.apply_updates`), and the next state.

        Raises:
            ValueError: if the gradient's tree does not match the model's; the error names the path.
        """
        params = trainable(model)
        check_state(self, state)
        check_same_structure("grads", grads, params)
        check_same_structure("state.momentum", state.momentum, params)
        grads = trainable(grads)
        finite = all_finite(grads) if finite is None else check_flag("finite", finite)
        grads, gradient_state, finite = transform_gradient(
            self.gradient_transform, grads, state.gradient_state, params, finite
        )
        return self._step(grads, h_hat, state._replace(gradient_state=gradient_state), params, finite)

    def _step(
        self, grads: PyTree, h_hat: PyTree | None, state: SophiaState, params: PyTree, finite: Bool[Array, ""]
    ) -> tuple[PyTree, SophiaState]:
        """Refresh h if an estimate is given, then update."""
        if h_hat is not None:
            state = self.refresh(state, h_hat, finite=finite)
        return updated(self, grads, state, params, finite)

    def denominator(self, scaled: Float[Array, "..."]) -> Float[Array, "..."]:
        """The denominator of the step, computed from rho h."""
        return jnp.maximum(scaled, self.eps)

    def refresh(self, state: SophiaState, h_hat: PyTree, *, finite: Bool[Array, ""] | None = None) -> SophiaState:
        """h <- b2 h + (1 - b2) h_hat.

        Args:
            state: the state before the refresh.
            h_hat: an estimate of the curvature's diagonal, structured like the model's trainable part.
            finite: whether the gradient of the same step is finite; the estimate is always checked.

        Raises:
            ValueError: if the estimate's tree does not match the curvature's; the error names the path.
        """
        check_state(self, state)
        check_same_structure("h_hat", h_hat, state.curvature)
        return refreshed(self, state, trainable(h_hat), check_flag("finite", True if finite is None else finite))

    def refresh_due(self, step: int) -> bool:
        """Whether an estimate is due at this step, judging by its number alone; decided on the host.

        An estimate is also due if `state.refresh_pending` is set. Reading it makes the host wait for the device, so
        read it only after steps that had an estimate.
        """
        return (step >= 0) & ((step < self.curvature.initial_refreshes) | (step % self.curvature.interval == 0))

    def metrics(
        self, state: SophiaState, num_targets: float | Float[Array, ""] | None = None
    ) -> dict[str, Float[Array, ""]]:
        """float32 scalars that describe a state after an update.

        `win_rate` is the fraction of coordinates whose step is not clipped: h > 0 and |m| below the denominator, with m
        and h corrected as in the update. `curvature_nonpositive` is the fraction with h <= 0. The norms are global
        2-norms of m and h as stored. `rho` is the last update's, or the controller's, which a refresh changes.
        `skipped_updates` and `skipped_refreshes` are counts. `steps_since_refresh` above `interval` means that an
        estimate was due but not given; without any estimate, Sophia is sign descent.

        Args:
            state: a state after an update.
            num_targets: B, the number of targets in a batch; if the estimator samples targets, it adds the metrics from
                `gradient_noise`.
        """
        found = state_metrics(state) | {"win_rate": win_rate(self, state), "rho": last_rho(self, state)}
        if num_targets is not None and getattr(self.estimator, "samples_targets", False):
            found |= gradient_noise(self.momentum, self.curvature, state, num_targets)
        return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}

    def unclipped(self, state: SophiaState) -> PyTree[Bool[Array, "..."]]:
        """The coordinates that `win_rate` counts, for a state after an update.

        The tree is structured like the model's trainable part.
        """
        return unclipped(self, state)

    def width_exponent(self, inputs: int, outputs: int) -> float:
        """The exponent of the width in the learning rate of a matrix."""
        return -1.0 if self.basis is None else self.basis.width_exponent(inputs, outputs)

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """The basis's work on whole matrices, for the FLOP count."""
        if self.basis is None:
            return MatrixWork()
        # The momentum is projected and the step projected back, and cautious steps project the gradient. A refresh
        # projects the estimate, updates both sides' moments, and rotates h.
        changes = 3 if self.cautious else 2
        estimated = 0 if self.estimator is None else self.estimator.changes_of_basis(num_microbatches)
        return MatrixWork(changes, estimated + 2, self.refresh_due, self.basis.max_size)

    def as_optax(self) -> optax.GradientTransformationExtraArgs:
        """Sophia as an optax transformation; `update` takes the estimate as the extra argument `h_hat`.

        It works in `optax.chain`, `optax.multi_transform`, `optax.apply_if_finite` and the like. Call `estimate`
        outside, on the steps where `refresh_due` is true.
        """
        return as_optax(self)


class Sophia(AbstractSophia):
    """Sophia with a custom estimator. See `AbstractSophia` for the arguments.

    Set `signed = True` on an estimator whose estimates may be negative.

    Examples:
        >>> optimizer = Sophia(learning_rate=0.1, weight_decay=0.0)
        >>> params = {"w": jnp.asarray([1.0, -2.0])}
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> updates["w"].tolist()  # without an estimate h is 0, and the step the sign of m
        [-0.10000000149011612, 0.10000000149011612]
    """

    default_estimator: ClassVar[Any] = None
    __init__ = AbstractSophia.__init__
