"""Steer rho by the share of unclipped coordinates, so that nobody must tune it by hand."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from sophia_levanter.optim.checks import check_number, python_number
from sophia_levanter.optim.protocol import Scalar


class WinRateController(eqx.Module):
    """Multiplicative feedback: rho <- rho * exp(gain * (target - win rate)), at each refresh of the curvature.

    A coordinate is unclipped where |m| < rho h, so a larger rho raises the win rate. The paper's authors tune rho by
    hand until it lies between 0.1 and 0.5 (README of their code); here it is measured with the momentum at hand and
    the curvature just refreshed. rho stays within a factor of `span` of where it began: where the target cannot be
    reached, as with h = 0 almost everywhere, it must not run away.

    Args:
        target: the wanted win rate, in (0, 1).
        initial: rho before the first measurement, above 0.
        gain: how fast log(rho) follows, above 0. At 2 a win rate that is 0.1 too low makes rho 1.22 times as large.
            On GPT-2 nano the win rate moves by about 0.2 as rho grows e-fold, so that each refresh makes up for some
            40 % of the distance; at 0.5 rho stayed behind (0.24 instead of 0.3) while the best rho kept growing.
        span: rho stays between initial / span and initial * span; above 1.

    Raises:
        ValueError: if an argument is out of its range.
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

    def start(self) -> jax.Array:
        """rho before the first measurement, float32."""
        return jnp.asarray(self.initial, jnp.float32)

    def next(self, rho: jax.Array, win_rate: jax.Array) -> jax.Array:
        """rho after a measurement."""
        followed = rho * jnp.exp(self.gain * (self.target - win_rate))
        return jnp.clip(followed, self.initial / self.span, self.initial * self.span).astype(rho.dtype)


def rho_or_controller(initial: float) -> Any:
    """A converter for the field rho: "auto" is a controller that begins at `initial`."""

    def convert(rho: Any) -> Any:
        if not isinstance(rho, str):
            return python_number(rho)
        if rho != "auto":
            raise ValueError(f"rho is {rho!r}; it must be a number, a function of the update count, or 'auto'")
        return WinRateController(initial=initial)

    return convert
