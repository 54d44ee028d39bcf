"""Wrappers that control weight norms for any optimizer: constant matrix norms, and cautious weight decay."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from sophia_levanter.optim._checks import check_number, python_number, value_at
from sophia_levanter.optim._groups import ParameterGroups
from sophia_levanter.optim._matrices import Matrices, matrices_tree, matrix_views
from sophia_levanter.optim._protocol import OptimizerWrapper, Scalar, ScalarOrSchedule
from sophia_levanter.optim._trees import WeightDecayMask, decay_mask_tree, trainable, upcast


class NormControlState(NamedTuple):
    """State of `Hyperball` and `CautiousWeightDecay`.

    Attributes:
        count: int32 scalar, the number of updates so far.
        optimizer_state: the state of the wrapped optimizer.
        radii: for `Hyperball`, the initial norms of the matrices in each leaf, in float32 or wider, with the axes of
            the leaf and size 1 along inputs and outputs; None for leaves that are not matrices.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # shadows tuple.count, as in optax
    optimizer_state: Any
    radii: tuple[Float[Array, "..."] | None, ...] = ()

    @property
    def refresh_pending(self) -> Bool[Array, ""]:
        """Whether the wrapped optimizer requests another curvature estimate."""
        return getattr(self.optimizer_state, "refresh_pending", jnp.zeros((), bool))


class _NormControl(OptimizerWrapper):
    """Base class for `Hyperball` and `CautiousWeightDecay`, which change only the steps of the wrapped optimizer."""

    def _radii(self, params: PyTree) -> tuple:
        """Return the radii to store in the initial state."""
        return ()

    @abc.abstractmethod
    def _controlled(self, updates: PyTree, params: PyTree, state: NormControlState) -> PyTree:
        """Return the steps that replace those of the optimizer."""

    def init(self, model: PyTree) -> NormControlState:
        """Return the state before the first step.

        Raises:
            ValueError, TypeError: as raised by the optimizer. `Hyperball` raises a ValueError if no leaf is a matrix.
        """
        inner = self.optimizer.init(model)
        return NormControlState(jnp.zeros((), jnp.int32), inner, self._radii(trainable(model)))

    def _inner(self, state: NormControlState) -> Any:
        return state.optimizer_state

    def update(
        self,
        grads: PyTree,
        state: NormControlState,
        model: PyTree,
        h_hat: PyTree | None = None,
        *,
        finite: Bool[Array, ""] | None = None,
    ) -> tuple[PyTree, NormControlState]:
        """Return the step to add to the model, and the next state. See the optimizer for arguments and errors."""
        if not isinstance(state, NormControlState):
            raise TypeError(f"state is a {type(state).__name__}; it must be the result of init(model)")
        updates, inner = self.optimizer.update(grads, state.optimizer_state, model, h_hat, finite=finite)
        updates = self._controlled(updates, trainable(model), state)
        return updates, state._replace(count=state.count + 1, optimizer_state=inner)


class Hyperball(_NormControl):
    """Wrapper that keeps each matrix at its initial Frobenius norm R (Wen et al. 2026, arXiv 2606.16899).

        W <- W - lr R u / |u|
        W <- R W / |W|                  for each matrix of a parameter separately

    u is the direction of the optimizer's step. The learning rate is therefore the angle of a step in radians, and the
    length of u has no effect. All other parameters, which should include the embeddings as in the paper and Levanter,
    use the optimizer's step unchanged. So do zero matrices, because they have no direction.

    Weight decay on these matrices would only rotate u, so set the `weight_decay_mask` of the optimizer to
    `hyperball_weight_decay(matrices, mask)`. Wrap `ParameterGroups` directly, so that its factors scale the angle.

    Args:
        optimizer: an optimizer that implements the `Optimizer` protocol.
        matrices: as for `Muon`.

    Raises:
        ValueError, TypeError: from `init` and `update`, if `matrices` does not match the parameters; the error names
            the path.

    Examples:
        >>> from sophia_levanter.optim import AdamW
        >>> optimizer = Hyperball(AdamW(learning_rate=0.1, weight_decay=0.0))
        >>> params = {"w": jnp.asarray([[3.0, 0.0], [0.0, 4.0]])}
        >>> updates, _ = optimizer.update({"w": jnp.ones((2, 2))}, optimizer.init(params), params)
        >>> bool(abs(jnp.linalg.norm(params["w"] + updates["w"]) - 5) < 1e-5)
        True
    """

    optimizer: Any
    matrices: Matrices = None

    def _radii(self, params: PyTree) -> tuple:
        views = matrix_views(self.matrices, params)
        if not any(views):
            raise ValueError("matrices contains no matrix; Hyperball requires at least one")
        leaves = zip(views, jax.tree.leaves(params), strict=True)
        return tuple(None if view is None else _norms(p, view.sides) for view, p in leaves)

    def _controlled(self, updates: PyTree, params: PyTree, state: NormControlState) -> PyTree:
        rate = value_at("learning_rate", self.learning_rate, state.count)
        factors = [1.0] * len(state.radii)
        if isinstance(self.optimizer, ParameterGroups):
            # Groups scale the optimizer's steps, but their length has no effect here, so scale the angle instead.
            factors = jax.tree.leaves(self.optimizer.learning_rate_factors(params))
        steps, structure = jax.tree.flatten(updates)
        views = matrix_views(self.matrices, params)
        leaves = zip(views, jax.tree.leaves(params), steps, state.radii, factors, strict=True)
        steps = [
            step if view is None or radius is None else _on_sphere(p, step, view.sides, radius, rate * factor)
            for view, p, step, radius, factor in leaves
        ]
        return jax.tree.unflatten(structure, steps)


