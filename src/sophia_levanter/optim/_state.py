"""The state of Sophia, the rules that update its parts, and the metrics computed from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from sophia_levanter.optim._checks import (
    check_bool,
    check_count,
    check_dtype,
    check_number,
    check_single,
    python_number,
    value_at,
    whole_number,
)
from sophia_levanter.optim._kronecker import KroneckerBasis
from sophia_levanter.optim._protocol import Scalar, ScalarOrSchedule
from sophia_levanter.optim._trees import WeightDecayMask, norm, num_coordinates, total, upcast, wide_dtype

if TYPE_CHECKING:
    from sophia_levanter.optim._sophia import AbstractSophia


class SophiaState(NamedTuple):
    """State of Sophia between steps.

    Attributes:
        count: number of updates so far.
        refresh_count: number of curvature refreshes so far.
        momentum: m, structured like the trainable part of the model, in its dtypes or in `Momentum.dtype`.
        curvature: h, with the same shapes, in float32 or wider, or in `Curvature.dtype`.
        refresh_pending: whether the last refresh was skipped and should be retried at the next step.
        skipped_updates: number of updates skipped because the gradient was not finite; they change only the counts.
        skipped_refreshes: number of refreshes skipped because the estimate or the gradient was not finite.
        steps_since_refresh: number of updates since the last refresh, or since the start if none has happened yet.
        rho: a float32 scalar if a `WinRateController` sets rho; otherwise None.
        gradient_state: the state of `gradient_transform`, or None.
        basis: the state of a `KroneckerBasis`, or None.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # shadows tuple.count, as in optax
    refresh_count: Int[Array, ""]
    momentum: PyTree[Float[Array, "..."]]
    curvature: PyTree[Float[Array, "..."]]
    refresh_pending: Bool[Array, ""]
    skipped_updates: Int[Array, ""]
    skipped_refreshes: Int[Array, ""]
    steps_since_refresh: Int[Array, ""]
    rho: Any
    gradient_state: PyTree | None
    basis: Any


COUNTS = ("count", "refresh_count", "skipped_updates", "skipped_refreshes", "steps_since_refresh")


class Momentum(eqx.Module):
    """Moving average of the gradient: m <- b1 m + (1 - b1) g, at every update.

    Args:
        b1: decay rate, in [0, 1).
        bias_correct: whether the update uses the bias-corrected m / (1 - b1^count).
        dtype: dtype of m; None uses the parameter dtypes. The average is computed in the wider dtype of m and g.
    """

    b1: Scalar = eqx.field(default=0.965, converter=python_number)
    bias_correct: bool = eqx.field(default=True, static=True)
    dtype: Any = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_number("b1", self.b1, low=0, high=1)
        check_bool("bias_correct_momentum", self.bias_correct)
        check_dtype("momentum_dtype", self.dtype)

    def next(self, m: Array, g: Array) -> Array:
        """Return the next m, in the same dtype, given a gradient g."""
        return (self.b1 * m.astype(jnp.promote_types(m.dtype, g.dtype)) + (1 - self.b1) * g).astype(m.dtype)

    def corrected(self, m: Array, count: Int[Array, ""]) -> Array:
        """Return m as used by the update, in float32 or wider, after `count` updates that were not skipped."""
        return bias_corrected(m, self.b1, count) if self.bias_correct else upcast(m)


class Curvature(eqx.Module):
    """Moving average of curvature estimates: h <- b2 h + (1 - b2) h_hat, at every refresh, in the given basis.

    Args:
        b2: decay rate, in [0, 1).
        interval: number of updates between refreshes, at least 1.
        initial_refreshes: the first `initial_refreshes` steps all refresh the curvature, because early on h averages
            few estimates and the model changes quickly.
        bias_correct: whether the update uses the bias-corrected h / (1 - b2^refreshes). Without the correction, as in
            the paper, h takes 1 / (1 - b2) refreshes to reach 63% of its value, and until then the steps are too large.
        dtype: dtype of h; None uses float32, or the parameter dtype if it is wider. The average is computed in float32
            or wider, but storing it in bfloat16 loses changes of less than 0.4%: with b2 = 0.99, estimates within 40%
            of h have no effect.
        basis: the basis in which h is diagonal; None uses the original coordinates of the parameters.
    """

    b2: Scalar = eqx.field(default=0.99, converter=python_number)
    interval: int = eqx.field(default=10, static=True, converter=whole_number)
    initial_refreshes: int = eqx.field(default=0, static=True, converter=whole_number)
    bias_correct: bool = eqx.field(default=True, static=True)
    dtype: Any = eqx.field(default=None, static=True)
    basis: KroneckerBasis | None = None

    def __check_init__(self) -> None:
        check_number("b2", self.b2, low=0, high=1)
        check_count("interval", self.interval)
        check_count("initial_refreshes", self.initial_refreshes, low=0)
        check_bool("bias_correct_curvature", self.bias_correct)
        check_dtype("curvature_dtype", self.dtype)
        if self.basis is not None and not isinstance(self.basis, KroneckerBasis):
            raise TypeError(f"basis is {self.basis!r}; it must be a KroneckerBasis or None")

    def next(self, h: Array, h_hat: Array) -> Array:
        """Return the next h, in the same dtype, given an estimate."""
        return (self.b2 * upcast(h) + (1 - self.b2) * h_hat.astype(wide_dtype(h))).astype(h.dtype)

    def corrected(self, h: Array, refresh_count: Int[Array, ""]) -> Array:
        """Return h as used by the update, in float32 or wider, after `refresh_count` refreshes."""
        return bias_corrected(h, self.b2, refresh_count) if self.bias_correct else upcast(h)


