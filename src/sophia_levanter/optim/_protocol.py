"""The optimizer and curvature-estimator interfaces used by training loops."""

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
    """An estimator of the diagonal of the curvature, for use in training loops.

    Attributes:
        gradients: the cost of an estimate on its part of the batch; a forward and a backward pass together cost 1.
        forward_mode: whether the loss must have a forward-mode derivative.
    """

    @property
    def gradients(self) -> float: ...

    @property
    def forward_mode(self) -> bool: ...

    def gradient_and_estimate(self, step: RefreshStep) -> tuple[GradientSums, PyTree]:
        """Return the gradient over the batch, and an estimate over the microbatches in `step.first`."""
        ...

    def changes_of_basis(self, num_microbatches: int) -> int:
        """Return the number of projections into and out of a basis for one estimate."""
        ...


class MatrixWork(NamedTuple):
    """Whole-matrix operations performed by an optimizer.

    Attributes:
        changes: number of basis changes in every step.
        turn_changes: number of additional basis changes in a step that updates the basis.
        turns_at: a function that returns whether the step with a given number updates the basis.
        max_size: matrix sides larger than this are not rotated.
        newton_schulz: number of Newton-Schulz iterations in every step.
    """

    changes: int = 0
    turn_changes: int = 0
    turns_at: Callable[[int], bool] = lambda step: False
    max_size: int = 0
    newton_schulz: int = 0


class Optimizer(Protocol[State]):
    """An optimizer for any pytree. It follows optax conventions and schedules curvature refreshes on the host."""

    @property
    def learning_rate(self) -> ScalarOrSchedule:
        """The learning rate, as a number or a function of the update count."""
        ...

    @property
    def estimator(self) -> Any:
        """The curvature estimator, or None if the optimizer does not use curvature."""
        ...

    def init(self, model: PyTree) -> State:
        """Return the state before the first step."""
        ...

    def estimator_at(self, state: State) -> Any:
        """Return the estimator for the basis stored in a state."""
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
        """Return the step to add to the model (with `eqx.apply_updates`), and the next state.

        If the gradient is not finite, the step is zero and only the counts in the state change. `finite` states whether
        it is finite; if None, this is checked. `h_hat` is a new curvature estimate, if one was due.
        """
        ...

    def refresh_due(self, step: int) -> bool:
        """Return whether a curvature estimate is due at this step. This runs on the host."""
        ...

    def metrics(self, state: State, num_targets: float | Float[Array, ""] | None = None) -> dict[str, Float[Array, ""]]:
        """Return scalars to log; `num_targets` is the number of targets in a batch."""
        ...

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """Return the whole-matrix operations, for counting FLOPs.

        `num_microbatches` is the number of microbatches that estimate the curvature.
        """
        ...


class OptimizerWrapper(eqx.Module):
    """Base class for optimizer wrappers. `learning_rate` is that of the wrapped optimizer, without group factors."""

    optimizer: eqx.AbstractVar[Any]

    def _inner(self, state: Any) -> Any:
        """Return the state of the wrapped optimizer, given the state of the wrapper."""
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
        """Return the unclipped coordinates of the wrapped optimizer, or None if it does not clip coordinates."""
        found = getattr(self.optimizer, "unclipped", None)
        return None if found is None else found(self._inner(state))

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        return self.optimizer.matrix_work(num_microbatches)
