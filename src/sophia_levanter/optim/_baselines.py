"""AdamW and Lion, optax's, behind the protocol that Sophia follows."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from sophia_levanter.optim._checks import (
    check_bool,
    check_dtype,
    check_flag,
    check_number,
    check_parameters,
    check_same_structure,
    python_number,
)
from sophia_levanter.optim._optax import cautious, check_gradient_transform, init_transform, transform_gradient
from sophia_levanter.optim._protocol import MatrixWork, Scalar, ScalarOrSchedule
from sophia_levanter.optim._trees import WeightDecayMask, all_finite, decay_mask_tree, select, trainable


class BaselineState(NamedTuple):
    """The state of AdamW, Lion, Muon and Soap.

    Attributes:
        optax_state: optax's own.
        gradient_state: the state of `gradient_transform`, or None.
    """

    optax_state: PyTree
    gradient_state: PyTree | None


class OptaxOptimizer(eqx.Module):
    """An optax transformation on the trainable part of a model."""

    gradient_transform: optax.GradientTransformation | None = eqx.field(default=None, kw_only=True)
    estimator: ClassVar[None] = None

    def __check_init__(self) -> None:
        check_gradient_transform(self.gradient_transform)

    @abc.abstractmethod
    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        """The optax transformation for these parameters."""

    def init(self, model: PyTree) -> BaselineState:
        """The state before the first step.

        Raises:
            ValueError: if the model has no floating-point leaf.
            TypeError: if a leaf is complex; names its path.
        """
        check_parameters(model)
        params = trainable(model)
        return BaselineState(self.transformation(params).init(params), init_transform(self.gradient_transform, params))

    def update(
        self,
        grads: PyTree,
        state: BaselineState,
        model: PyTree,
        h_hat: Any = None,
        *,
        finite: Bool[Array, ""] | None = None,
    ) -> tuple[PyTree, BaselineState]:
        """One step from the gradient of the mean loss: the step to add to the model, and the next state.

        Where the gradient is not finite the step is zero and only counts in the state advance. `finite` says whether
        it is; it is looked up if not given. `h_hat` is None, here for loops that train with Sophia too.

        Raises:
            ValueError: if the gradient's tree is not the model's; names the path. If there is an estimate.
        """
        if h_hat is not None:
            raise ValueError(f"h_hat is given, and {type(self).__name__} has no curvature; ask `refresh_due` first")
        if not isinstance(state, BaselineState):
            raise TypeError(f"state is a {type(state).__name__}; it must be what init(model) gave")
        params = trainable(model)
        check_same_structure("grads", grads, params)
        grads = trainable(grads)
        finite = all_finite(grads) if finite is None else check_flag("finite", finite)
        grads, gradient_state, finite = transform_gradient(
            self.gradient_transform, grads, state.gradient_state, params, finite
        )
        updates, new_state = self.transformation(params).update(grads, state.optax_state, params)
        # Integer leaves are counts.
        new_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old).astype(old.dtype) if eqx.is_inexact_array(new) else new,
            new_state,
            state.optax_state,
        )
        zeros = jax.tree.map(jnp.zeros_like, updates)
        return select(finite, updates, zeros), BaselineState(new_state, gradient_state)

    def refresh_due(self, step: int) -> bool:
        """Never: there is no curvature to estimate."""
        return False

    def metrics(
        self, state: BaselineState, num_targets: float | Float[Array, ""] | None = None
    ) -> dict[str, Float[Array, ""]]:
        """`momentum_norm`, the global 2-norm of the first moment as stored, over all groups of parameters."""
        found = optax.tree.get_all_with_path(state.optax_state, "mu")
        # A parameter may be called mu too: the states that hold moments are named tuples, at the path's end.
        moments = [mu for path, mu in found if isinstance(path[-1], optax.tree_utils.NamedTupleKey)]
        return {"momentum_norm": optax.tree.norm(moments)}

    def estimator_at(self, state: BaselineState) -> None:
        """Always None, since the optimizer uses no curvature."""

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """No work on matrices; optimizers that do any override this."""
        return MatrixWork()


class AdamW(OptaxOptimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), `optax.adamw`.

    Args:
        learning_rate: a number or a function of the update count.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, multiplied by the learning rate.
        weight_decay_mask: a tree (or prefix) of bools, or a function from parameters to one; None decays every leaf.
        nesterov: whether the step looks ahead in the first moment (NAdamW; Dozat 2016).
        cautious: leave out the coordinates whose step would go up this batch's gradient (arXiv 2411.16085).
        momentum_dtype: of the first moment; None for the parameters'.
        gradient_transform: an optax transformation that the gradient goes through first; None for none.

    Raises:
        TypeError, ValueError: if a hyper-parameter that is a concrete number is out of its range.

    Examples:
        >>> optimizer, params = AdamW(learning_rate=0.1, weight_decay=0.0), {"w": jnp.ones(2)}
        >>> updates, state = optimizer.update({"w": jnp.asarray([3.0, -5.0])}, optimizer.init(params), params)
        >>> [f"{x:.3f}" for x in updates["w"]]
        ['-0.100', '0.100']
    """

    learning_rate: ScalarOrSchedule = eqx.field(default=6e-4, converter=python_number)
    b1: Scalar = eqx.field(default=0.9, converter=python_number)
    b2: Scalar = eqx.field(default=0.95, converter=python_number)
    eps: Scalar = eqx.field(default=1e-8, converter=python_number)
    weight_decay: Scalar = eqx.field(default=0.1, converter=python_number)
    weight_decay_mask: WeightDecayMask = None
    nesterov: bool = eqx.field(default=False, static=True)
    cautious: bool = eqx.field(default=False, static=True)
    momentum_dtype: Any = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_shared(self)
        check_number("eps", self.eps, low=0)
        check_bool("nesterov", self.nesterov)
        check_bool("cautious", self.cautious)

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        """The optax transformation for these parameters."""
        mask = decay_mask_tree(self.weight_decay_mask, params)
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.momentum_dtype, nesterov=self.nesterov)
        return optax.chain(
            cautious(adam) if self.cautious else adam,
            optax.add_decayed_weights(self.weight_decay, mask),
            optax.scale_by_learning_rate(self.learning_rate),
        )


