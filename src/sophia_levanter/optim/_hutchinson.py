"""Hutchinson's estimator for the diagonal of a Hessian or Gauss-Newton matrix (arXiv 2305.14342, Algorithm 1)."""

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
from sophia_levanter.optim._likelihood import (
    Categorical,
    Likelihood,
    check_likelihood,
    check_microbatch_weights,
    target_weights,
)
from sophia_levanter.optim._trees import plain, trainable, upcast

PROBES = ("rademacher", "gaussian")
# A matrix-vector product, structured like the trainable part of the model, and the weight to divide it by.
Product = tuple[PyTree, Any]


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
        """Compute an estimate; `loss_fn` maps model or (model, microbatch) to (mean loss, its weight)."""
        check_key(key)

        def product(u: PyTree, part: PyTree, _: Any) -> Product:
            args = () if microbatches is None else (part,)
            curved, weight = hessian_vector_product(lambda m: loss_fn(m, *args), model, u)
            return jax.tree.map(lambda x: upcast(x) * weight, curved), weight

        return _diagonal(self, product, model, microbatches, key)


class GaussNewtonHutchinson(eqx.Module):
    """Hutchinson's estimator u * (J^T S J u) for the Gauss-Newton matrix, for comparison with the other estimators.

    J is the Jacobian of the outputs, and S is the Hessian of the loss with respect to the outputs, evaluated at sampled
    targets if it depends on them (it does not for the likelihoods in this package). Forward mode computes J u, and
    reverse mode computes the rest. The mean equals that of Gauss-Newton-Bartlett. Entries may be negative.

    Args:
        likelihood: the distribution of the targets given the outputs.
        probe, num_probes, coordinates: as for `Hutchinson`.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> estimator = GaussNewtonHutchinson(Normal(1.0))
        >>> estimator(lambda w: jnp.asarray([1.0, 3.0]) * w, jnp.ones(2), key=jax.random.key(0)).tolist()  # x^2 / 2
        [0.5, 4.5]
    """

    likelihood: Likelihood = Categorical()
    probe: str = eqx.field(default="rademacher", static=True)
    num_probes: int = eqx.field(default=1, static=True, converter=whole_number)
    coordinates: Coordinates = Coordinates()
    signed: ClassVar[bool] = True
    forward_mode: ClassVar[bool] = True

    def __check_init__(self) -> None:
        check_likelihood(self.likelihood)
        check_choice("probe", self.probe, PROBES)
        check_count("num_probes", self.num_probes)

    def __call__(
        self,
        outputs_fn: Callable[..., Any],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: Key[Array, ""],
        weights: Any = None,
    ) -> PyTree:
        """Estimate the Gauss-Newton diagonal of the mean loss. The arguments are as for `GaussNewtonBartlett`."""
        check_key(key)
        probe_key, target_key = jax.random.split(key)
        check_microbatch_weights(microbatches, weights)

        def product(u: PyTree, part: PyTree, index: Any) -> Product:
            """Return J^T S J u for the summed loss, and the number of targets."""
            args: tuple
            if microbatches is None:
                args, own, key = (), weights, target_key
            else:
                args, own, key = (part[0],), part[1], jax.random.fold_in(target_key, index)

            def outputs_of(model: PyTree) -> Any:
                return outputs_fn(model, *args)

            outputs, tangents = forward_derivative("outputs_fn", outputs_of, model, u)
            targets = self.likelihood.sample(outputs, key=key)
            w = target_weights(self.likelihood, outputs, self.likelihood.loss(outputs, targets), own)
            summed_loss = jax.grad(lambda outputs: jnp.sum(self.likelihood.loss(outputs, targets) * w))
            _, curved = jax.jvp(summed_loss, (outputs,), (tangents,))
            _, pull = eqx.filter_vjp(outputs_of, model)
            return jax.tree.map(upcast, pull(curved)[0]), jnp.sum(w)

        parts = None if microbatches is None else (microbatches, weights)
        return _diagonal(self, product, model, parts, probe_key)

    def changes_of_basis(self, num_microbatches: int) -> int:
        """Return the number of projections; see `Hutchinson.changes_of_basis`."""
        return 2 * self.num_probes


def _diagonal(
    estimator: Hutchinson | GaussNewtonHutchinson,
    product: Callable[[PyTree, PyTree, Any], Product],
    model: PyTree,
    microbatches: PyTree,
    key: Key[Array, ""],
) -> PyTree:
    """Average u * (M u) over the probes, in float32 or wider, for random u with E[u u^T] = I.

    `product(u, microbatch, index)` returns a pair: M u for the microbatch scaled by its weight, and the weight itself.
    """

    def one(key: Key[Array, ""], _: Any) -> PyTree:
        u = draw_probe(key, model, estimator.probe)
        direction = estimator.coordinates.project_back(u)
        if microbatches is None:
            summed, weight = product(direction, None, None)
        else:
            summed, weight = sum_over_microbatches(lambda part, i: product(direction, part, i), microbatches)
        product_of_u = estimator.coordinates.project(jax.tree.map(lambda x: x / weight, summed))
        return jax.tree.map(lambda a, b: upcast(a) * upcast(b), u, product_of_u)

    if estimator.num_probes == 1:
        return one(key, 0)
    total = sum_over_microbatches(one, jax.random.split(key, estimator.num_probes))
    return jax.tree.map(lambda x: x / estimator.num_probes, total)


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
    (_, aux), (product, _) = forward_derivative("loss_fn", gradient, model, vector)
    # JAX returns None as the tangent of a gradient that does not depend on the parameters.
    return jax.tree.map(lambda v, hv: jnp.zeros_like(v) if hv is None else hv, vector, product), aux


def forward_derivative(name: str, function: Callable[[PyTree], Any], model: PyTree, vector: PyTree) -> tuple[Any, Any]:
    """Return a function's value and derivative along a vector. Raise a TypeError if forward mode is not supported."""
    try:
        return eqx.filter_jvp(function, (model,), (vector,))
    # JAX and its kernels raise different types of errors: custom_vjp raises the first, and other primitives the rest.
    except (TypeError, ValueError, NotImplementedError) as error:
        if not re.search(r"forward-mode|ifferentiation rule|\bjvp\b", str(error), re.IGNORECASE):
            raise
        raise TypeError(
            f"{name} contains an operation without a forward-mode derivative, which this estimator requires "
            f"({str(error).splitlines()[0]}); "
            "replace it (for attention, use jax.nn.dot_product_attention(..., implementation='xla')), "
            "or use SophiaG, which requires only reverse mode"
        ) from error
