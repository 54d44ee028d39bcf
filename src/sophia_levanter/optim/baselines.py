"""AdamW and Lion, optax's, behind the protocol that Sophia follows."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax
import optax

from sophia_levanter.optim.protocol import (
    PyTree,
    Scalar,
    ScalarOrSchedule,
    WeightDecayMask,
    check_range,
    check_same_structure,
    decay_mask_tree,
    differentiable,
)


class _OptaxOptimizer(eqx.Module):
    """An optax transformation on the differentiable part of a model."""

    @abc.abstractmethod
    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        """The optax transformation for these parameters."""

    def init(self, model: PyTree) -> Any:
        """optax's state."""
        params = differentiable(model)
        return self.transformation(params).init(params)

    def update(self, grads: PyTree, state: Any, model: PyTree) -> tuple[PyTree, Any]:
        """One step from the gradient of the mean loss: the step to add to the model, and the next state.

        Raises:
            ValueError: if the gradient's tree is not the model's; names the path.
        """
        params = differentiable(model)
        check_same_structure("grads", grads, params)
        return self.transformation(params).update(grads, state, params)

    def refresh_due(self, step: int) -> bool:
        """Never: there is no curvature to estimate."""
        return False

    def metrics(self, state: Any) -> dict[str, jax.Array]:
        """`momentum_norm`, the global 2-norm of the first moment as stored."""
        return {"momentum_norm": optax.tree.norm(optax.tree.get(state, "mu"))}


class AdamW(_OptaxOptimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), `optax.adamw`.

    Args:
        learning_rate: a number or a function of the update count.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, multiplied by the learning rate.
        weight_decay_mask: a tree (or prefix) of bools, or a function from parameters to one; None decays every leaf.

    Raises:
        ValueError: if a hyper-parameter that is a concrete number is out of its range.
    """

    learning_rate: ScalarOrSchedule = 6e-4
    b1: Scalar = 0.9
    b2: Scalar = 0.95
    eps: Scalar = 1e-8
    weight_decay: Scalar = 0.1
    weight_decay_mask: WeightDecayMask = None

    def __check_init__(self) -> None:
        _check_shared(self)
        check_range("eps", self.eps, low=0)

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        """The optax transformation for these parameters."""
        mask = decay_mask_tree(self.weight_decay_mask, params)
        return optax.adamw(self.learning_rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=mask)


class Lion(_OptaxOptimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675), `optax.lion`. The arguments are AdamW's, without eps."""

    learning_rate: ScalarOrSchedule = 1e-4
    b1: Scalar = 0.95
    b2: Scalar = 0.98
    weight_decay: Scalar = 0.2
    weight_decay_mask: WeightDecayMask = None

    def __check_init__(self) -> None:
        _check_shared(self)

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        """The optax transformation for these parameters."""
        mask = decay_mask_tree(self.weight_decay_mask, params)
        return optax.lion(self.learning_rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=mask)


def _check_shared(optimizer: AdamW | Lion) -> None:
    check_range("learning_rate", optimizer.learning_rate, low=0)
    check_range("b1", optimizer.b1, low=0, high=1)
    check_range("b2", optimizer.b2, low=0, high=1)
    check_range("weight_decay", optimizer.weight_decay, low=0)