class Lion(OptaxOptimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675), `optax.lion`. The arguments are AdamW's, without eps, nesterov
    and cautious; b2 is the decay of the only moment, and b1 its weight in the step.

    Examples:
        >>> optimizer, params = Lion(learning_rate=0.5, weight_decay=0.0), {"w": jnp.ones(2)}
        >>> updates, state = optimizer.update({"w": jnp.asarray([3.0, -5.0])}, optimizer.init(params), params)
        >>> updates["w"].tolist()
        [-0.5, 0.5]
    """

    learning_rate: ScalarOrSchedule = eqx.field(default=1e-4, converter=python_number)
    b1: Scalar = eqx.field(default=0.95, converter=python_number)
    b2: Scalar = eqx.field(default=0.98, converter=python_number)
    weight_decay: Scalar = eqx.field(default=0.2, converter=python_number)
    weight_decay_mask: WeightDecayMask = None
    momentum_dtype: Any = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_shared(self)

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        """The optax transformation for these parameters."""
        mask = decay_mask_tree(self.weight_decay_mask, params)
        return optax.lion(
            self.learning_rate, self.b1, self.b2, self.momentum_dtype, weight_decay=self.weight_decay, mask=mask
        )


def check_shared(optimizer: Any) -> None:
    """Check the hyper-parameters that every baseline has.

    Raises:
        TypeError, ValueError: if one that is a concrete number is out of its range.
    """
    check_number("learning_rate", optimizer.learning_rate, low=0, schedule=True)
    check_number("b1", optimizer.b1, low=0, high=1)
    check_number("b2", optimizer.b2, low=0, high=1)
    check_number("weight_decay", optimizer.weight_decay, low=0)
    check_dtype("momentum_dtype", optimizer.momentum_dtype)
