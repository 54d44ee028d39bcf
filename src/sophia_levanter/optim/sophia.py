"""Sophia: momentum over a diagonal curvature, clipped coordinate by coordinate (arXiv 2305.14342, Algorithm 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from sophia_levanter.optim.cautious import agreeing
from sophia_levanter.optim.checks import (
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_number,
    check_parameters,
    check_same_structure,
    python_number,
    whole_number,
)
from sophia_levanter.optim.gradient_transform import check_gradient_transform, init_transform, transform_gradient
from sophia_levanter.optim.kronecker import Coordinates, KroneckerBasis
from sophia_levanter.optim.optax_interop import as_optax
from sophia_levanter.optim.protocol import Estimator, MatrixWork, Scalar, ScalarOrSchedule, check_one, value_at
from sophia_levanter.optim.sophia_state import SophiaState
from sophia_levanter.optim.trees import (
    WeightDecayMask,
    all_finite,
    decay_mask_tree,
    differentiable,
    norm,
    total,
    where,
    widened,
)
from sophia_levanter.optim.win_rate import WinRateController, rho_or_controller

PyTree = Any
DENOMINATORS = ("max", "add")
REFRESH_ORDERS = ("before", "after")


class Sophia(eqx.Module):
    """Sophia with an estimator of one's own; `SophiaG` and `SophiaH` are it with the paper's two.

        m     <- b1 m + (1 - b1) g                       every step
        h     <- b2 h + (1 - b2) h_hat                   every `interval` steps, before the update
        theta <- theta - lr wd theta - lr clip(m / max(rho h, eps), -1, 1)

    Where the gradient is not finite, an update is zero and leaves m and h; where an estimate is not finite, h stays,
    and `state.refresh_pending` asks for another one. Both are counted in the state, and nothing is raised.

    Args:
        learning_rate: a number or a function of the update count.
        b1: decay of m, in [0, 1).
        b2: decay of h per refresh, in [0, 1).
        rho: scale of h, above 0: a number, a function of the update count, a `WinRateController`, or "auto" for one
            with its defaults. The paper calls it gamma.
        eps: floor of rho h, above 0. Where h is negative or tiny the step is the sign of m.
        weight_decay: decoupled decay, multiplied by the learning rate; a number or a function of the update count.
        interval: updates between two refreshes, at least 1.
        weight_decay_mask: a tree (or prefix) of bools, or a function from parameters to one; None decays every leaf.
        bias_correct_momentum: use m / (1 - b1^count) in the update.
        bias_correct_curvature: use h / (1 - b2^refresh_count) in the update. Uncorrected, as in the paper, h reaches
            63 % of its value only after 1 / (1 - b2) refreshes, and steps are too long by as much.
        denominator: `max` for max(rho h, eps); `add` for rho h + eps, which flips the step's sign where rho h < -eps,
            and so is refused with an estimator whose `signed` is True.
        refresh_order: whether an estimate given to `update` enters h `before` that update or `after` it.
        first_refresh: the first step at which a refresh is due.
        initial_refreshes: how many steps from there on have one each, before the interval counts: h is an average of
            few estimates then, of a model that changes quickly.
        cautious: leave out the coordinates whose step would go up this batch's gradient, and scale the others up by as
            much, array by array (arXiv 2411.16085). Momentum lags behind where the gradient turns round.
        basis: a `KroneckerBasis` for matrices, whose h is diagonal and whose ratio is clipped there; None for the
            parameters' own coordinates. It turns at every refresh, by the momentum.
        momentum_dtype: of m; None for the parameters'. The average is computed in the wider of it and the gradient's.
        curvature_dtype: of h; None for float32, or wider where the parameters are. The average is computed in float32
            at least, but in bfloat16 what changes h by less than 0.4 % is lost: with b2 = 0.99, an estimate within 40 %
            of h.
        gradient_transform: an optax transformation that the gradient goes through first, such as
            `optax.clip_by_global_norm(1.0)`; None for none.
        estimator: what `estimate` calls: (function of the model, model, microbatches, key=...) -> h_hat. One whose
            estimates may be negative says so by an attribute `signed`, True.

    Raises:
        TypeError, ValueError: if a hyper-parameter is of the wrong kind, or a concrete number out of its range.
        ValueError: if `denominator` is `add` and the estimates may be negative.
    """

    learning_rate: ScalarOrSchedule = eqx.field(default=6e-4, converter=python_number)
    b1: Scalar = eqx.field(default=0.965, converter=python_number)
    b2: Scalar = eqx.field(default=0.99, converter=python_number)
    rho: ScalarOrSchedule | WinRateController = eqx.field(default=0.05, converter=rho_or_controller(0.05))
    eps: Scalar = eqx.field(default=1e-12, converter=python_number)
    weight_decay: ScalarOrSchedule = eqx.field(default=0.2, converter=python_number)
    interval: int = eqx.field(default=10, static=True, converter=whole_number)
    weight_decay_mask: WeightDecayMask = None
    bias_correct_momentum: bool = eqx.field(default=True, static=True)
    bias_correct_curvature: bool = eqx.field(default=True, static=True)
    denominator: str = eqx.field(default="max", static=True)
    refresh_order: str = eqx.field(default="before", static=True)
    first_refresh: int = eqx.field(default=0, static=True, converter=whole_number)
    initial_refreshes: int = eqx.field(default=0, static=True, converter=whole_number)
    cautious: bool = eqx.field(default=False, static=True)
    basis: KroneckerBasis | None = None
    momentum_dtype: Any = eqx.field(default=None, static=True)
    curvature_dtype: Any = eqx.field(default=None, static=True)
    gradient_transform: optax.GradientTransformation | None = None
    estimator: Estimator | None = None

    # Only a preset that reproduces other code sets it.
    _adds_to_signed: ClassVar[bool] = False

    def __check_init__(self) -> None:
        check_number("learning_rate", self.learning_rate, low=0, schedule=True)
        check_number("b1", self.b1, low=0, high=1)
        check_number("b2", self.b2, low=0, high=1)
        if not isinstance(self.rho, WinRateController):
            check_number("rho", self.rho, low=0, low_open=True, schedule=True)
        check_number("eps", self.eps, low=0, low_open=True)
        check_number("weight_decay", self.weight_decay, low=0, schedule=True)
        check_count("interval", self.interval)
        check_count("first_refresh", self.first_refresh, low=0)
        check_count("initial_refreshes", self.initial_refreshes, low=0)
        check_choice("denominator", self.denominator, DENOMINATORS)
        check_choice("refresh_order", self.refresh_order, REFRESH_ORDERS)
        check_gradient_transform(self.gradient_transform)
        usable = callable(self.estimator) or hasattr(self.estimator, "gradient_and_estimate")
        if self.estimator is not None and (isinstance(self.estimator, type) or not usable):
            raise TypeError(f"estimator is {self.estimator!r}; it must be a value such as GaussNewtonBartlett()")
        if self.denominator == "add" and getattr(self.estimator, "signed", False) and not self._adds_to_signed:
            raise ValueError(
                f"denominator is 'add', and {type(self.estimator).__name__}'s estimates may be negative, "
                "where an added eps turns the step uphill; use 'max'"
            )
        if self.basis is not None and not isinstance(self.basis, KroneckerBasis):
            raise TypeError(f"basis is {self.basis!r}; it must be a KroneckerBasis or None")
        check_dtype("momentum_dtype", self.momentum_dtype)
        check_dtype("curvature_dtype", self.curvature_dtype)
        for name in ("bias_correct_momentum", "bias_correct_curvature", "cautious"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; it must be True or False")

    def init(self, model: PyTree) -> SophiaState:
        """m = 0 and h = 0.

        Raises:
            ValueError: if the model has no floating-point leaf, or none of them is a matrix and there is a basis.
            TypeError: if a leaf is complex; names its path.
        """
        check_parameters(model)
        state = self._init_params(differentiable(model))
        if state.basis is not None and not any(state.basis):
            raise ValueError(
                "basis has no matrix to turn: no parameter has two axes; name them by KroneckerBasis(matrices=...)"
            )
        return state

    def _init_params(self, params: PyTree) -> SophiaState:
        """The same for parameters of which none may be left, as in a group of `optax.multi_transform`."""

        def zero() -> jax.Array:
            """One array each, so that a state can be donated."""
            return jnp.zeros((), jnp.int32)

        return SophiaState(
            count=zero(),
            refresh_count=zero(),
            momentum=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=self.momentum_dtype), params),
            curvature=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=self.curvature_dtype or _wide(p)), params),
            refresh_pending=jnp.zeros((), bool),
            skipped_updates=zero(),
            skipped_refreshes=zero(),
            steps_since_refresh=zero(),
            rho=self.rho.start() if isinstance(self.rho, WinRateController) else None,
            gradient_state=init_transform(self.gradient_transform, params),
            basis=None if self.basis is None else self.basis.init(params),
        )

    def estimate(
        self,
        function: Callable[..., Any],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: jax.Array,
        weights: Any = None,
        state: SophiaState | None = None,
    ) -> PyTree:
        """What `estimator` gives: an estimate of the curvature's diagonal, like the model's differentiable part.

        Args:
            function: of the model, or of the model and a microbatch. For `SophiaG` it gives the outputs (logits
                [..., classes] for the categorical likelihood), for `SophiaH` the scalar mean loss.
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...] to go through one by one; None for a single pass.
            key: a jax random key for the sampled targets, or the probe.
            weights: for `SophiaG` of each target in the mean loss, 0 to leave it out; for `SophiaH` of each microbatch.
            state: the state that the estimate is for; needed with a `basis` alone.

        Raises:
            ValueError: if the optimizer has no estimator, or the function gives something of the wrong shape.
            TypeError: if it gives something of the wrong kind, or cannot be differentiated as the estimator needs, or
                the estimator knows no basis and there is one.
        """
        given = {} if weights is None else {"weights": weights}
        if state is not None:
            self._check_state(state)
            check_same_structure("state.momentum", state.momentum, differentiable(model))
        return self.estimator_at(state)(function, model, microbatches, key=key, **given)

    def estimator_at(self, state: SophiaState | None) -> Estimator:
        """The estimator of the diagonal in the coordinates of a state: `estimator` itself without a `basis`.

        Raises:
            ValueError: if the optimizer has no estimator, or a basis and no state is given.
            TypeError: if it has a basis, and an estimator without a field `coordinates`.
        """
        if self.estimator is None:
            raise ValueError("estimator is not set; use SophiaG, SophiaH or Sophia(estimator=...)")
        if self.basis is None:
            return self.estimator
        if state is None:
            raise ValueError("state is missing; the curvature is estimated in its basis: estimate(..., state=state)")
        self._check_state(state)
        fields = dataclasses.fields(self.estimator) if dataclasses.is_dataclass(self.estimator) else ()
        if "coordinates" not in [field.name for field in fields]:
            raise TypeError(
                f"estimator is {self.estimator!r}; with a basis it must have a field `coordinates`, as Hutchinson's has"
            )
        estimator: Any = self.estimator
        return dataclasses.replace(estimator, coordinates=self.basis.at(state.basis))

    def update(
        self,
        grads: PyTree,
        state: SophiaState,
        model: PyTree,
        h_hat: PyTree | None = None,
        *,
        finite: jax.Array | None = None,
    ) -> tuple[PyTree, SophiaState]:
        """One step from the gradient of the mean loss.

        Args:
            grads: the gradient, like the model's differentiable part.
            state: the state before.
            model: the model before.
            h_hat: an estimate to refresh the curvature with, before or after the update as `refresh_order` says.
            finite: bool scalar, whether the gradient is finite; looked up if not given.

        Returns:
            The step to add to the model (`eqx.apply_updates`), and the next state.

        Raises:
            ValueError: if the gradient's tree is not the model's; names the path.
        """
        params = differentiable(model)
        self._check_state(state)
        check_same_structure("grads", grads, params)
        check_same_structure("state.momentum", state.momentum, params)
        grads = differentiable(grads)
        finite = all_finite(grads) if finite is None else check_flag("finite", finite)
        grads, gradient_state, finite = transform_gradient(
            self.gradient_transform, grads, state.gradient_state, params, finite
        )
        state = state._replace(gradient_state=gradient_state)
        if h_hat is not None and self.refresh_order == "before":
            state = self.refresh(state, h_hat, finite=finite)
        updates, state = self._step(grads, state, params, finite)
        if h_hat is not None and self.refresh_order == "after":
            state = self.refresh(state, h_hat, finite=finite)
        return updates, state

    def refresh(self, state: SophiaState, h_hat: PyTree, *, finite: jax.Array | None = None) -> SophiaState:
        """h <- b2 h + (1 - b2) h_hat.

        Args:
            state: the state before.
            h_hat: an estimate of the curvature's diagonal, like the model's differentiable part.
            finite: bool scalar, whether the step that this belongs to is sound; the estimate is looked through besides.

        Raises:
            ValueError: if the estimate's tree is not the curvature's; names the path.
        """
        self._check_state(state)
        check_same_structure("h_hat", h_hat, state.curvature)
        h_hat = differentiable(h_hat)
        refreshed = all_finite(h_hat) if finite is None else check_flag("finite", finite) & all_finite(h_hat)
        curvature = jax.tree.map(
            lambda h, new: jnp.where(
                refreshed, self.b2 * h.astype(_wide(h)) + (1 - self.b2) * new.astype(_wide(h)), h
            ).astype(h.dtype),
            state.curvature,
            h_hat,
        )
        basis = state.basis
        if self.basis is not None:
            turns, curvature = self.basis.turned(self.basis.observed(basis, state.momentum), curvature)
            basis, curvature = where(refreshed, (turns, curvature), (basis, state.curvature))
        after = state._replace(
            refresh_count=state.refresh_count + refreshed,
            curvature=curvature,
            basis=basis,
            refresh_pending=~refreshed,
            skipped_refreshes=state.skipped_refreshes + ~refreshed,
            steps_since_refresh=jnp.where(refreshed, 0, state.steps_since_refresh),
        )
        if not isinstance(self.rho, WinRateController):
            return after
        # Before the first update m is 0 and says nothing.
        measured = refreshed & (state.count > 0)
        steered = self.rho.next(state.rho, self._win_rate(after))
        return after._replace(rho=jnp.where(measured, steered, state.rho))

    def refresh_due(self, step: int) -> bool:
        """Whether an estimate is wanted at this step, from its number alone; decided on the host.

        Where `state.refresh_pending` is set, one is wanted besides. To read it the host waits for the device, so a loop
        does well to look only after steps that had an estimate.
        """
        since = step - self.first_refresh
        return (since >= 0) & ((since < self.initial_refreshes) | (since % self.interval == 0))

    def metrics(self, state: SophiaState) -> dict[str, jax.Array]:
        """float32 scalars of a state after an update.

        `win_rate` is the share of coordinates with h > 0 and |m| below the denominator, m and h corrected as in the
        update, whose step is not clipped; `curvature_nonpositive` is the share with h <= 0; the norms are global
        2-norms of m and h as stored; `rho` is that of the last update, or the controller's, which a refresh changes;
        `skipped_updates` and `skipped_refreshes` are counts; `steps_since_refresh` above `interval` tells that updates
        got no estimate where one was due, and one that only grows that Sophia is sign descent.
        """
        size = _size(state.momentum)
        return {
            "win_rate": self._win_rate(state),
            "curvature_nonpositive": total(jax.tree.map(lambda h: h <= 0, state.curvature)) / size,
            "curvature_norm": norm(state.curvature),
            "momentum_norm": norm(state.momentum),
            "rho": jnp.asarray(self._rho(state), jnp.float32),
            "skipped_updates": state.skipped_updates.astype(jnp.float32),
            "skipped_refreshes": state.skipped_refreshes.astype(jnp.float32),
            "steps_since_refresh": state.steps_since_refresh.astype(jnp.float32),
        }

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """What a basis does to whole matrices, for the count of FLOPs."""
        if self.basis is None:
            return MatrixWork()
        # The momentum goes in and the step out, and cautious steps take the gradient in. Where the basis turns, the
        # estimate goes in, the moments of the momentum are taken, and h turns.
        changes = 3 if self.cautious else 2
        estimator: Any = self.estimator
        turn_changes = estimator.changes_of_basis(num_microbatches) + 2
        return MatrixWork(changes, turn_changes, self.refresh_due, self.basis.max_size)

    def as_optax(self) -> optax.GradientTransformationExtraArgs:
        """The same as an optax transformation; `update` takes the estimate as the extra argument `h_hat`.

        It works in `optax.chain`, `optax.multi_transform`, `optax.apply_if_finite` and the like. Estimates are made
        outside, with `estimate`, and given on the steps where `refresh_due` says so.
        """
        return as_optax(self)

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, SophiaState):
            raise TypeError(f"state is a {type(state).__name__}; it must be what init(model) gave")
        if (state.rho is not None) != isinstance(self.rho, WinRateController):
            raise ValueError(
                "state.rho and rho do not go together; init anew after a change between a number and 'auto'"
            )
        if (state.basis is None) != (self.basis is None):
            raise ValueError("state.basis and basis do not go together; init anew after a change of the basis")
        for name in ("b1", "b2", "eps"):
            check_one(name, getattr(self, name))
        if self.basis is not None:
            check_one("basis.b2", self.basis.b2)

    def _step(self, grads: PyTree, state: SophiaState, params: PyTree, finite: jax.Array) -> tuple[PyTree, SophiaState]:
        momentum = jax.tree.map(
            lambda m, g: jnp.where(
                finite, self.b1 * m.astype(jnp.promote_types(m.dtype, g.dtype)) + (1 - self.b1) * g, m
            ).astype(m.dtype),
            state.momentum,
            grads,
        )
        after = state._replace(
            count=state.count + 1,
            momentum=momentum,
            skipped_updates=state.skipped_updates + ~finite,
            steps_since_refresh=state.steps_since_refresh + 1,
        )
        learning_rate = value_at("learning_rate", self.learning_rate, state.count)
        decay = learning_rate * value_at("weight_decay", self.weight_decay, state.count)

        coordinates = self._coordinates(state)
        direction = jax.tree.map(lambda m, d: jnp.clip(m / d, -1, 1), *self._ratio(after))
        if self.cautious:
            direction = jax.tree.map(agreeing, direction, coordinates.enter(grads))
        direction = coordinates.leave(direction)

        def step(p: jax.Array, u: jax.Array, decayed: bool) -> jax.Array:
            clipped = learning_rate * u
            return jnp.where(finite, -(clipped + decay * p if decayed else clipped), 0).astype(p.dtype)

        return jax.tree.map(step, params, direction, decay_mask_tree(self.weight_decay_mask, params)), after

    def _coordinates(self, state: SophiaState) -> Coordinates:
        """Those that h is diagonal in, and the ratio clipped."""
        return Coordinates() if self.basis is None else self.basis.at(state.basis)

    def _rho(self, state: SophiaState) -> Scalar:
        """rho of the last update, for a state after it."""
        return (
            state.rho
            if isinstance(self.rho, WinRateController)
            else value_at("rho", self.rho, jnp.maximum(state.count - 1, 0))
        )

    def _ratio(self, state: SophiaState) -> tuple[PyTree, PyTree]:
        """Numerator and denominator of the clipped ratio, for a state after its update."""
        momentum, curvature = jax.tree.map(widened, (state.momentum, state.curvature))
        momentum = self._coordinates(state).enter(momentum)
        # Before the first update and refresh m and h are 0, and stay 0 whatever they are divided by.
        if self.bias_correct_momentum:
            momentum = _divide(momentum, 1 - self.b1 ** jnp.maximum(state.count, 1))
        if self.bias_correct_curvature:
            curvature = _divide(curvature, 1 - self.b2 ** jnp.maximum(state.refresh_count, 1))
        rho = self._rho(state)
        if self.denominator == "add":
            return momentum, jax.tree.map(lambda h: rho * h + self.eps, curvature)
        return momentum, jax.tree.map(lambda h: jnp.maximum(rho * h, self.eps), curvature)

    def _win_rate(self, state: SophiaState) -> jax.Array:
        """Where h is 0, as in rows that no token has reached yet, nothing is won."""
        momentum, denominator = self._ratio(state)
        unclipped = jax.tree.map(lambda m, d, h: (jnp.abs(m) < d) & (h > 0), momentum, denominator, state.curvature)
        return total(unclipped) / _size(momentum)


def _size(tree: PyTree) -> float:
    """The number of coordinates, which may be more than an int32 holds; 1 where there is none, since it divides."""
    return float(max(1, sum(leaf.size for leaf in jax.tree.leaves(tree))))


def _wide(x: jax.Array) -> Any:
    """An average with weight 0.01 would be lost in bfloat16."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _divide(tree: PyTree, by: Scalar) -> PyTree:
    return jax.tree.map(lambda x: x / by, tree)
