"""Estimators of the Gauss-Newton matrix's diagonal: Bartlett's (arXiv 2305.14342, Algorithm 2) and Hutchinson's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from sophia_levanter.optim.checks import (
    check_choice,
    check_count,
    check_key,
    check_not_negative,
    check_number,
    check_parameters,
    check_scalars,
    whole_number,
)
from sophia_levanter.optim.hutchinson import PROBES, forward_derivative, mean_over_probes
from sophia_levanter.optim.kronecker import Coordinates
from sophia_levanter.optim.likelihood import Categorical, Likelihood, check_likelihood
from sophia_levanter.optim.microbatch import num_microbatches, sum_over_microbatches
from sophia_levanter.optim.named import is_named, plain
from sophia_levanter.optim.protocol import GradientSums, RefreshStep, Scalar
from sophia_levanter.optim.trees import norm, widened

PyTree = Any
REDUCTIONS = ("square_then_average", "average_then_square")


class GaussNewtonBartlett(eqx.Module):
    """B * g^2, with g the gradient of the mean loss on B targets drawn from the model's own distribution.

    Its mean is the diagonal of the Gauss-Newton matrix (Algorithm 2); it never is negative. That is the curvature of
    the likelihood's mean loss: where the training loss is c times as large, rho must be c times as large too.

    Over several microbatches, with G_i the gradient of the *summed* sampled loss of microbatch i and B_i its number of
    targets, the estimate is `square_then_average`, sum_i G_i^2 / sum_i B_i, or `average_then_square`,
    (sum_i G_i)^2 / sum_i B_i. Both are unbiased, since the G_i are independent with mean zero; the first has up to n
    times less variance with n microbatches, the second is what the authors' code does.

    Args:
        likelihood: what the outputs say of the targets.
        reduction: how microbatches are joined.
        max_grad_norm: g is scaled down to this global norm before it is squared, as in the authors' code (1.0), which
            makes the estimate biased; None for not.
        coordinates: those whose diagonal is estimated, the parameters' own if not given; `Sophia.estimator_at` sets it.

    Raises:
        ValueError: if an argument is out of its range.
    """

    likelihood: Likelihood = Categorical()
    reduction: str = eqx.field(default="square_then_average", static=True)
    max_grad_norm: Scalar | None = None
    coordinates: Coordinates = Coordinates()
    gradients: ClassVar[float] = 2 / 3  # a backward pass; the forward pass is the gradient's
    forward_mode: ClassVar[bool] = False

    def __check_init__(self) -> None:
        check_likelihood(self.likelihood)
        check_choice("reduction", self.reduction, REDUCTIONS)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, low=0, low_open=True)

    def __call__(
        self,
        outputs_fn: Callable[..., Any],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: jax.Array,
        weights: Any = None,
    ) -> PyTree:
        """An estimate of the Gauss-Newton diagonal of the (weighted) mean loss.

        Args:
            outputs_fn: model -> outputs, or (model, microbatch) -> those of a microbatch.
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...].
            key: a jax random key for the targets.
            weights: the weight of each target in the mean loss, 0 to leave it out; 1 each if not given. Like the
                likelihood's losses, with [microbatch, ...] in front where there are microbatches.

        Raises:
            ValueError, TypeError: if the outputs are not what the likelihood needs.
        """
        _check_microbatch_weights(microbatches, weights)
        if microbatches is None:
            return self.from_sampled_loss(
                lambda m, k: self.sampled_loss(outputs_fn(m), key=k, weights=weights), model, key=key
            )
        return self.from_sampled_loss(
            lambda m, part, k: self.sampled_loss(outputs_fn(m, part[0]), key=k, weights=part[1]),
            model,
            (microbatches, weights),
            key=key,
        )

    def gradient_and_estimate(self, step: RefreshStep) -> tuple[GradientSums, PyTree]:
        """A step's gradient and an estimate from one forward pass, with a backward pass each."""
        sums, total, num_targets = step.shared_gradient(self, labels="sampled")
        return sums, self.finished(total, num_targets)

    def changes_of_basis(self, num_microbatches: int) -> int:
        """The gradient goes into the basis, that of each microbatch where they are squared apart."""
        return num_microbatches if self.reduction == "square_then_average" else 1

    def from_sampled_loss(
        self,
        sampled_loss: Callable[..., tuple[jax.Array, jax.Array]],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: jax.Array,
    ) -> PyTree:
        """The same from a function that draws its targets itself, as blocked losses over a vocabulary do.

        Args:
            sampled_loss: (model, key) or (model, microbatch, key) -> (mean loss on B targets drawn from the model's
                own distribution, B).
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...]; each has a key of its own.
            key: a jax random key for the targets.
        """
        check_parameters(model)
        check_key(key)

        def one(*args: Any) -> tuple[PyTree, jax.Array]:
            def scalar_loss(model: PyTree) -> tuple[jax.Array, jax.Array]:
                what = ("a scalar mean loss on sampled targets", "the number of targets")
                loss, num_targets = check_scalars("sampled_loss", sampled_loss(model, *args), what)
                return loss, num_targets

            loss, pull, num_targets = eqx.filter_vjp(scalar_loss, model, has_aux=True)
            n = jnp.asarray(num_targets, jnp.promote_types(loss.dtype, jnp.float32))
            (grad_sum,) = pull(n.astype(loss.dtype))
            return self.accumulated(grad_sum, n), n

        if microbatches is None:
            summed = one(key)
        else:
            summed = sum_over_microbatches(lambda part, i: one(part, jax.random.fold_in(key, i)), microbatches)
        return self.finished(*summed)

    def sampled_loss(self, outputs: Any, *, key: jax.Array, weights: Any = None) -> tuple[jax.Array, jax.Array]:
        """The mean loss on targets drawn from the outputs' own distribution, and their number B.

        Args:
            outputs: the model's outputs, an array or a NamedArray.
            key: a jax random key for the targets.
            weights: of each target in the mean; B is their sum. The mean has their roots, so that the expected square
                of its gradient is the weighted sum of the targets' Gauss-Newton diagonals.
        """
        _, losses, w = self._sampled(outputs, key, weights)
        return weighted_mean(losses, jnp.sqrt(w), jnp.sum(w)), jnp.sum(w)

    def losses(
        self, outputs: Any, targets: Any, *, key: jax.Array, weights: Any = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What `value_grad_and_curvature` needs: the mean loss on the true and on sampled targets, and their number B.

        Args:
            outputs: the model's outputs, an array or a NamedArray.
            targets: the true targets, as the likelihood takes them.
            key: a jax random key for the sampled targets.
            weights: of each target in the mean; B is their sum.
        """
        sampled, sampled_losses, w = self._sampled(outputs, key, weights)
        targets = _where_used(self.likelihood, outputs, targets, sampled, w)
        num_targets = jnp.sum(w)
        return (
            weighted_mean(self.likelihood.loss(outputs, targets), w, num_targets),
            weighted_mean(sampled_losses, jnp.sqrt(w), num_targets),
            num_targets,
        )

    def _sampled(self, outputs: Any, key: jax.Array, weights: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Sampled targets, their losses, and the weights in the losses' shape."""
        sampled = self.likelihood.sample(jax.lax.stop_gradient(outputs), key=key)
        losses = self.likelihood.loss(outputs, sampled)
        return sampled, losses, target_weights(self.likelihood, outputs, losses, weights)

    def accumulated(self, grad_sum: PyTree, num_targets: jax.Array) -> PyTree:
        """What one microbatch adds to the running total, in at least float32: G_i^2, or G_i."""
        wide = jax.tree.map(widened, grad_sum)
        if self.reduction == "average_then_square":
            return wide
        return self._squared(wide, num_targets)

    def finished(self, total: PyTree, num_targets: jax.Array) -> PyTree:
        """The estimate from the sums of `accumulated` and of the numbers of targets over microbatches."""
        if self.reduction == "average_then_square":
            total = self._squared(total, num_targets)
        return jax.tree.map(lambda x: x / num_targets, total)

    def _squared(self, grad_sum: PyTree, num_targets: jax.Array) -> PyTree:
        return jax.tree.map(jnp.square, self.coordinates.enter(self._clipped(grad_sum, num_targets)))

    def _clipped(self, grad_sum: PyTree, num_targets: jax.Array) -> PyTree:
        """Scaled so that the mean's gradient has at most the norm allowed."""
        if self.max_grad_norm is None:
            return grad_sum
        size, limit = norm(grad_sum), self.max_grad_norm * num_targets
        scale = jnp.where(size > limit, limit / size, 1.0)
        return jax.tree.map(lambda g: g * scale, grad_sum)


class EmpiricalFisher(eqx.Module):
    """B * g^2, with g the gradient of the mean loss on the data's own B targets.

    The mean gradient is not 0, and enters the estimate: it is not the Gauss-Newton matrix's diagonal (Kunstner, Balles
    and Hennig 2019, arXiv 1905.12558). The arguments are `GaussNewtonBartlett`'s.

    Raises:
        ValueError: if an argument is out of its range.
    """

    reduction: str = eqx.field(default="square_then_average", static=True)
    max_grad_norm: Scalar | None = None
    coordinates: Coordinates = Coordinates()
    gradients: ClassVar[float] = 2 / 3
    forward_mode: ClassVar[bool] = False

    def __check_init__(self) -> None:
        self._squares()

    def __call__(
        self,
        loss_fn: Callable[..., tuple[jax.Array, jax.Array]],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: jax.Array,
    ) -> PyTree:
        """An estimate.

        Args:
            loss_fn: model, or (model, microbatch), -> (mean loss on the true targets, their number B).
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...].
            key: a jax random key, as other estimators need one; nothing is drawn.
        """
        # The last argument is a key to draw targets with.
        return self._squares().from_sampled_loss(lambda *args: loss_fn(*args[:-1]), model, microbatches, key=key)

    def gradient_and_estimate(self, step: RefreshStep) -> tuple[GradientSums, PyTree]:
        """A step's gradient and an estimate from one forward pass, with a backward pass each."""
        squares = self._squares()
        sums, total, num_targets = step.shared_gradient(squares, labels="data")
        return sums, squares.finished(total, num_targets)

    def changes_of_basis(self, num_microbatches: int) -> int:
        """As `GaussNewtonBartlett`'s."""
        return self._squares().changes_of_basis(num_microbatches)

    def _squares(self) -> GaussNewtonBartlett:
        return GaussNewtonBartlett(
            reduction=self.reduction, max_grad_norm=self.max_grad_norm, coordinates=self.coordinates
        )


class GaussNewtonHutchinson(eqx.Module):
    """u * (J^T S J u): Hutchinson's estimator of the Gauss-Newton matrix; for comparison with the other two.

    J is the Jacobian of the outputs and S the Hessian of the loss in the outputs; forward mode gives J u, reverse mode
    the rest. Its mean is that of Gauss-Newton-Bartlett where S does not depend on the targets, as for the likelihoods
    here, or else with S at sampled targets. Single entries may be negative.

    Args:
        likelihood: what the outputs say of the targets.
        probe: how u is drawn: `rademacher` or `gaussian`.
        num_probes: over how many u the estimate is averaged, one after the other.
        coordinates: those whose diagonal is estimated, the parameters' own if not given; `Sophia.estimator_at` sets it.

    Raises:
        ValueError: if an argument is out of its range.
    """

    likelihood: Likelihood = Categorical()
    probe: str = eqx.field(default="rademacher", static=True)
    num_probes: int = eqx.field(default=1, static=True, converter=whole_number)
    coordinates: Coordinates = Coordinates()
    signed: ClassVar[bool] = True

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
        key: jax.Array,
        weights: Any = None,
    ) -> PyTree:
        """An estimate of the Gauss-Newton diagonal of the mean loss; the arguments are `GaussNewtonBartlett`'s."""
        check_key(key)
        probe_key, target_key = jax.random.split(key)
        _check_microbatch_weights(microbatches, weights)

        def product(u: PyTree) -> PyTree:
            if microbatches is None:
                summed, num_targets = self._product(outputs_fn, model, u, target_key, weights)
            else:
                summed, num_targets = sum_over_microbatches(
                    lambda part, i: self._product(
                        lambda m: outputs_fn(m, part[0]), model, u, jax.random.fold_in(target_key, i), part[1]
                    ),
                    (microbatches, weights),
                )
            return jax.tree.map(lambda x: x / num_targets, summed)

        return mean_over_probes(self.probe, self.num_probes, probe_key, model, product, self.coordinates)

    def _product(
        self, outputs_fn: Callable[[Any], Any], model: PyTree, u: PyTree, key: jax.Array, weights: Any
    ) -> tuple[PyTree, jax.Array]:
        """J^T S J u of the summed loss, and the number of targets."""
        outputs, tangents = forward_derivative("outputs_fn", outputs_fn, model, u)
        targets = self.likelihood.sample(outputs, key=key)
        w = target_weights(self.likelihood, outputs, self.likelihood.loss(outputs, targets), weights)

        def summed_loss(outputs: Any) -> jax.Array:
            return jnp.sum(self.likelihood.loss(outputs, targets) * w)

        _, curved = jax.jvp(jax.grad(summed_loss), (outputs,), (tangents,))
        _, pull = eqx.filter_vjp(outputs_fn, model)
        (product,) = pull(curved)
        return jax.tree.map(widened, product), jnp.sum(w)


