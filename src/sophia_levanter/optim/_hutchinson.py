"""Hutchinson's estimator for the diagonal of a Hessian (arXiv 2305.14342, Algorithm 1)."""

import re
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from sophia_levanter.optim._checks import (
    check_choice,
    check_count,
    check_key,
    check_not_negative,
    check_parameters,
    check_scalar,
    whole_number,
)
from sophia_levanter.optim._gradients import GradientSums, RefreshStep, num_microbatches, sum_over_microbatches
from sophia_levanter.optim._kronecker import Coordinates
from sophia_levanter.optim._trees import plain, trainable, upcast

PROBES = ("rademacher", "gaussian")


class Hutchinson(eqx.Module):
    """Estimator u * (H u), whose mean is the diagonal of the Hessian H; entries may be negative (Algorithm 1).

    Args:
        probe: the distribution of u: `rademacher` (lower variance) or `gaussian` (as in the paper).
        num_probes: the number of probes u to average over; they are processed one at a time.
        coordinates: the coordinates in which to estimate the diagonal, by default those of the parameters. They are
            set by `Sophia.estimator_at`.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> Hutchinson()(lambda w: jnp.sum(jnp.asarray([1.0, 3.0]) * w**2), jnp.ones(2), key=jax.random.key(0)).tolist()
        [2.0, 6.0]
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
        loss_fn: Callable[..., Any],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: Key[Array, ""],
        weights: Float[Array, " microbatch"] | None = None,
    ) -> PyTree:
        """Estimate the diagonal of the Hessian.

        Args:
            loss_fn: model -> scalar mean loss, or (model, microbatch) -> the microbatch's mean loss.
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...]; all of them use the same u.
            key: a JAX random key for u.
            weights: weight of each microbatch in the mean loss, such as its number of targets; equal by default.

        Raises:
            ValueError: if the loss is not a scalar.
            TypeError: if an operation in the loss has no forward-mode derivative.
        """
        if microbatches is None:
            if weights is not None:
                raise ValueError("weights apply to microbatches, but there are none; weight the targets in loss_fn")
            return self._estimate(lambda model: (loss_fn(model), 1.0), model, None, key)
        check_not_negative("weights", weights)
        count = num_microbatches(microbatches)
        shares = jnp.ones(count) if weights is None else jnp.asarray(plain(weights))
        if shares.shape != (count,):
            raise ValueError(f"weights have shape {shares.shape}; {count} microbatches require shape ({count},)")
        parts = (microbatches, shares / jnp.sum(shares))
        return self._estimate(lambda model, part: (loss_fn(model, part[0]), part[1]), model, parts, key)

    @property
    def gradients(self) -> float:
        """The cost of an estimate in gradient computations; each probe requires a gradient and its derivative."""
        return 2.0 * self.num_probes

    def changes_of_basis(self, num_microbatches: int) -> int:
        """Return the number of projections: u is projected back from the basis, and H u into it, for each probe."""
        return 2 * self.num_probes

    def gradient_and_estimate(self, step: RefreshStep) -> tuple[GradientSums, PyTree]:
        """Return the gradient of a step, and an estimate from a separate pass."""
        sums = step.gradient()
        loss_fn, microbatches = step.curvature_pass(sums)
        return sums, self._estimate(loss_fn, step.model, microbatches, step.key)

    def _estimate(
        self, loss_fn: Callable[..., tuple[Any, Any]], model: PyTree, microbatches: PyTree, key: Key[Array, ""]
    ) -> PyTree:
        """Average u * (H u) over the probes, in float32 or wider.

        `loss_fn` maps model or (model, microbatch) to (mean loss, its weight).
        """
        check_key(key)

        def product(u: PyTree, *part: PyTree) -> tuple[PyTree, Any]:
            """Return H u multiplied by the weight of the microbatch, and the weight."""
            curved, weight = hessian_vector_product(lambda m: loss_fn(m, *part), model, u)
            return jax.tree.map(lambda x: upcast(x) * weight, curved), weight

        def one(key: Key[Array, ""], _: Any) -> PyTree:
            u = draw_probe(key, model, self.probe)
            direction = self.coordinates.project_back(u)
            if microbatches is None:
                summed, weight = product(direction)
            else:
                summed, weight = sum_over_microbatches(lambda part, _: product(direction, part), microbatches)
            product_of_u = self.coordinates.project(jax.tree.map(lambda x: x / weight, summed))
            return jax.tree.map(lambda a, b: upcast(a) * upcast(b), u, product_of_u)

        if self.num_probes == 1:
            return one(key, 0)
        total = sum_over_microbatches(one, jax.random.split(key, self.num_probes))
        return jax.tree.map(lambda x: x / self.num_probes, total)


def draw_probe(key: Key[Array, ""], model: PyTree, probe: str) -> PyTree:
    """Draw a random direction u with E[u u^T] = I, with the shapes and dtypes of the trainable part of the model."""
    check_parameters(model)
    samplers: dict[str, Callable[..., Array]] = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}
    leaves, structure = jax.tree.flatten(trainable(model))
    keys = jax.random.split(key, len(leaves))
    drawn = [samplers[probe](k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def hessian_vector_product(
    loss_fn: Callable[[PyTree], tuple[Any, Any]], model: PyTree, vector: PyTree
) -> tuple[PyTree, Any]:
    """Return (H v, aux) for a function that returns (scalar loss, aux), using forward-over-reverse mode."""

    def scalar_loss(model: PyTree) -> tuple[Array, Any]:
        loss, aux = loss_fn(model)
        return check_scalar("the result of loss_fn", loss), aux

    gradient = eqx.filter_grad(scalar_loss, has_aux=True)
    (_, aux), (product, _) = _forward_derivative(gradient, model, vector)
    # JAX returns None as the tangent of a gradient that does not depend on the parameters.
    return jax.tree.map(lambda v, hv: jnp.zeros_like(v) if hv is None else hv, vector, product), aux


def _forward_derivative(function: Callable[[PyTree], Any], model: PyTree, vector: PyTree) -> tuple[Any, Any]:
    """Return a gradient and its derivative along a vector. Raise a TypeError if forward mode is not supported."""
    try:
        return eqx.filter_jvp(function, (model,), (vector,))
    # JAX and its kernels raise different types of errors: custom_vjp raises the first, and other primitives the rest.
    except (TypeError, ValueError, NotImplementedError) as error:
        if not re.search(r"forward-mode|ifferentiation rule|\bjvp\b", str(error), re.IGNORECASE):
            raise
        raise TypeError(
            "loss_fn contains an operation without a forward-mode derivative, which this estimator requires "
            f"({str(error).splitlines()[0]}); "
            "replace it (for attention, use jax.nn.dot_product_attention(..., implementation='xla')), "
            "or use SophiaG, which requires only reverse mode"
        ) from error
