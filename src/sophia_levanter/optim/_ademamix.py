"""AdEMAMix: Adam with a second, slower moving average of gradients (Pagliardini et al. 2024, arXiv 2409.03137)."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from sophia_levanter.optim._baselines import OptaxOptimizer, check_shared, decayed_and_scaled
from sophia_levanter.optim._checks import check_count, check_number, python_number, whole_number
from sophia_levanter.optim._protocol import Scalar, ScalarOrSchedule
from sophia_levanter.optim._trees import WeightDecayMask, wide_dtype


class AdEMAMixState(NamedTuple):
    """The state of `scale_by_ademamix`.

    Attributes:
        count: int32 scalar, the number of updates so far.
        mu: fast moving average of the gradient, structured like the parameters, in their dtypes or `momentum_dtype`.
        mu_slow: slow moving average of the gradient, in float32 or wider.
        nu: moving average of the squared gradient, in float32 or wider.
    """

    count: Array  # type: ignore[assignment]  # shadows tuple.count, as in optax
    mu: PyTree
    mu_slow: PyTree
    nu: PyTree


class AdEMAMix(OptaxOptimizer):
    """AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137, Algorithm 1).

        m1    <- b1 m1 + (1 - b1) g                m2 <- b3(t) m2 + (1 - b3(t)) g             t counts from 1
        v     <- b2 v + (1 - b2) g^2
        theta <- theta - lr ((m1 / (1 - b1^t) + alpha(t) m2) / (sqrt(v / (1 - b2^t)) + eps) + wd theta)

    Over the first `slow_warmup` updates, alpha(t) grows linearly from 0, and the half-life of b3(t) grows linearly from
    that of b1: 1 / ln b3(t) = (1 - s) / ln b1 + s / ln b3 with s = t / slow_warmup. The slow average is not
    bias-corrected. The state stores three values per parameter, compared with two for AdamW.

    Args:
        b1: decay rate of the fast average, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        b3: decay rate of the slow average, in [0, 1).
        alpha: weight of the slow average in the step, at least 0.
        slow_warmup: number of updates over which `alpha` and `b3` grow (in the paper, the whole run); 0 for no warmup.
        momentum_dtype: dtype of the fast average; None uses the parameter dtypes. The other two are float32 or wider,
            because bfloat16 would round away their small changes.
        learning_rate, eps, weight_decay, weight_decay_mask, gradient_transform: as for `AdamW`.

    Raises:
        TypeError, ValueError: if a concrete hyper-parameter is out of range.

    Examples:
        >>> optimizer = AdEMAMix(learning_rate=0.1, b3=0.9, alpha=5.0, weight_decay=0.0)
        >>> params = {"w": jnp.zeros(2)}
        >>> updates, _ = optimizer.update({"w": jnp.asarray([3.0, -5.0])}, optimizer.init(params), params)
        >>> [round(float(x), 3) for x in updates["w"]]  # -lr (1 + alpha (1 - b3)) sign(g)
        [-0.15, 0.15]
    """

    learning_rate: ScalarOrSchedule = eqx.field(default=6e-4, converter=python_number)
    b1: Scalar = eqx.field(default=0.9, converter=python_number)
    b2: Scalar = eqx.field(default=0.999, converter=python_number)
    b3: Scalar = eqx.field(default=0.9999, converter=python_number)
    alpha: Scalar = eqx.field(default=5.0, converter=python_number)
    slow_warmup: int = eqx.field(default=0, static=True, converter=whole_number)
    eps: Scalar = eqx.field(default=1e-8, converter=python_number)
    weight_decay: Scalar = eqx.field(default=0.1, converter=python_number)
    weight_decay_mask: WeightDecayMask = None
    momentum_dtype: Any = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_shared(self)
        check_number("b3", self.b3, low=0, high=1)
        check_number("alpha", self.alpha, low=0)
        check_count("slow_warmup", self.slow_warmup, low=0)
        check_number("eps", self.eps, low=0)

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        return decayed_and_scaled(self, scale_by_ademamix(self), params)

    def width_exponent(self, inputs: int, outputs: int) -> float:
        """Return e such that muP scales the learning rate of a matrix as width^e."""
        return -1.0


def scale_by_ademamix(settings: AdEMAMix) -> optax.GradientTransformation:
    """Return a transformation that computes the AdEMAMix direction, without weight decay or the learning rate."""
    b1, b2 = settings.b1, settings.b2

    def init(params: PyTree) -> AdEMAMixState:
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=settings.momentum_dtype), params)
        # Use separate arrays for the two, so that a state can be donated.
        mu_slow, nu = (jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params) for _ in range(2))
        return AdEMAMixState(jnp.zeros((), jnp.int32), mu, mu_slow, nu)

    def update(grads: PyTree, state: AdEMAMixState, params: PyTree | None = None) -> tuple[PyTree, AdEMAMixState]:
        count = optax.safe_increment(state.count)
        alpha, weight = _slow_average(settings, count, jnp.result_type(jnp.float32, *jax.tree.leaves(grads)))
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        mu_slow = jax.tree.map(lambda m, g: m + weight * (g - m), state.mu_slow, grads)
        nu = optax.tree.update_moment(grads, state.nu, b2, 2)
        direction = jax.tree.map(
            lambda g, fast, slow, v: ((fast + alpha * slow) / (jnp.sqrt(v) + settings.eps)).astype(g.dtype),
            grads,
            optax.tree.bias_correction(mu, b1, count),
            mu_slow,
            optax.tree.bias_correction(nu, b2, count),
        )
        after = AdEMAMixState(count, mu, mu_slow, nu)
        return direction, jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)

    return optax.GradientTransformation(init, update)


def _slow_average(settings: AdEMAMix, count: Array, dtype: Any) -> tuple[Scalar, Scalar]:
    """Return alpha(t) and 1 - b3(t) at update t = `count`, counted from 1."""
    if settings.slow_warmup == 0:
        return settings.alpha, 1 - settings.b3
    share = jnp.minimum(count.astype(dtype) / settings.slow_warmup, 1)
    # float32 is imprecise for decay rates close to 1, so compute with 1 - b: log1p for inputs, expm1 for the result.
    fast, slow = (jnp.log1p(jnp.asarray(b - 1, dtype)) for b in (settings.b1, settings.b3))
    return settings.alpha * share, -jnp.expm1(1 / ((1 - share) / fast + share / slow))