def target_weights(likelihood: Likelihood, outputs: Any, losses: jax.Array, weights: Any) -> jax.Array:
    """The weights in the shape of the losses: 1 each if not given, NamedArrays brought into the targets' order.

    Raises:
        ValueError: if they do not fit.
    """
    if weights is None:
        return jnp.ones_like(losses)
    check_not_negative("weights", weights)
    if is_named(weights) and is_named(outputs):
        axes = likelihood.target_axes(outputs)
        if not set(weights.axes) <= set(axes):
            found, wanted = ({axis.name: axis.size for axis in of} for of in (weights.axes, axes))
            raise ValueError(f"weights have axes {found}; they must be among the targets' {wanted}")
        weights = weights.broadcast_to(axes)
    array = jnp.asarray(plain(weights), losses.dtype)
    try:
        return jnp.broadcast_to(array, losses.shape)
    except ValueError as error:
        raise ValueError(f"weights have shape {array.shape}; the targets' is {losses.shape}") from error


def _where_used(likelihood: Likelihood, outputs: Any, targets: Any, sampled: jax.Array, weights: jax.Array) -> Any:
    """The targets, and where the weight is 0 sampled ones: a missing value, marked by nan, has a gradient of nan."""
    if is_named(targets) and is_named(outputs):
        axes = likelihood.target_axes(outputs) if sampled.ndim < len(outputs.axes) else outputs.axes
        if set(axes) != set(targets.axes):
            return targets
        targets = targets.rearrange(axes)
    array = plain(targets)
    if not isinstance(array, np.ndarray | jax.Array) or array.shape != sampled.shape:
        return targets
    used = weights.reshape(weights.shape + (1,) * (array.ndim - weights.ndim)) > 0
    return jnp.where(used, array, sampled.astype(array.dtype))


def weighted_mean(losses: jax.Array, weights: jax.Array, num_targets: jax.Array) -> jax.Array:
    """sum(losses * weights) / num_targets, and 0 where there is no target."""
    # What is left out may be marked by labels that are no class, and 0 * nan is nan.
    return jnp.sum(jnp.where(weights == 0, 0, losses * weights)) / jnp.where(num_targets > 0, num_targets, 1)


def _check_microbatch_weights(microbatches: PyTree, weights: Any) -> None:
    """Raise a ValueError if the weights do not have the microbatches' first axis."""
    if microbatches is None or weights is None:
        return
    count = num_microbatches(microbatches)
    shape = jnp.shape(plain(weights))
    if not shape or shape[0] != count:
        raise ValueError(f"weights have shape {shape}; with these {count} microbatches it must begin with {count}")