def _norms(x: Array, sides: Sequence[int]) -> Array:
    """Return the Frobenius norm of each matrix, keeping its axes with size 1."""
    return jnp.sqrt(jnp.sum(jnp.square(upcast(x)), axis=tuple(sides), keepdims=True))


def _on_sphere(p: Array, step: Array, sides: Sequence[int], radius: Array, angle: Scalar) -> Array:
    """Return the step in the direction of `step` that preserves the norm; see `Hyperball`."""
    wide, size = upcast(p), _norms(step, sides)
    moved = wide + angle * radius * upcast(step) / jnp.where(size > 0, size, 1)
    length = _norms(moved, sides)
    rotated = radius * moved / jnp.where(length > 0, length, 1) - wide
    # The optimizer's step is zero if the gradient is not finite.
    rotated = jnp.where(size > 0, rotated, 0)
    return jnp.where(radius > 0, rotated, upcast(step)).astype(step.dtype)


def hyperball_weight_decay(matrices: Matrices, mask: WeightDecayMask = None) -> Callable[[PyTree], PyTree]:
    """Return a `weight_decay_mask` for the wrapped optimizer that excludes the matrices of `Hyperball`.

    Args:
        matrices: as for `Hyperball`.
        mask: the `weight_decay_mask` for the other parameters.

    Examples:
        >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
        >>> hyperball_weight_decay(None)(params)
        {'b': True, 'w': False}
    """

    def outside(model: PyTree) -> PyTree:
        params = trainable(model)
        factors = decay_mask_tree(mask, params)
        return jax.tree.map(lambda f, entry: f if entry is None else False, factors, matrices_tree(matrices, params))

    return outside


class CautiousWeightDecay(_NormControl):
    """Wrapper that applies weight decay only to coordinates that the step does not move away from zero.

        theta <- theta - lr (u + wd [u theta >= 0] theta)

    u is the direction of the optimizer's step, and [...] is 1 in each coordinate where the condition holds and 0
    elsewhere (Chen et al. 2025, arXiv 2510.12402, Algorithm 1). The optimizer itself must have `weight_decay=0.0`.

    Args:
        optimizer: an optimizer that implements the `Optimizer` protocol.
        weight_decay: decoupled weight decay (a number or a function of the update count), scaled by the learning rate.
        weight_decay_mask: as for `AdamW`.

    Raises:
        TypeError, ValueError: if `weight_decay` is neither a number nor a function, or is negative.

    Examples:
        >>> from sophia_levanter.optim import AdamW
        >>> optimizer = CautiousWeightDecay(AdamW(learning_rate=0.1, weight_decay=0.0), weight_decay=0.5)
        >>> params = {"w": jnp.ones(2)}
        >>> updates, _ = optimizer.update({"w": jnp.asarray([1.0, -1.0])}, optimizer.init(params), params)
        >>> [round(float(x), 3) for x in updates["w"]]
        [-0.15, 0.1]
    """

    optimizer: Any
    weight_decay: ScalarOrSchedule = eqx.field(default=0.1, converter=python_number)
    weight_decay_mask: WeightDecayMask = None

    def __check_init__(self) -> None:
        check_number("weight_decay", self.weight_decay, low=0, schedule=True)

    def _controlled(self, updates: PyTree, params: PyTree, state: NormControlState) -> PyTree:
        decay = value_at("learning_rate", self.learning_rate, state.count)
        decay *= value_at("weight_decay", self.weight_decay, state.count)
        # If the gradient is not finite, the optimizer's step is zero, and no weight decay is applied.
        moved = jnp.any(jnp.stack([jnp.any(u != 0) for u in jax.tree.leaves(updates)]))

        def step(u: Array, p: Array, factor: bool | float) -> Array:
            if not factor:
                return u
            # Compare signs, because the product of two small numbers may underflow to 0.
            decays = moved & (jnp.sign(u) * jnp.sign(p) <= 0)
            return jnp.where(decays, u - decay * factor * p, u).astype(u.dtype)

        return jax.tree.map(step, updates, params, decay_mask_tree(self.weight_decay_mask, params))
