"""Hutchinson's estimator of the Hessian's diagonal (arXiv 2305.14342, Algorithm 1), and what it is made of."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from sophia_levanter.optim.checks import (
    check_choice,
    check_count,
    check_key,
    check_not_negative,
    check_parameters,
    check_scalar,
    whole_number,
)
from sophia_levanter.optim.kronecker import Coordinates
from sophia_levanter.optim.microbatch import num_microbatches, sum_over_microbatches
from sophia_levanter.optim.named import plain
from sophia_levanter.optim.protocol import GradientSums, RefreshStep
from sophia_levanter.optim.trees import differentiable, widened

PyTree = Any
PROBES = ("rademacher", "gaussian")


class Hutchinson(eqx.Module):
    """u * (H u): its mean over u is the diagonal of the Hessian; single entries may be negative (Algorithm 1).

    Args:
        probe: how u is drawn: `rademacher` (lower variance) or `gaussian` (the paper's).
        num_probes: over how many u the estimate is averaged, one after the other.
        coordinates: those whose diagonal is estimated, the parameters' own if not given; `Sophia.estimator_at` sets it.

    Raises:
        ValueError: if an argument is out of its range.
    """

    probe: str = eqx.field(default="rademacher", static=True)
    num_probes: int = eqx.field(default=1, static=True, converter=whole_number)
    coordinates: Coordinates = Coordinates()
    signed: ClassVar[bool] = True
    forward_mode: ClassVar[bool] = True

    def __check_init__(self) -> None:
        check_choice("probe", self.probe, PROBES)
        check_count("num_probes", self.num_probes)

    def __call__(
        self,
        loss_fn: Callable[..., jax.Array],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: jax.Array,
        weights: jax.Array | None = None,
    ) -> PyTree:
        """An estimate of the Hessian's diagonal.

        Args:
            loss_fn: model -> scalar mean loss, or (model, microbatch) -> that of a microbatch.
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...]; all have the same u, and only split the work.
            key: a jax random key for u.
            weights: [microbatch] share of each in the mean loss, as the number of its targets; equal if not given.

        Raises:
            ValueError: if the loss is no scalar.
            TypeError: if an operation in the loss has no forward derivative.
        """
        check_key(key)
        if microbatches is None:
            if weights is not None:
                raise ValueError("weights are of microbatches, and there are none; weigh the targets in loss_fn")
            return self._mean_over_probes(key, model, lambda u: hessian_vector_product(loss_fn, model, u))
        check_not_negative("weights", weights)
        count = num_microbatches(microbatches)
        w = jnp.ones(count) if weights is None else jnp.asarray(plain(weights))
        if w.shape != (count,):
            raise ValueError(f"weights have shape {w.shape}; there are {count} microbatches and each has one number")

        def product(u: PyTree) -> PyTree:
            def one(part: tuple, _: Any) -> PyTree:
                microbatch, share = part
                product = hessian_vector_product(lambda m: loss_fn(m, microbatch), model, u)
                return jax.tree.map(lambda x: widened(x) * share, product)

            return sum_over_microbatches(one, (microbatches, w / jnp.sum(w)))

        return self._mean_over_probes(key, model, product)

    @property
    def gradients(self) -> float:
        """A gradient and its derivative for each probe."""
        return 2.0 * self.num_probes

    def gradient_and_estimate(self, step: RefreshStep) -> tuple[GradientSums, PyTree]:
        """A step's gradient, and an estimate from a separate pass."""
        sums = step.gradient()
        loss_fn, microbatches, weights = step.curvature_pass(sums)
        return sums, self(loss_fn, step.model, microbatches, key=step.key, weights=weights)

    def changes_of_basis(self, num_microbatches: int) -> int:
        """A probe leaves the basis and its product enters it."""
        return 2 * self.num_probes

    def _mean_over_probes(self, key: jax.Array, model: PyTree, product: Callable[[PyTree], PyTree]) -> PyTree:
        return mean_over_probes(self.probe, self.num_probes, key, model, product, self.coordinates)


def draw_probe(key: jax.Array, model: PyTree, probe: str = "rademacher") -> PyTree:
    """A random direction u with E[u u^T] = 1, shaped like the model's differentiable part.

    Args:
        key: a jax random key.
        model: any pytree; each floating-point leaf gets a probe of its own shape and dtype.
        probe: `rademacher` (+1 or -1, the lower variance) or `gaussian` (the paper's).

    Raises:
        ValueError: if `probe` is neither, or the model has no floating-point leaf.
        TypeError: if a leaf is complex.
    """
    check_choice("probe", probe, PROBES)
    check_parameters(model)
    draw = jax.random.rademacher if probe == "rademacher" else jax.random.normal
    leaves, structure = jax.tree.flatten(differentiable(model))
    keys = jax.random.split(key, len(leaves))
    drawn = [draw(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def hessian_vector_product(loss_fn: Callable[[Any], jax.Array], model: PyTree, vector: PyTree) -> PyTree:
    """H v of a scalar loss, by forward-over-reverse differentiation.

    Args:
        loss_fn: model -> scalar.
        model: where H is taken.
        vector: shaped like the model's differentiable part.

    Raises:
        ValueError: if the loss is no scalar.
        TypeError: if an operation in the loss, or in its gradient, has no forward derivative.
    """

    def scalar_loss(model: PyTree) -> jax.Array:
        return check_scalar("the result of loss_fn", loss_fn(model))

    product = forward_derivative("loss_fn", eqx.filter_grad(scalar_loss), model, vector)[1]
    # Where the gradient does not depend on the parameters there is no tangent.
    return jax.tree.map(lambda v, hv: jnp.zeros_like(v) if hv is None else hv, vector, product)


def forward_derivative(name: str, function: Callable[[Any], Any], model: PyTree, vector: PyTree) -> tuple[Any, Any]:
    """The value of a function of the model and its derivative along a vector.

    Raises:
        TypeError: if an operation in the function has no forward derivative; `name` is what the error calls it.
    """
    try:
        return eqx.filter_jvp(function, (model,), (vector,))
    # jax and its kernels have no common error for this: a custom_vjp raises the first, other primitives the rest.
    except (TypeError, ValueError, NotImplementedError) as error:
        if not re.search(r"forward-mode|ifferentiation rule|\bjvp\b", str(error), re.IGNORECASE):
            raise
        raise TypeError(
            f"{name} has an operation without a forward derivative, which this estimator needs "
            f"({str(error).splitlines()[0]}); "
            "use one that has it (an attention made of ordinary operations, for instance "
            "jax.nn.dot_product_attention(..., implementation='xla')), or SophiaG, which needs reverse mode only"
        ) from error


def mean_over_probes(
    probe: str,
    num_probes: int,
    key: jax.Array,
    model: PyTree,
    product: Callable[[PyTree], PyTree],
    coordinates: Coordinates,
) -> PyTree:
    """The mean of u * product(u) over random directions u, in at least float32.

    Args:
        probe, num_probes: how u is drawn, and how often.
        key: a jax random key.
        model: any pytree.
        product: of a symmetric matrix with u, both like the model's differentiable part.
        coordinates: those in which u is drawn and the two are multiplied.
    """

    def one(key: jax.Array, _: Any) -> PyTree:
        u = draw_probe(key, model, probe)
        product_of_u = coordinates.enter(product(coordinates.leave(u)))
        return jax.tree.map(lambda a, b: widened(a) * widened(b), u, product_of_u)

    if num_probes == 1:
        return one(key, 0)
    summed = sum_over_microbatches(one, jax.random.split(key, num_probes))
    return jax.tree.map(lambda x: x / num_probes, summed)
