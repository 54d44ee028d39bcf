"""What a training loop may ask of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

PyTree = Any
Scalar = float | jax.Array
ScalarOrSchedule = Scalar | Callable[[jax.Array], jax.Array]
Estimator = Callable[..., PyTree]  # what `Sophia.estimate` calls
State = TypeVar("State")


class GradientSums(NamedTuple):
    """Sums over targets.

    Attributes:
        loss: the loss, a scalar.
        num_targets: the number of targets, or their weight, a scalar.
        grads: the gradient, like the model's differentiable part.
        curvature: the estimator's running total, or None.
    """

    loss: jax.Array
    num_targets: jax.Array
    grads: PyTree
    curvature: PyTree | None

    def mean(self) -> tuple[jax.Array, PyTree]:
        """The mean loss and its gradient."""
        return self.loss / self.num_targets, jax.tree.map(lambda g: g / self.num_targets, self.grads)


class RefreshStep(Protocol):
    """A training step that refreshes the curvature, as an estimator sees it.

    The estimator decides which passes over the batch the step makes.
    """

    @property
    def model(self) -> PyTree:
        """The model before the step."""
        ...

    @property
    def key(self) -> jax.Array:
        """A jax random key of this step's curvature."""
        ...

    def gradient(self) -> GradientSums:
        """Loss and gradient over the whole batch."""
        ...

    def shared_gradient(self, estimator: Any, *, labels: str) -> tuple[GradientSums, PyTree, jax.Array]:
        """The same, and a second backward pass over the curvature's microbatches from the same forward pass.

        Args:
            estimator: its `accumulated(grad_sum, num_targets)` is summed over those microbatches.
            labels: of the second pass: `sampled` from the model, or the true ones of the `data`.

        Returns:
            The sums over the batch, the sum of `accumulated`, and the number of the curvature's targets.
        """
        ...

    def curvature_pass(self, after: GradientSums) -> tuple[Callable[..., jax.Array], PyTree, jax.Array]:
        """For a pass over the curvature's microbatches by itself.

        Args:
            after: sums that are complete before it begins, so that two passes are never in memory at once.

        Returns:
            (model, microbatch) -> scalar mean loss, which has a forward derivative; the microbatches; and the number
            of targets in each.
        """
        ...


class CurvatureEstimator(Protocol):
    """An estimator of the curvature's diagonal that a trainer can use. Called by itself it is an `Estimator`.

    Attributes:
        gradients: what an estimate costs over its part of the batch, in gradients (a forward and a backward pass).
        forward_mode: whether the loss needs a forward derivative.
    """

    @property
    def gradients(self) -> float: ...

    @property
    def forward_mode(self) -> bool: ...

    def gradient_and_estimate(self, step: RefreshStep) -> tuple[GradientSums, PyTree]:
        """The step's gradient over the whole batch, and an estimate over the curvature's part of it."""
        ...

    def changes_of_basis(self, num_microbatches: int) -> int:
        """How often an estimate is brought into a basis, or out of it."""
        ...


class MatrixWork(NamedTuple):
    """An optimizer's work on whole matrices.

    Attributes:
        changes: changes of basis in every step.
        turn_changes: changes of basis where the basis turns.
        turns_at: whether it turns at a step.
        max_size: larger sides of a matrix are not rotated.
        newton_schulz: Newton-Schulz iterations in every step.
    """

    changes: int = 0
    turn_changes: int = 0
    turns_at: Callable[[int], bool] = lambda step: False
    max_size: int = 0
    newton_schulz: int = 0


class Optimizer(Protocol[State]):
    """optax's convention on any pytree, plus the host-side question whether the curvature is due."""

    @property
    def learning_rate(self) -> ScalarOrSchedule:
        """A number or a function of the update count."""
        ...

    @property
    def estimator(self) -> Any:
        """The estimator of the curvature; None for an optimizer without curvature."""
        ...

    def init(self, model: PyTree) -> State:
        """The state before the first step."""
        ...

    def estimator_at(self, state: State) -> Any:
        """The estimator in the coordinates of a state."""
        ...

    def update(
        self, grads: PyTree, state: State, model: PyTree, h_hat: Any = None, *, finite: jax.Array | None = None
    ) -> tuple[PyTree, State]:
        """The step to add to the model (`eqx.apply_updates`), and the next state.

        Where the gradient is not finite, the step is zero and nothing in the state changes but counts. `finite` says
        whether it is, where the caller knows; otherwise the gradient is looked through. `h_hat` is a new estimate of
        the curvature, if one was due.
        """
        ...

    def refresh_due(self, step: int) -> bool:
        """Whether an estimate of the curvature is wanted at this step; decided on the host."""
        ...

    def metrics(self, state: State) -> dict[str, jax.Array]:
        """Scalars worth logging."""
        ...

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """What it does to whole matrices, for the count of FLOPs.

        Args:
            num_microbatches: those that an estimate of the curvature is made on.
        """
        ...


def value_at(name: str, value: ScalarOrSchedule, count: jax.Array) -> Any:
    """A hyper-parameter at an update count, whether it is a number or a schedule.

    Raises:
        TypeError: if what the schedule gives is no number.
        ValueError: if there are several.
    """
    found = value(count) if callable(value) else value
    if not isinstance(found, Real | np.ndarray | jax.Array):
        raise TypeError(f"{name} at an update count is {found!r}; it must be a number")
    check_one(name, found)
    return found


def check_one(name: str, value: Any) -> None:
    """Raise a ValueError for an array of several numbers, which would broadcast over the parameters' last axis."""
    if np.shape(value) != ():
        raise ValueError(f"{name} has shape {np.shape(value)}; one optimizer has one number (several need vmap)")
