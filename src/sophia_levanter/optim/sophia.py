"""Sophia: momentum over a diagonal curvature, clipped coordinate by coordinate (arXiv 2305.14342, Algorithm 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from sophia_levanter.optim.curvature import PROBES, gauss_newton_bartlett, hutchinson
from sophia_levanter.optim.likelihood import categorical_loss, sample_categorical
from sophia_levanter.optim.protocol import (
    PyTree,
    Scalar,
    ScalarOrSchedule,
    WeightDecayMask,
    check_range,
    check_same_structure,
    decay_mask_tree,
    differentiable,
    value_at,
)

SophiaT = TypeVar("SophiaT", bound="Sophia")


class SophiaState(eqx.Module):
    """The state of Sophia-G and Sophia-H.

    Attributes:
        count: int32 scalar, updates so far.
        refresh_count: int32 scalar, refreshes of the curvature so far.
        momentum: m, like the model's differentiable part, in its dtypes.
        curvature: h, the same shapes in at least float32: an average with weight 0.01 would be lost in bfloat16.
    """

    count: jax.Array
    refresh_count: jax.Array
    momentum: PyTree
    curvature: PyTree


class Sophia(eqx.Module):
    """What Sophia-G and Sophia-H share: everything but the estimator.

        m     <- b1 m + (1 - b1) g                       every step
        h     <- b2 h + (1 - b2) h_hat                   every `interval` steps, before the update
        theta <- theta - lr wd theta - lr clip(m / max(rho h, eps), -1, 1)

    Args:
        learning_rate: a number or a function of the update count.
        b1: decay of m, in [0, 1).
        b2: decay of h per refresh, in [0, 1).
        rho: scale of h, above 0; a number or a function of the update count. The paper calls it gamma.
        eps: floor of rho h, above 0. Where h is negative or tiny the step is the sign of m.
        weight_decay: decoupled decay, multiplied by the learning rate; a number or a function of the update count.
        interval: updates between two refreshes, at least 1.
        weight_decay_mask: a tree (or prefix) of bools, or a function from parameters to one; None decays every leaf.
        bias_correct_momentum: use m / (1 - b1^count) in the update.
        bias_correct_curvature: use h / (1 - b2^refresh_count) in the update. Uncorrected, h reaches 63 % of its value
            only after 1 / (1 - b2) refreshes, and steps are too long by as much.

    Raises:
        ValueError: if a hyper-parameter that is a concrete number is out of its range.
    """

    learning_rate: ScalarOrSchedule = 6e-4
    b1: Scalar = 0.965
    b2: Scalar = 0.99
    rho: ScalarOrSchedule = 0.05
    eps: Scalar = 1e-12
    weight_decay: ScalarOrSchedule = 0.2
    interval: int = eqx.field(default=10, static=True)
    weight_decay_mask: WeightDecayMask = None
    bias_correct_momentum: bool = eqx.field(default=False, static=True)
    bias_correct_curvature: bool = eqx.field(default=False, static=True)

    def __check_init__(self) -> None:
        check_range("learning_rate", self.learning_rate, low=0)
        check_range("b1", self.b1, low=0, high=1)
        check_range("b2", self.b2, low=0, high=1)
        check_range("rho", self.rho, low=0, low_open=True)
        check_range("eps", self.eps, low=0, low_open=True)
        check_range("weight_decay", self.weight_decay, low=0)
        if not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"interval is {self.interval!r}; it must be a whole number of at least 1")

    def init(self, model: PyTree) -> SophiaState:
        """m = 0 and h = 0.

        Raises:
            ValueError: if the model has no floating-point leaf.
        """
        params = differentiable(model)
        if not jax.tree.leaves(params):
            raise ValueError("the model has no floating-point array to optimize")
        return SophiaState(
            count=jnp.zeros((), jnp.int32),
            refresh_count=jnp.zeros((), jnp.int32),
            momentum=jax.tree.map(jnp.zeros_like, params),
            curvature=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), params),
        )

    def update(self, grads: PyTree, state: SophiaState, model: PyTree) -> tuple[PyTree, SophiaState]:
        """One step from the gradient of the mean loss.

        Returns:
            The step to add to the model (`eqx.apply_updates`), and the next state.

        Raises:
            ValueError: if the gradient's tree is not the model's; names the path.
        """
        params = differentiable(model)
        check_same_structure("grads", grads, params)
        momentum = jax.tree.map(lambda m, g: (self.b1 * m + (1 - self.b1) * g).astype(m.dtype), state.momentum, grads)
        state_after = SophiaState(state.count + 1, state.refresh_count, momentum, state.curvature)
        learning_rate = value_at(self.learning_rate, state.count)
        decay = learning_rate * value_at(self.weight_decay, state.count)

        def step(p: jax.Array, m: jax.Array, d: jax.Array, decayed: bool) -> jax.Array:
            clipped = learning_rate * jnp.clip(m / d, -1, 1)
            return -(clipped + decay * p if decayed else clipped).astype(p.dtype)

        mask = decay_mask_tree(self.weight_decay_mask, params)
        return jax.tree.map(step, params, *self._ratio(state_after), mask), state_after

    def refresh(self, state: SophiaState, h_hat: PyTree) -> SophiaState:
        """h <- b2 h + (1 - b2) h_hat.

        Raises:
            ValueError: if the estimate's tree is not the curvature's; names the path.
        """
        check_same_structure("h_hat", h_hat, state.curvature)
        curvature = jax.tree.map(
            lambda h, new: self.b2 * h + (1 - self.b2) * new.astype(h.dtype), state.curvature, h_hat
        )
        return SophiaState(state.count, state.refresh_count + 1, state.momentum, curvature)

    def refresh_due(self, step: int) -> bool:
        """Whether h is refreshed before the update of this step; decided on the host."""
        return step % self.interval == 0

    def metrics(self, state: SophiaState) -> dict[str, jax.Array]:
        """float32 scalars of a state after an update.

        `win_rate` is the share of coordinates with |m| < rho h, whose step is not clipped,
        `curvature_nonpositive` the share with h <= 0; the norms are global 2-norms of m and h as stored.
        """
        momentum, denominator = self._ratio(state)
        size = sum(leaf.size for leaf in jax.tree.leaves(momentum))
        return {
            # Where h is 0, as in rows that no token has reached yet, nothing is won.
            "win_rate": _total(
                jax.tree.map(lambda m, d, h: (jnp.abs(m) < d) & (h > 0), momentum, denominator, state.curvature)
            )
            / size,
            "curvature_nonpositive": _total(jax.tree.map(lambda h: h <= 0, state.curvature)) / size,
            "curvature_norm": _norm(state.curvature),
            "momentum_norm": _norm(state.momentum),
        }

    def _ratio(self, state: SophiaState) -> tuple[PyTree, PyTree]:
        """Numerator and denominator of the clipped ratio, for a state after its update."""
        momentum, curvature = state.momentum, state.curvature
        if self.bias_correct_momentum:
            momentum = _divide(momentum, 1 - self.b1**state.count)
        if self.bias_correct_curvature:
            # Before the first refresh h is 0, and stays 0 whatever it is divided by.
            curvature = _divide(curvature, 1 - self.b2 ** jnp.maximum(state.refresh_count, 1))
        rho = value_at(self.rho, state.count - 1)
        return momentum, jax.tree.map(lambda h: jnp.maximum(rho * h, self.eps), curvature)


class SophiaG(Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimator; h never is negative. See `Sophia` for the arguments."""

    def estimate(
        self: SophiaT,
        outputs_fn: Callable[[Any], jax.Array],
        model: PyTree,
        *,
        key: jax.Array,
        weights: jax.Array | None = None,
    ) -> PyTree:
        """B * g^2 for a classifier (Algorithm 2), with labels drawn from its own softmax in float32.

        Args:
            outputs_fn: model -> logits [..., classes].
            model: any pytree.
            key: a jax random key for the labels.
            weights: [...] weight of each position in the mean loss, 0 to leave it out; 1 each if not given.

        Returns:
            An estimate of the Gauss-Newton diagonal of the (weighted) mean loss, like the differentiable part.
        """

        def sampled_loss(model: PyTree, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = outputs_fn(model)
            labels = sample_categorical(jax.lax.stop_gradient(logits), jax.random.uniform(key, logits.shape[:-1]))
            losses = categorical_loss(logits, labels)
            w = jnp.ones_like(losses) if weights is None else jnp.broadcast_to(weights, losses.shape)
            num_targets = jnp.sum(w)
            # A position of weight w adds w g^2 to the diagonal, so its gradient enters with the root of w.
            return jnp.sum(losses * jnp.sqrt(w)) / num_targets, num_targets

        return gauss_newton_bartlett(sampled_loss, model, key=key)


class SophiaH(Sophia):
    """Sophia with Hutchinson's estimator; h may be negative, where the step is a sign step. See `Sophia`.

    Args:
        probe: the random direction's distribution: `rademacher` (lower variance) or `gaussian` (the paper's).
    """

    rho: ScalarOrSchedule = 0.01
    probe: str = eqx.field(default="rademacher", static=True)

    def __check_init__(self) -> None:
        if self.probe not in PROBES:
            raise ValueError(f"probe is {self.probe!r}; it must be one of {', '.join(PROBES)}")

    def estimate(self, loss_fn: Callable[[Any], jax.Array], model: PyTree, *, key: jax.Array) -> PyTree:
        """u * (H u) (Algorithm 1).

        Args:
            loss_fn: model -> scalar mean loss.
            model: any pytree.
            key: a jax random key for u.

        Returns:
            An estimate of the Hessian's diagonal, like the differentiable part.
        """
        return hutchinson(loss_fn, model, key=key, probe=self.probe)


def _divide(tree: PyTree, by: Scalar) -> PyTree:
    return jax.tree.map(lambda x: x / by, tree)


def _total(tree: PyTree) -> jax.Array:
    """The sum over all leaves, in at least float32."""
    return sum((jnp.sum(_widened(leaf)) for leaf in jax.tree.leaves(tree)), start=jnp.zeros((), jnp.float32))


def _norm(tree: PyTree) -> jax.Array:
    """The global 2-norm, in at least float32."""
    return jnp.sqrt(_total(jax.tree.map(lambda x: jnp.square(_widened(x)), tree)))


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
