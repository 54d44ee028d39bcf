"""Estimators of the diagonal of the Gauss-Newton matrix from squared gradients (arXiv 2305.14342, Algorithm 2)."""

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
    """Base class for estimators that compute B * g^2, where g is the gradient of the mean loss over B targets."""

    samples_targets: AbstractClassVar[bool]
    forward_mode: ClassVar[bool] = False

    # Use properties: type checkers would put `AbstractVar`s before `likelihood` in the constructor of a subclass.
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
        """Return the number of projections: one, or one per microbatch if each gradient is squared separately."""
        return num_microbatches if self.reduction == "square_then_average" else 1

    def accumulated(self, grad_sum: PyTree, num_targets: Float[Array, ""]) -> PyTree:
        """Return the term that a microbatch adds to the running total, G_i^2 or G_i, in float32 or wider."""
        wide = jax.tree.map(upcast, grad_sum)
        return self._squared(wide, num_targets) if self.reduction == "square_then_average" else wide

    def finished(self, total: PyTree, num_targets: Float[Array, ""]) -> PyTree:
        """Return the estimate, given `accumulated` and the number of targets, each summed over all microbatches."""
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
    """Estimator B * g^2, where g is the gradient of the mean loss over B targets drawn from the model's distribution.

    Its mean is the diagonal of the Gauss-Newton matrix (Algorithm 2), and it is never negative. It measures the
    curvature of the mean negative log-likelihood. If the training loss is c times as large, multiply rho by c.

    Both reductions are unbiased for several microbatches, because the G_i are independent with mean zero. With n
    microbatches, squaring first reduces the variance by a factor of up to n; the authors' code averages first.

    Args:
        likelihood: the distribution of the targets given the outputs.
        reduction: how microbatches are combined. `square_then_average` is sum_i G_i^2 / sum_i B_i, and
            `average_then_square` is (sum_i G_i)^2 / sum_i B_i, where G_i is the gradient of the summed loss of
            microbatch i and B_i is its number of targets.
        extra_pass: whether a refresh step makes an additional backward pass. If False, the microbatches used to
            estimate the curvature see only sampled targets and do not contribute to the gradient. The step then costs
            no more than any other, and its gradient is the mean over the remaining microbatches.
        max_grad_norm: global norm to which g is clipped before squaring (1.0 in the authors' code). Clipping biases
            the estimate; None disables it.
        coordinates: the coordinates in which to estimate the diagonal, by default those of the parameters. They are
            set by `Sophia.estimator_at`.

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
        """Estimate the diagonal of the Gauss-Newton matrix of the (weighted) mean loss.

        Args:
            outputs_fn: model -> outputs, or (model, microbatch) -> the microbatch's outputs.
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...].
            key: a JAX random key for the targets.
            weights: the weight of each target in the mean loss, 1 by default; 0 excludes the target. The shape matches
                the losses, with a leading microbatch axis if there are microbatches.

        Raises:
            ValueError, TypeError: if the likelihood does not accept the outputs.
        """
        check_microbatch_weights(microbatches, weights)

        def sampled_loss(model: PyTree, *args: Any) -> tuple[Array, Array]:
            part, own = ((), weights) if microbatches is None else ((args[0][0],), args[0][1])
            return self.sampled_loss(outputs_fn(model, *part), key=args[-1], weights=own)

        parts = None if microbatches is None else (microbatches, weights)
        return self.from_sampled_loss(sampled_loss, model, parts, key=key)

    @property
    def gradients(self) -> float:
        """The cost of an estimate in gradient computations: 2/3 for a backward pass without a forward pass, else 0."""
        return 2 / 3 if self.extra_pass else 0.0

    def gradient_and_estimate(self, step: RefreshStep) -> tuple[GradientSums, PyTree]:
        """Compute both the gradient of a step and an estimate in one forward pass."""
        return step.shared_gradient(self) if self.extra_pass else step.replaced_gradient(self)

    def from_sampled_loss(
        self,
        sampled_loss: Callable[..., tuple[Any, Any]],
        model: PyTree,
        microbatches: PyTree = None,
        *,
        key: Key[Array, ""],
    ) -> PyTree:
        """Compute the estimate from a function that draws its own targets, such as a blocked loss over a vocabulary.

        Args:
            sampled_loss: (model, key) or (model, microbatch, key) -> (mean loss over B targets drawn from the model's
                own distribution, B).
            model: any pytree.
            microbatches: a pytree of arrays [microbatch, ...]; each gets its own key.
            key: a JAX random key for the targets.
        """
        return _estimate(self, "sampled_loss", sampled_loss, model, microbatches, key)

    def sampled_loss(self, outputs: Any, *, key: Key[Array, ""], weights: Any = None) -> tuple[Array, Array]:
        """Draw targets from the distribution given by the outputs, and return their mean loss and their number B.

        Args:
            outputs: the model's outputs, an array or a NamedArray.
            key: a JAX random key for the targets.
            weights: the weight of each target; B is the sum of the weights. The mean loss is weighted by their square
                roots, so that the expectation of its squared gradient is proportional to the weighted sum of the
                Gauss-Newton diagonals of the targets.
        """
        _, losses, w = self._sampled(outputs, key, weights)
        return weighted_mean(losses, jnp.sqrt(w), jnp.sum(w)), jnp.sum(w)

    def losses(
        self, outputs: Any, targets: Any, *, key: Key[Array, ""], weights: Any = None
    ) -> tuple[Array, Array, Array]:
        """Return mean losses on true and sampled targets, and the number of targets, for `value_grad_and_curvature`.

        Args:
            targets: the true targets, in the form that the likelihood expects.
            outputs, key, weights: as for `sampled_loss`.
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
        """Return sampled targets, their losses, and the weights with the shape of the losses."""
        sampled = self.likelihood.sample(jax.lax.stop_gradient(outputs), key=key)
        losses = self.likelihood.loss(outputs, sampled)
        return sampled, losses, target_weights(self.likelihood, outputs, losses, weights)


