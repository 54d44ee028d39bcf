"""Sophia with each estimator, and presets that reproduce other implementations."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import optax
from jaxtyping import Array, Bool, Float, PyTree

from sophia_levanter.optim._checks import check_choice, check_count, whole_number
from sophia_levanter.optim._gauss_newton import GaussNewtonBartlett
from sophia_levanter.optim._hutchinson import Hutchinson
from sophia_levanter.optim._protocol import Scalar, ScalarOrSchedule
from sophia_levanter.optim._sophia import AbstractSophia
from sophia_levanter.optim._state import SophiaState, WinRateController, rho_rule
from sophia_levanter.optim._trees import WeightDecayMask

DENOMINATORS = ("max", "add")
REFRESH_ORDERS = ("before", "after")

# arXiv 2305.14342, Algorithm 3 and section 3.1.
_UNCORRECTED = {"bias_correct_momentum": False, "bias_correct_curvature": False}
_PAPER: dict[str, Any] = _UNCORRECTED | {"b1": 0.96, "b2": 0.99, "eps": 1e-12, "weight_decay": 0.2, "interval": 10}
# github.com/Liuhong99/Sophia, commit a7e1572: h is refreshed after every tenth update.
_AUTHORS: dict[str, Any] = _PAPER | {
    "b1": 0.965,
    "eps": 1e-15,
    "denominator": "add",
    "refresh_order": "after",
    "first_refresh": 9,
}


class Sophia(AbstractSophia):
    """Sophia with a custom estimator. See `AbstractSophia` for the arguments.

    Set `signed = True` on an estimator if its estimates may be negative.

    Examples:
        >>> optimizer = Sophia(learning_rate=0.1, weight_decay=0.0)
        >>> params = {"w": jnp.asarray([1.0, -2.0])}
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> updates["w"].tolist()  # without an estimate, h is 0 and the step follows the sign of m
        [-0.10000000149011612, 0.10000000149011612]
    """

    default_estimator: ClassVar[Any] = None
    __init__ = AbstractSophia.__init__


class SophiaG(AbstractSophia):
    """Sophia with the Gauss-Newton-Bartlett estimator; h is never negative. See `AbstractSophia` for the arguments.

    `estimate(outputs_fn, model, key=key)` returns B * g^2 for B targets drawn from the model's own distribution (arXiv
    2305.14342, Algorithm 2), where `outputs_fn` computes the model's outputs, such as logits. The `GaussNewtonBartlett`
    estimator specifies the likelihood (categorical by default) and how to combine microbatches.

    Examples:
        >>> params = {"w": jnp.asarray([[0.5, -0.5]])}
        >>> optimizer = SophiaG(learning_rate=0.01)
        >>> state = optimizer.init(params)
        >>> h_hat = optimizer.estimate(lambda p: jnp.ones((4, 1)) @ p["w"], params, key=jax.random.key(0))
        >>> updates, state = optimizer.update({"w": jnp.asarray([[0.1, -0.1]])}, state, params, h_hat)
        >>> int(state.refresh_count)
        1
    """

    default_estimator: ClassVar[Any] = GaussNewtonBartlett()
    __init__ = AbstractSophia.__init__

    @staticmethod
    def paper(**overrides: Any) -> ReproducedSophia:
        """Return the paper's Sophia-G: no bias correction, averaging before squaring, gradients clipped to norm 1."""
        estimator = GaussNewtonBartlett(reduction="average_then_square")
        return _reproduced(0.05, _PAPER | {"estimator": estimator, "gradient_transform": _clip()} | overrides)

    @staticmethod
    def authors(**overrides: Any) -> ReproducedSophia:
        """Return the Sophia-G of the authors' code.

        The denominator is rho h + eps, refreshes follow steps 9, 19, ..., and the training and sampled gradients are
        clipped. Updates match theirs up to rounding if each estimate uses a separate batch and the updated parameters.
        """
        estimator = GaussNewtonBartlett(reduction="average_then_square", max_grad_norm=1.0)
        return _reproduced(0.05, _AUTHORS | {"estimator": estimator, "gradient_transform": _clip()} | overrides)


