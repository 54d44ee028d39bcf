"""The optimizer and curvature-estimator interfaces that a training loop uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import equinox as eqx
from jaxtyping import Array, Bool, Float, PyTree

from sophia_levanter.optim._gradients import GradientSums, RefreshStep

Scalar = float | Array
ScalarOrSchedule = Scalar | Callable[[Array], Any]
State = TypeVar("State")


class Estimator(Protocol):
    """An estimator of the curvature's diagonal that a training loop can use.

    Attributes:
        gradients: the cost of an estimate on its part of the batch, in gradients (a forward and a backward pass each).
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
        """The number of projections into a basis, or back, that an estimate makes."""
        ...


class MatrixWork(NamedTuple):
    """An optimizer's work on whole matrices.

    Attributes:
        changes: changes of basis in every step.
        turn_changes: additional changes of basis in a step that updates the basis.
        turns_at: whether a step updates the basis, given its number.
        max_size: sides of a matrix that are larger than this are not rotated.
        newton_schulz: Newton-Schulz iterations in every step.
    """

    changes: int = 0
    turn_changes: int = 0
    turns_at: Callable[[int], bool] = lambda step: False
    max_size: int = 0
    newton_schulz: int = 0


class Optimizer(Protocol[State]):
    """An optimizer for any pytree, in optax's convention, that decides on the host when to refresh the curvature."""

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
        """The estimator in the basis of a state."""
        ...

    def update(
        self,
        grads: PyTree,
        state: State,
        model: PyTree,
        h_hat: PyTree | None = None,
        *,
        finite: Bool[Array, ""] | None = None,
    ) -> tuple[PyTree, State]:
        """The step to add to the model (`eqx.apply_updates`), and the next state.

        If the gradient is not finite, the step is zero and only the counts in the state change. `finite` is whether it
        is finite; if None, it is checked. `h_hat` is a new estimate of the curvature, if one was due.
        """
        ...

    def refresh_due(self, step: int) -> bool:
        """Whether an estimate of the curvature is due at this step; decided on the host."""
        ...

    def metrics(self, state: State, num_targets: float | Float[Array, ""] | None = None) -> dict[str, Float[Array, ""]]:
        """Scalars worth logging; `num_targets` is the number of targets in a batch."""
        ...

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """The optimizer's work on whole matrices, for the FLOP count.

        Args:
            num_microbatches: the number of microbatches that the curvature is estimated on.
        """
        ...


class OptimizerWrapper(eqx.Module):
    """A base class that forwards to the wrapped optimizer. `learning_rate` excludes the wrapper's factors."""

    optimizer: eqx.AbstractVar[Any]

    def _inner(self, state: Any) -> Any:
        """The wrapped optimizer's state, given the wrapper's."""
        return state

    @property
    def learning_rate(self) -> ScalarOrSchedule:
        return self.optimizer.learning_rate

    @property
    def estimator(self) -> Any:
        return self.optimizer.estimator

    def estimator_at(self, state: Any) -> Any:
        return self.optimizer.estimator_at(self._inner(state))

    def refresh_due(self, step: int) -> bool:
        return self.optimizer.refresh_due(step)

    def metrics(self, state: Any, num_targets: float | Float[Array, ""] | None = None) -> dict[str, Float[Array, ""]]:
        return self.optimizer.metrics(self._inner(state), num_targets)

    def unclipped(self, state: Any) -> PyTree[Bool[Array, "..."]] | None:
        """The wrapped optimizer's unclipped coordinates; None for an optimizer that does not clip coordinates."""
        found = getattr(self.optimizer, "unclipped", None)
        return None if found is None else found(self._inner(state))

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        return self.optimizer.matrix_work(num_microbatches)