class EmpiricalFisher(AbstractSquaredGradient):
    """Estimator B * g^2, where g is the training gradient, that is, the gradient of the mean loss over B true targets.

    The mean of g is not 0 and contributes to the estimate, so this does not estimate the Gauss-Newton diagonal
    (Kunstner, Balles and Hennig 2019, arXiv 1905.12558). The arguments are the same as for `GaussNewtonBartlett`.

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
        """Compute B * g^2 on the true targets.

        Args:
            loss_fn: model or (model, microbatch) -> (mean loss over B true targets, B).
            model, microbatches: as for `GaussNewtonBartlett`.
            key: a JAX random key, used only by other estimators.
        """
        return _estimate(self, "loss_fn", lambda *args: loss_fn(*args[:-1]), model, microbatches, key)

    def gradient_and_estimate(self, step: RefreshStep) -> tuple[GradientSums, PyTree]:
        """Compute both the gradient of a step and an estimate in the same passes."""
        return step.shared_gradient(self)


def _estimate(
    estimator: AbstractSquaredGradient,
    name: str,
    loss_fn: Callable[..., tuple[Any, Any]],
    model: PyTree,
    microbatches: PyTree,
    key: Key[Array, ""],
) -> PyTree:
    """Compute only an estimate; `loss_fn` maps (model, key) or (model, microbatch, key) to (mean loss, num_targets)."""

    def losses_fn(*args: Any) -> tuple[Array, Array, Array]:
        loss, num_targets = check_scalars(name, loss_fn(*args), ("a scalar mean loss", "the number of targets"))
        return loss, loss, num_targets

    sums = accumulate(losses_fn, model, microbatches, key=key, estimator=estimator, gradient=False)
    return estimator.finished(sums.curvature, sums.num_targets)
