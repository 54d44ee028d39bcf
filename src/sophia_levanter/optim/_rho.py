"""Rules for rho, the scale of the curvature: a number, a schedule, or feedback from the win rate."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from sophia_levanter.optim._checks import check_number, python_number, value_at
from sophia_levanter.optim._protocol import Scalar, ScalarOrSchedule


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