class SophiaH(AbstractSophia):
    """Sophia with Hutchinson's estimator; where h is negative, the step is the sign of m. See `AbstractSophia`.

    `estimate(loss_fn, model, key=key)` returns u * (H u) (arXiv 2305.14342, Algorithm 1), where `loss_fn` computes the
    scalar mean loss. The `Hutchinson` estimator specifies the type and number of probes.

    Examples:
        >>> h_hat = SophiaH().estimate(lambda w: jnp.sum(w**2), jnp.ones(2), key=jax.random.key(0))
        >>> h_hat.tolist()
        [2.0, 2.0]
    """

    default_rho: ClassVar[float] = 0.01
    default_estimator: ClassVar[Any] = Hutchinson()
    __init__ = AbstractSophia.__init__

    @staticmethod
    def paper(**overrides: Any) -> ReproducedSophia:
        """Return the paper's Sophia-H: no bias correction, Gaussian probes, gradients clipped to norm 1."""
        return _reproduced(
            0.01, _PAPER | {"estimator": Hutchinson("gaussian"), "gradient_transform": _clip()} | overrides
        )

    @staticmethod
    def optax(**overrides: Any) -> ReproducedSophia:
        """Match `optax.contrib.sophia` 0.2.8: uncorrected h, refreshes after updates, eps 1e-8, weight decay 1e-4."""
        settings: dict[str, Any] = {"b1": 0.965, "b2": 0.99, "eps": 1e-8, "weight_decay": 1e-4, "interval": 10}
        late: dict[str, Any] = {"bias_correct_curvature": False, "refresh_order": "after", "estimator": Hutchinson()}
        return _reproduced(0.01, settings | late | overrides)

    @staticmethod
    def levanter(**overrides: Any) -> ReproducedSophia:
        """Match Levanter's intended `sophia-h` (commit 0251ebf): uncorrected h, refreshes after steps 9, 19, ..."""
        settings: dict[str, Any] = {"b1": 0.96, "b2": 0.99, "eps": 1e-12, "weight_decay": 0.1, "interval": 10}
        late: dict[str, Any] = {"bias_correct_curvature": False, "refresh_order": "after", "first_refresh": 9}
        return _reproduced(0.01, settings | late | {"estimator": Hutchinson("gaussian")} | overrides)


class Choices(NamedTuple):
    """Settings that differ between implementations; see `ReproducedSophia`."""

    denominator: str
    refresh_order: str
    first_refresh: int


class ReproducedSophia(AbstractSophia):
    """Sophia with settings that reproduce other implementations. All other arguments are those of `AbstractSophia`.

    Args:
        denominator: `max` for max(rho h, eps); `add` for rho h + eps, which would reverse the step where h is negative.
        refresh_order: whether an estimate passed to `update` refreshes h `before` or `after` the step is computed.
        first_refresh: the first step at which a refresh is due.

    Raises:
        ValueError: if `denominator` is `add` and the estimates may be negative.
    """

    choices: Choices = eqx.field(static=True)
    default_estimator: ClassVar[Any] = None

    def __init__(
        self,
        *,
        denominator: str = "max",
        refresh_order: str = "before",
        first_refresh: int = 0,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        first_refresh = whole_number(first_refresh)
        check_choice("denominator", denominator, DENOMINATORS)
        check_choice("refresh_order", refresh_order, REFRESH_ORDERS)
        check_count("first_refresh", first_refresh, low=0)
        if denominator == "add" and getattr(self.estimator, "signed", False):
            raise ValueError(
                f"denominator is 'add', but {type(self.estimator).__name__}'s estimates may be negative, "
                "which can reverse the step; use 'max'"
            )
        self.choices = Choices(denominator, refresh_order, first_refresh)

    def denominator(self, scaled: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the denominator of the step, given rho h."""
        return scaled + self.eps if self.choices.denominator == "add" else super().denominator(scaled)

    def _step(
        self, grads: PyTree, h_hat: PyTree | None, state: SophiaState, params: PyTree, finite: Bool[Array, ""]
    ) -> tuple[PyTree, SophiaState]:
        late = self.choices.refresh_order == "after"
        updates, state = super()._step(grads, None if late else h_hat, state, params, finite)
        if late and h_hat is not None:
            state = self.refresh(state, h_hat, finite=finite)
        return updates, state

    def refresh_due(self, step: int) -> bool:
        """Return whether an estimate is due, based only on the step number. This runs on the host."""
        return super().refresh_due(step - self.choices.first_refresh)


def _reproduced(default_rho: float, arguments: dict[str, Any]) -> ReproducedSophia:
    return ReproducedSophia(**arguments | {"rho": rho_rule(arguments.get("rho", default_rho), default_rho)})


def _clip() -> optax.GradientTransformation:
    return optax.clip_by_global_norm(1.0)


def sophia_g(
    learning_rate: ScalarOrSchedule = 6e-4,
    b1: Scalar = 0.965,
    b2: Scalar = 0.99,
    rho: ScalarOrSchedule | WinRateController | str = 0.05,
    eps: Scalar = 1e-12,
    weight_decay: ScalarOrSchedule = 0.2,
    weight_decay_mask: WeightDecayMask = None,
    bias_correct_momentum: bool = True,
    bias_correct_curvature: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Return Sophia as an optax transformation whose hyper-parameters can be set by `optax.inject_hyperparams`.

    The arguments are those of `AbstractSophia`. Sophia-H differs only in rho (0.01) and in its estimates. Use a
    separate `SophiaG` to decide when and how to estimate. If `weight_decay_mask` is a function, list it in
    `inject_hyperparams(..., static_args="weight_decay_mask")`; otherwise it is mistaken for a schedule.

    Examples:
        >>> state = optax.inject_hyperparams(sophia_g)(learning_rate=0.25).init({"w": jnp.ones(2)})
        >>> float(state.hyperparams["learning_rate"])
        0.25
    """
    return Sophia(**locals()).as_optax()
