"""Estimators of the Gauss-Newton matrix's diagonal from squared gradients (arXiv 2305.14342, Algorithm 2)."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractClassVar
from jaxtyping import Array, Float, Key, PyTree

from sophia_levanter.optim._checks import check_bool, check_choice, check_number, check_scalars
from sophia_levanter.optim._gradients import GradientSums, RefreshStep, accumulate
from sophia_levanter.optim._kronecker import Coordinates
from sophia_levanter.optim._likelihood import (
    Categorical,
    Likelihood,
    check_likelihood,
    check_microbatch_weights,
    target_weights,
    targets_in_use,
    weighted_mean,
)
from sophia_levanter.optim._protocol import Scalar
from sophia_levanter.optim._trees import norm, upcast

REDUCTIONS = ("square_then_average", "average_then_square")


class AbstractSquaredGradient(eqx.Module):
    """B * g^2, where g is the gradient of the mean loss on B targets; see `GaussNewtonBartlett` for `reduction`."""

    samples_targets: AbstractClassVar[bool]
    forward_mode: ClassVar[bool] = False

    # Properties, not `AbstractVar`s: type checkers would order those fields before the likelihood.
    @property
    @abc.abstractmethod
    def reduction(self) -> str: ...

    @property
    @abc.abstractmethod
    def max_grad_norm(self) -> Scalar | None: ...

    @property
    @abc.abstractmethod
    def coordinates(self) -> Coordinates: ...

    def changes_of_basis(self, num_microbatches: int) -> int:
        """The gradient is projected once, or once per microbatch if each is squared."""
        return num_microbatches if self.reduction == "square_then_average" else 1

    def accumulated(self, grad_sum: PyTree, num_targets: Float[Array, ""]) -> PyTree:
        """A microbatch's term in the running total, in at least float32: G_i^2 or G_i."""
        wide = jax.tree.map(upcast, grad_sum)
        return self._squared(wide, num_targets) if self.reduction == "square_then_average" else wide

    def finished(self, total: PyTree, num_targets: Float[Array, ""]) -> PyTree:
        """The estimate, given the sums over microbatches of `accumulated` and of the number of targets."""
        if self.reduction == "average_then_square":
            total = self._squared(total, num_targets)
        return jax.tree.map(lambda x: x / num_targets, total)

    def _squared(self, grad_sum: PyTree, num_targets: Array) -> PyTree:
        if self.max_grad_norm is not None:
            size, limit = norm(grad_sum), self.max_grad_norm * num_targets
            scale = jnp.where(size > limit, limit / size, 1.0)
            grad_sum = jax.tree.map(lambda g: g * scale, grad_sum)
        return jax.tree.map(jnp.square, self.coordinates.project(grad_sum))

    def _check(self) -> None:
        check_choice("reduction", self.reduction, REDUCTIONS)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, low=0, low_open=True)


