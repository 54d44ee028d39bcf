"""Likelihoods: distributions of targets given model outputs, with methods to sample targets and compute their losses.

Gauss-Newton-Bartlett uses both: the Gauss-Newton matrix is the expected outer product of the loss gradient with itself,
for targets drawn from the model (arXiv 2305.14342, section 2.3). Any object with these methods is a likelihood.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from sophia_levanter.optim._categorical import categorical_loss, sample_categorical
from sophia_levanter.optim._checks import check_count, check_not_negative, check_number, whole_number
from sophia_levanter.optim._gradients import num_microbatches
from sophia_levanter.optim._trees import axis_names, is_named, plain, upcast


class Likelihood(Protocol):
    """A distribution of targets given model outputs.

    `loss` returns one number per target, so that targets can be weighted or excluded. The training loss must be the
    (weighted) mean of these numbers.
    """

    def sample(self, outputs: Any, *, key: Key[Array, ""]) -> Array:
        """Draw targets from the distribution given by the outputs."""
        ...

    def loss(self, outputs: Any, targets: Any) -> Array:
        """Compute the negative log-likelihood of each target in nats, in float32 or wider."""
        ...

    def target_axes(self, outputs: Any) -> tuple:
        """Return the axes of the losses for NamedArray outputs. Called only if targets or weights are NamedArrays."""
        ...


def check_likelihood(value: Any) -> None:
    """Raise a TypeError if the value lacks the methods of a likelihood, or is a class instead of an instance."""
    if isinstance(value, type) or not (hasattr(value, "sample") and hasattr(value, "loss")):
        raise TypeError(
            f"likelihood is {value!r}; it must be an instance, such as Categorical(), Bernoulli() or Normal()"
        )


class Categorical(eqx.Module):
    """Categorical likelihood of a target class, given logits. The loss is softmax cross-entropy.

    Args:
        axis: the class axis of the logits, specified by position or, for NamedArrays, by name.
        num_classes: the number of classes; any further logits are padding, which is never drawn. None for no padding.

    Raises:
        ValueError: from the methods, if the logits have no such axis.

    Examples:
        >>> f"{Categorical().loss(jnp.zeros((1, 4)), jnp.asarray([2]))[0]:.4f}"  # log 4
        '1.3863'
    """

    axis: int | str = eqx.field(default=-1, static=True, converter=whole_number)
    num_classes: int | None = eqx.field(default=None, static=True, converter=whole_number)

    def __check_init__(self) -> None:
        if isinstance(self.axis, bool) or not isinstance(self.axis, int | str):
            raise TypeError(f"axis is {self.axis!r}; it must be the position or name of the class axis")
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes)

    def sample(self, outputs: Any, *, key: Key[Array, ""]) -> Array:
        """Draw int32 classes using float32 arithmetic. The remaining axes of the logits keep their order."""
        logits = self._logits(outputs)
        return sample_categorical(logits, jax.random.uniform(key, logits.shape[:-1]))

    def loss(self, outputs: Any, targets: Any) -> Array:
        """Compute the cross-entropy of each target class.

        Args:
            outputs: [..., classes] logits; the class axis is specified by `axis`.
            targets: [...] integers; the axes of a NamedArray are reordered to match the logits. The loss is nan for a
                target that is not a class, or inf if it is in the padding; use weight 0 for such targets.
        """
        logits = self._logits(outputs)
        if is_named(targets) and is_named(outputs):
            targets = _in_order(targets, self.target_axes(outputs))
        targets = jnp.asarray(plain(targets))
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise TypeError(
                f"targets for a categorical likelihood have dtype {targets.dtype}; they must be integer classes"
            )
        _check_target_shape(targets, logits.shape[:-1])
        # The loss is nan for a target that is not a class. This includes -1, which would otherwise index from the end.
        return categorical_loss(logits, jnp.where(targets < 0, logits.shape[-1], targets))

    def target_axes(self, outputs: Any) -> tuple:
        """Return the axes of the targets for NamedArray logits."""
        name = self._axis_of(outputs).name
        return tuple(axis for axis in outputs.axes if axis.name != name)

    def _axis_of(self, outputs: Any) -> Any:
        if isinstance(self.axis, str):
            for axis in outputs.axes:
                if axis.name == self.axis:
                    return axis
            raise ValueError(f"the logits have no axis {self.axis!r}; their axes are {axis_names(outputs)}")
        if not -len(outputs.axes) <= self.axis < len(outputs.axes):
            raise ValueError(f"the logits have no axis {self.axis}; their axes are {axis_names(outputs) or 'none'}")
        return outputs.axes[self.axis]

    def _logits(self, outputs: Any) -> Array:
        """Return logits [..., classes], with -inf for the padding."""
        if is_named(outputs):
            logits = outputs.rearrange((*self.target_axes(outputs), self._axis_of(outputs))).array
        else:
            logits = _one_array(outputs)
            if isinstance(self.axis, str):
                raise ValueError(
                    f"the class axis is {self.axis!r}, but the logits have no named axes; "
                    "specify its position, as in Categorical(axis=-1)"
                )
            if not -logits.ndim <= self.axis < logits.ndim:
                raise ValueError(
                    f"the logits have shape {logits.shape} and no class axis {self.axis}; "
                    "a categorical likelihood requires logits [..., classes], not a loss"
                )
            logits = jnp.moveaxis(logits, self.axis, -1)
        _check_floating("logits", logits)
        classes = logits.shape[-1]
        if classes < 2 or self.num_classes == 1:
            raise ValueError(
                f"the outputs have only one class on axis {self.axis!r}, so there is no curvature; "
                "for one number or one logit per target, use Normal() or Bernoulli()"
            )
        if self.num_classes is None or self.num_classes == classes:
            return logits
        if self.num_classes > classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the logits have {classes} on axis {self.axis!r}")
        return jnp.where(jnp.arange(classes) < self.num_classes, logits, -jnp.inf)


class _Elementwise(eqx.Module):
    """Likelihood of independent targets, one for each output. Losses are summed over the last `event_ndim` axes."""

    event_ndim: int = eqx.field(default=0, static=True, kw_only=True)

    def __check_init__(self) -> None:
        check_count("event_ndim", self.event_ndim, low=0)

    def target_axes(self, outputs: Any) -> tuple:
        """Return the axes of the losses for NamedArray outputs."""
        return outputs.axes[: len(outputs.axes) - self.event_ndim]

    def _outputs(self, outputs: Any) -> Array:
        array = _one_array(plain(outputs))
        _check_floating("outputs", array)
        if array.ndim < self.event_ndim:
            raise ValueError(
                f"the outputs have shape {array.shape}, which has fewer axes than event_ndim={self.event_ndim}"
            )
        return upcast(array)

    def _targets(self, outputs: Any, targets: Any) -> Array:
        if is_named(targets) and is_named(outputs):
            targets = _in_order(targets, outputs.axes)
        targets = jnp.asarray(plain(targets))
        if jnp.iscomplexobj(targets):
            raise TypeError(f"the targets have dtype {targets.dtype}; they must be real")
        _check_target_shape(targets, jnp.shape(plain(outputs)))
        return targets

    def _summed(self, losses: Array) -> Array:
        return jnp.sum(losses, axis=tuple(range(losses.ndim - self.event_ndim, losses.ndim)))


class Bernoulli(_Elementwise):
    """Bernoulli likelihood of a binary target, given the logit of P(target = 1). The loss is sigmoid cross-entropy.

    Args:
        event_ndim: the number of trailing axes to sum over for the loss of one target (1 for outputs [row, label] if
            the training loss is the mean over rows of the sum over labels).

    Examples:
        >>> f"{Bernoulli().loss(jnp.zeros(1), jnp.ones(1))[0]:.4f}"  # log 2
        '0.6931'
    """

    def sample(self, outputs: Any, *, key: Key[Array, ""]) -> Array:
        """Draw float32 zeros and ones with the shape of the outputs."""
        logits = self._outputs(outputs)
        return (jax.random.uniform(key, logits.shape) < jax.nn.sigmoid(logits)).astype(logits.dtype)

    def loss(self, outputs: Any, targets: Any) -> Array:
        """Compute the cross-entropy of targets in [0, 1]. Outputs [...] are logits, and targets have the same shape."""
        logits = self._outputs(outputs)
        return self._summed(jax.nn.softplus(logits) - self._targets(outputs, targets) * logits)


class Normal(_Elementwise):
    """Normal likelihood of a real-valued target whose mean is the model's output.

    The loss is the squared error divided by twice the variance, plus a constant.

    Args:
        variance: variance of the targets, above 0; a number or an array that broadcasts to the shape of the outputs.
            Use 1/2 if the training loss is the mean of (y - output)^2.
        event_ndim: the number of trailing axes to sum over for the loss of one target.

    Examples:
        >>> likelihood = Normal(0.5)  # (y - output)^2 and a constant
        >>> float(likelihood.loss(jnp.zeros(1), jnp.full(1, 3.0))[0] - likelihood.loss(jnp.zeros(1), jnp.zeros(1))[0])
        9.0
    """

    variance: Any = 1.0

    def __check_init__(self) -> None:
        check_number("variance", self.variance, low=0, low_open=True)

    def sample(self, outputs: Any, *, key: Key[Array, ""]) -> Array:
        """Draw numbers in float32 or wider, with the shape of the outputs."""
        mean = self._outputs(outputs)
        return mean + jnp.sqrt(self._variance(mean)) * jax.random.normal(key, mean.shape, mean.dtype)

    def loss(self, outputs: Any, targets: Any) -> Array:
        """Compute the negative log-density of each target. Outputs [...] are means; targets have the same shape."""
        mean = self._outputs(outputs)
        variance = self._variance(mean)
        error = self._targets(outputs, targets) - mean
        return self._summed(jnp.square(error) / (2 * variance) + 0.5 * jnp.log(2 * math.pi * variance))

    def _variance(self, mean: Array) -> Array:
        """Broadcast the variance to the shape of the outputs. Raise a ValueError if this would enlarge that shape."""
        variance = jnp.asarray(self.variance, mean.dtype)
        try:
            return jnp.broadcast_to(variance, mean.shape)
        except ValueError as error:
            raise ValueError(
                f"variance has shape {variance.shape}, which does not broadcast to the outputs' shape {mean.shape}"
            ) from error


def _in_order(targets: Any, axes: tuple) -> Any:
    """Return the targets with the given axes in the given order."""
    if set(targets.axes) != set(axes):
        wanted = ", ".join(f"{axis.name}: {axis.size}" for axis in axes)
        raise ValueError(f"the targets have axes {axis_names(targets)}; for these outputs, they must be {wanted}")
    return targets.rearrange(axes)


def _one_array(outputs: Any) -> Array:
    if not isinstance(outputs, np.ndarray | Array):
        raise TypeError(
            f"the outputs are a {type(outputs).__name__}; the function must return a single array "
            "(if it also returns a state, return only the first result)"
        )
    return jnp.asarray(outputs)


def _check_floating(name: str, array: Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"the {name} have dtype {array.dtype}; a likelihood requires floating-point numbers")


def _check_target_shape(targets: Array, wanted: tuple[int, ...]) -> None:
    # Broadcasting [rows] with [rows, 1] would give a loss of shape [rows, rows].
    if targets.shape != wanted:
        raise ValueError(f"the targets have shape {targets.shape}; these outputs require shape {wanted}")


def target_weights(likelihood: Likelihood, outputs: Any, losses: Array, weights: Any) -> Array:
    """Return weights with the shape of the losses, 1 by default. NamedArray axes are reordered to match the targets."""
    if weights is None:
        return jnp.ones_like(losses)
    check_not_negative("weights", weights)
    if is_named(weights) and is_named(outputs):
        axes = likelihood.target_axes(outputs)
        if not set(weights.axes) <= set(axes):
            found, wanted = ({axis.name: axis.size for axis in of} for of in (weights.axes, axes))
            raise ValueError(f"weights have axes {found}; they must be among the targets' axes {wanted}")
        weights = weights.broadcast_to(axes)
    array = jnp.asarray(plain(weights), losses.dtype)
    try:
        return jnp.broadcast_to(array, losses.shape)
    except ValueError as error:
        raise ValueError(f"weights have shape {array.shape}, but the targets have shape {losses.shape}") from error


def targets_in_use(likelihood: Likelihood, outputs: Any, targets: Any, sampled: Array, weights: Array) -> Any:
    """Replace targets of weight 0 with sampled ones, because missing values marked as nan would make gradients nan."""
    if is_named(targets) and is_named(outputs):
        axes = likelihood.target_axes(outputs) if sampled.ndim < len(outputs.axes) else outputs.axes
        if set(axes) != set(targets.axes):
            return targets
        targets = targets.rearrange(axes)
    array = plain(targets)
    if not isinstance(array, np.ndarray | Array) or array.shape != sampled.shape:
        return targets
    used = weights.reshape(weights.shape + (1,) * (array.ndim - weights.ndim)) > 0
    return jnp.where(used, array, sampled.astype(array.dtype))


def weighted_mean(losses: Array, weights: Array, num_targets: Array) -> Array:
    """Return sum(losses * weights) / num_targets, or 0 if num_targets is 0."""
    # Excluded targets may have invalid labels, whose loss is nan, and 0 * nan is nan.
    return jnp.sum(jnp.where(weights == 0, 0, losses * weights)) / jnp.where(num_targets > 0, num_targets, 1)


def check_microbatch_weights(microbatches: PyTree, weights: Any) -> None:
    """Raise a ValueError if the first axis of the weights does not match the microbatches."""
    if microbatches is None or weights is None:
        return
    count = num_microbatches(microbatches)
    shape = jnp.shape(plain(weights))
    if not shape or shape[0] != count:
        raise ValueError(f"weights have shape {shape}; for {count} microbatches, the shape must begin with {count}")