def bias_corrected(average: Array, decay: Scalar, count: Int[Array, ""]) -> Array:
    """Return a moving average divided by 1 - decay^count, in float32 or wider."""
    # A count of 0 does not matter, because the average is then 0.
    return upcast(average) / (1 - decay ** jnp.maximum(count, 1))


class WeightDecay(eqx.Module):
    """Decoupled weight decay; see `AbstractSophia`."""

    rate: ScalarOrSchedule = eqx.field(default=0.2, converter=python_number)
    mask: WeightDecayMask = None

    def __check_init__(self) -> None:
        check_number("weight_decay", self.rate, low=0, schedule=True)


class ScheduledRho(eqx.Module):
    """Rule that sets rho to a number above 0 or a function of the update count.

    Raises:
        TypeError, ValueError: if `value` has the wrong type or is not above 0.
    """

    value: ScalarOrSchedule = eqx.field(converter=python_number)

    def __check_init__(self) -> None:
        check_number("rho", self.value, low=0, low_open=True, schedule=True)

    def start(self) -> None:
        """Return None, because this rule has no state."""

    def at(self, rho: None, count: Any) -> Any:
        """Return rho for the update that follows `count` updates."""
        return value_at("rho", self.value, count)

    def next(self, rho: None, win_rate: Float[Array, ""]) -> None:
        """Return None, because this rule has no state."""


class WinRateController(eqx.Module):
    """Rule that adjusts rho by feedback at each refresh: rho <- rho * exp(gain * (target - win rate)).

    The win rate is the fraction of unclipped coordinates, those with |m| < rho h, so a larger rho raises it. The
    paper's authors tune rho by hand until the win rate lies between 0.1 and 0.5 (README of their code). Here the win
    rate is measured with the current momentum and the refreshed curvature. The bounds set by `span` keep rho from
    diverging if the target cannot be reached, for example when h = 0 almost everywhere.

    Args:
        target: the desired win rate, in (0, 1).
        initial: rho before the first measurement, above 0.
        gain: response rate of log(rho), above 0. With a gain of 2, a win rate that is 0.1 too low multiplies rho by
            1.22, and each refresh closes about 40% of the gap on GPT-2 nano; with a gain of 0.5, rho lagged behind
            (win rate 0.24 instead of 0.3).
        span: a number above 1; rho is kept between initial / span and initial * span.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> controller = WinRateController(target=0.3)
        >>> f"{controller.next(controller.start(), 0.2):.4f}"  # 0.05 exp(2 * 0.1)
        '0.0611'
    """

    target: Scalar = eqx.field(default=0.3, converter=python_number)
    initial: Scalar = eqx.field(default=0.05, converter=python_number)
    gain: Scalar = eqx.field(default=2.0, converter=python_number)
    span: Scalar = eqx.field(default=100.0, converter=python_number)

    def __check_init__(self) -> None:
        check_number("target", self.target, low=0, high=1, low_open=True)
        check_number("initial", self.initial, low=0, low_open=True)
        check_number("gain", self.gain, low=0, low_open=True)
        check_number("span", self.span, low=1, low_open=True)

    def start(self) -> Float[Array, ""]:
        """Return rho before the first measurement."""
        return jnp.asarray(self.initial, jnp.float32)

    def at(self, rho: Float[Array, ""], count: Any) -> Float[Array, ""]:
        """Return rho for the next update; the state is rho itself."""
        return rho

    def next(self, rho: Float[Array, ""], win_rate: Any) -> Float[Array, ""]:
        """Return rho after a measurement of the win rate."""
        followed = rho * jnp.exp(self.gain * (self.target - win_rate))
        return jnp.clip(followed, self.initial / self.span, self.initial * self.span).astype(rho.dtype)