class GaussNewtonBartlett(AbstractSquaredGradient):
    """B * g^2, where g is the gradient of the mean loss on B targets drawn from the model's own distribution.

    Its mean is the diagonal of the Gauss-Newton matrix (Algorithm 2); it is never negative. It measures the curvature
    of the likelihood's mean loss: if the training loss is c times as large, rho must be c times as large too.

    Both reductions are unbiased over several microbatches, since the G_i are independent with mean zero. With n
    microbatches, squaring first reduces the variance by a factor of up to n; the authors' code averages first.

    Args:
        likelihood: the distribution of the targets given the outputs.
        reduction: how microbatches are combined: `square_then_average` is sum_i G_i^2 / sum_i B_i,
            `average_then_square` is (sum_i G_i)^2 / sum_i B_i, where G_i is the gradient of the summed loss of
            microbatch i and B_i is its number of targets.
        extra_pass: whether a refresh step makes one more backward pass. If False, the microbatches that the curvature
            is estimated on see only sampled targets and are left out of the gradient: the step costs no more than any
            other, and its gradient is the mean over the remaining microbatches.
        max_grad_norm: global norm that g is clipped to before it is squared (1.0 in the authors' code). Clipping biases
            the estimate; None disables it.
        coordinates: the coordinates in which the diagonal is estimated, by default the parameters' own;
            `Sophia.estimator_at` sets them.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> h_hat = GaussNewtonBartlett()(lambda w: jnp.ones((8, 1)) @ w, jnp.zeros((1, 3)), key=jax.random.key(0))
        >>> h_hat.shape, bool((h_hat >= 0).all())
        ((1, 3), True)
    """

    likelihood: Likelihood = Categorical()
    reduction: str = eqx.field(default="square_then_average", static=True)
    extra_pass: bool = eqx.field(default=True, static=True, kw_only=True)
    max_grad_norm: Scalar | None = None
    coordinates: Coordinates = Coordinates()
    samples_targets: ClassVar[bool] = True

    def __check_init__(self) -> None:
        check_likelihood(self.likelihood)
        check_bool("extra_pass", self.extra_pass)
        self._check()

    def __call__(
        self,
        outputs_fn: Callable[..., Any],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: Key[Array, ""],
        weights: Any = None,
    ) -> PyTree:
        """An estimate of the Gauss-Newton diagonal of the (weighted) mean loss.

        Args:
            outputs_fn: model -> outputs, or (model, microbatch) -> the microbatch's outputs.
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...].
            key: a JAX random key for the targets.
            weights: the weight of each target in the mean loss, 1 by default; 0 leaves a target out. The shape is that
                of the likelihood's losses, preceded by the microbatch axis if there are microbatches.

        Raises:
            ValueError, TypeError: if the outputs do not fit the likelihood.
        """
        check_microbatch_weights(microbatches, weights)

        def sampled_loss(model: PyTree, *args: Any) -> tuple[Array, Array]:
            part, own = ((), weights) if microbatches is None else ((args[0][0],), args[0][1])
            return self.sampled_loss(outputs_fn(model, *part), key=args[-1], weights=own)

        parts = None if microbatches is None else (microbatches, weights)
        return self.from_sampled_loss(sampled_loss, model, parts, key=key)

    @property
    def gradients(self) -> float:
        """2/3 for the extra backward pass, 0 without it; the forward pass is shared with the gradient."""
        return 2 / 3 if self.extra_pass else 0.0

    def gradient_and_estimate(self, step: RefreshStep) -> tuple[GradientSums, PyTree]:
        """A step's gradient and an estimate from one forward pass."""
        return step.shared_gradient(self) if self.extra_pass else step.replaced_gradient(self)

    def from_sampled_loss(
        self,
        sampled_loss: Callable[..., tuple[Any, Any]],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: Key[Array, ""],
    ) -> PyTree:
        """The same estimate from a function that draws its own targets, such as a blocked loss over a vocabulary.

        Args:
            sampled_loss: (model, key) or (model, microbatch, key) -> (mean loss on B targets drawn from the model's
                own distribution, B).
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...]; each gets its own key.
            key: a JAX random key for the targets.
        """
        return _estimate(self, "sampled_loss", sampled_loss, model, microbatches, key)

    def sampled_loss(self, outputs: Any, *, key: Key[Array, ""], weights: Any = None) -> tuple[Array, Array]:
        """The mean loss on targets drawn from the outputs' own distribution, and their number B.

        Args:
            outputs: the model's outputs, an array or a NamedArray.
            key: a JAX random key for the targets.
            weights: the weight of each target; B is their sum. The mean loss is weighted by their square roots, so
                that its expected squared gradient is proportional to the weighted sum of the targets' Gauss-Newton
                diagonals.
        """
        _, losses, w = self._sampled(outputs, key, weights)
        return weighted_mean(losses, jnp.sqrt(w), jnp.sum(w)), jnp.sum(w)

    def losses(
        self, outputs: Any, targets: Any, *, key: Key[Array, ""], weights: Any = None
    ) -> tuple[Array, Array, Array]:
        """The mean losses on the true and on sampled targets, and their number B, for `value_grad_and_curvature`.

        Args:
            outputs: the model's outputs, an array or a NamedArray.
            targets: the true targets, in the form that the likelihood expects.
            key: a JAX random key for the sampled targets.
            weights: the weight of each target in the mean; B is their sum.
        """
        sampled, sampled_losses, w = self._sampled(outputs, key, weights)
        targets = targets_in_use(self.likelihood, outputs, targets, sampled, w)
        num_targets = jnp.sum(w)
        return (
            weighted_mean(self.likelihood.loss(outputs, targets), w, num_targets),
            weighted_mean(sampled_losses, jnp.sqrt(w), num_targets),
            num_targets,
        )

    def _sampled(self, outputs: Any, key: Key[Array, ""], weights: Any) -> tuple[Array, Array, Array]:
        """Sampled targets, their losses, and the weights in the losses' shape."""
        sampled = self.likelihood.sample(jax.lax.stop_gradient(outputs), key=key)
        losses = self.likelihood.loss(outputs, sampled)
        return sampled, losses, target_weights(self.likelihood, outputs, losses, weights)


class EmpiricalFisher(AbstractSquaredGradient):
    """B * g^2, where g is the gradient of the mean loss on the B targets in the data: the training gradient itself.

    The mean gradient is not 0 and enters the estimate, so this is not the diagonal of the Gauss-Newton matrix
    (Kunstner, Balles and Hennig 2019, arXiv 1905.12558). The arguments are as for `GaussNewtonBartlett`.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> EmpiricalFisher()(lambda w: (3.0 * jnp.sum(w), 8), jnp.ones(2), key=jax.random.key(0)).tolist()  # 8 * 3^2
        [72.0, 72.0]
    """

    reduction: str = eqx.field(default="square_then_average", static=True)
    max_grad_norm: Scalar | None = None
    coordinates: Coordinates = Coordinates()
    gradients: ClassVar[float] = 0.0
    samples_targets: ClassVar[bool] = False

    def __check_init__(self) -> None:
        self._check()

    def __call__(
        self,
        loss_fn: Callable[..., tuple[Any, Any]],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: Key[Array, ""],
    ) -> PyTree:
        """B * g^2 on the targets in the data.

        Args:
            loss_fn: model, or (model, microbatch), -> (mean loss on the true targets, their number B).
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...].
            key: a JAX random key, which only other estimators use.
        """
        return _estimate(self, "loss_fn", lambda *args: loss_fn(*args[:-1]), model, microbatches, key)

    def gradient_and_estimate(self, step: RefreshStep) -> tuple[GradientSums, PyTree]:
        """A step's gradient and an estimate from the same passes."""
        return step.shared_gradient(self)


def _estimate(
    estimator: AbstractSquaredGradient,
    name: str,
    loss_fn: Callable[..., tuple[Any, Any]],
    model: PyTree,
    microbatches: PyTree,
    key: Key[Array, ""],
) -> PyTree:
    """An estimate without a gradient, from (model, key) or (model, microbatch, key) -> (mean loss, num_targets)."""

    def losses_fn(*args: Any) -> tuple[Array, Array, Array]:
        loss, num_targets = check_scalars(name, loss_fn(*args), ("a scalar mean loss", "the number of targets"))
        return loss, loss, num_targets

    sums = accumulate(losses_fn, model, microbatches, key=key, estimator=estimator, gradient=False)
    return estimator.finished(sums.curvature, sums.num_targets)