def rho_rule(rho: Any, initial: float) -> ScheduledRho | WinRateController:
    """Return the rule for a value of `rho`. For "auto", this is a controller that starts at `initial`."""
    if isinstance(rho, WinRateController | ScheduledRho):
        return rho
    if isinstance(rho, str):
        if rho != "auto":
            raise ValueError(f"rho is {rho!r}; it must be a number, a function of the update count, or 'auto'")
        return WinRateController(initial=initial)
    return ScheduledRho(rho)


def check_state(optimizer: AbstractSophia, state: Any) -> None:
    """Raise an error unless a state belongs to this optimizer, and the optimizer's hyper-parameters are scalars."""
    if not isinstance(state, SophiaState):
        raise TypeError(f"state is a {type(state).__name__}; it must be the result of init(model)")
    if (state.rho is None) != (optimizer.rho.start() is None):
        raise ValueError("state.rho does not match rho; call init again after changing rho between a number and 'auto'")
    if (state.basis is None) != (optimizer.basis is None):
        raise ValueError("state.basis does not match basis; call init again after changing the basis")
    for name, value in (("b1", optimizer.momentum.b1), ("b2", optimizer.curvature.b2), ("eps", optimizer.eps)):
        check_single(name, value)
    if optimizer.basis is not None:
        check_single("basis.b2", optimizer.basis.b2)


def state_metrics(state: SophiaState) -> dict[str, Any]:
    """Return the metrics that depend only on the state; see `AbstractSophia.metrics`."""
    nonpositive = total(jax.tree.map(lambda h: h <= 0, state.curvature))
    return {
        "curvature_nonpositive": nonpositive / num_coordinates(state.curvature),
        "curvature_norm": norm(state.curvature),
        "momentum_norm": norm(state.momentum),
        "skipped_updates": state.skipped_updates,
        "skipped_refreshes": state.skipped_refreshes,
        "steps_since_refresh": state.steps_since_refresh,
    }


def gradient_noise(momentum: Momentum, curvature: Curvature, state: SophiaState, num_targets: Any) -> dict[str, Any]:
    """Estimate the critical batch size, and the signal-to-noise ratio of each array.

    The squared gradient of the loss on one target drawn from the model has mean h. To the extent that the model fits
    the data, the gradient of the mean loss over B targets has variance h / B in each coordinate. Let m be the
    bias-corrected average of t such gradients; its variance is subtracted from |m|^2:

        variance of m = (h / B) (1 - b1) (1 + b1^t) / ((1 + b1) (1 - b1^t))
        |G|^2 = max(0, |m|^2 - trace(variance of m))
        critical_batch_tokens = sum(h) / |G|^2                 the batch size at which signal and noise are equal
        signal_to_noise/ARRAY = |G|^2 / (sum(h) / B)           for one array

    The critical batch size is the simple noise scale of McCandlish et al. 2018 (arXiv 1812.06162); it is infinite if no
    signal is detected. The gradient is assumed to change little over 1 / (1 - b1) steps. If the gradient is clipped
    before it is averaged, |G| is underestimated.

    Args:
        momentum, curvature: the moving averages; h must be the curvature of the mean negative log-likelihood.
        state: a state after an update; all results are nan before the first refresh.
        num_targets: B, the number of targets in a batch.
    """
    count = state.count - state.skipped_updates
    decayed = momentum.b1 ** jnp.maximum(count, 1)
    left = (1 - momentum.b1) * (1 + decayed) / ((1 + momentum.b1) * (1 - decayed))
    squares = jax.tree.map(lambda m: total(jnp.square(bias_corrected(m, momentum.b1, count))), state.momentum)
    known = jnp.where(state.refresh_count > 0, 1, jnp.nan)
    noises = jax.tree.map(
        lambda h: known * total(bias_corrected(h, curvature.b2, state.refresh_count)) / num_targets, state.curvature
    )

    def signal(square: Any, noise: Any) -> Any:
        return jnp.maximum(square - left * noise, 0)

    by_array = {
        f"signal_to_noise/{jax.tree_util.keystr(path, simple=True, separator='/')}": signal(square, noise) / noise
        for (path, square), noise in zip(
            jax.tree_util.tree_leaves_with_path(squares), jax.tree.leaves(noises), strict=True
        )
    }
    noise = total(noises)
    return {"critical_batch_tokens": num_targets * noise / signal(total(squares), noise)} | by_array
