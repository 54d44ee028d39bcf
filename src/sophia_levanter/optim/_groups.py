"""Groups of parameters with a learning rate and a weight decay of their own, around any optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from sophia_levanter.optim._checks import check_number
from sophia_levanter.optim._protocol import MatrixWork, ScalarOrSchedule
from sophia_levanter.optim._trees import WeightDecayMask, decay_mask_tree, is_named, plain, trainable


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are treated alike.

    Attributes:
        match: a regular expression that is searched for in the paths of parameters: `wte|wpe`, `attention.*weight`.
        learning_rate: factor on the optimizer's learning rate.
        weight_decay: in place of the optimizer's; None for the optimizer's.

    Raises:
        ValueError: if the expression is not valid, or a number is negative.
    """

    match: str
    learning_rate: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match is {self.match!r}; it is not a regular expression: {error}") from None
        check_number("learning_rate", self.learning_rate, low=0)
        if self.weight_decay is not None:
            check_number("weight_decay", self.weight_decay, low=0)


class ParameterGroups(eqx.Module):
    """An optimizer whose steps are scaled in groups of parameters: theta <- theta + r step, r the group's factor.

    A parameter is in the first group that matches its path, such as `blocks.attention.query.weight`; one that no group
    matches has r = 1. The state is the optimizer's. The weight decay of groups is the optimizer's to apply: give it
    `weight_decay=1.0, weight_decay_mask=group_weight_decay(groups, rate, mask)`.

    Args:
        optimizer: follows the protocol of `Optimizer`.
        groups: the groups.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sophia_levanter.optim import AdamW
        >>> params = {"embedding": jnp.ones(2), "weight": jnp.ones(2)}
        >>> optimizer = ParameterGroups(AdamW(learning_rate=0.5, weight_decay=0.0), [ParameterGroup("embed", 0.1)])
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> {name: round(float(update[0]), 3) for name, update in updates.items()}
        {'embedding': -0.05, 'weight': -0.5}
    """

    optimizer: Any
    groups: tuple[ParameterGroup, ...] = eqx.field(converter=tuple, static=True)

    @property
    def learning_rate(self) -> ScalarOrSchedule:
        """The optimizer's, without the groups' factors."""
        return self.optimizer.learning_rate

    @property
    def estimator(self) -> Any:
        """The optimizer's."""
        return self.optimizer.estimator

    def init(self, model: PyTree) -> Any:
        """The optimizer's state before the first step.

        Raises:
            ValueError: if a group matches no parameter.
        """
        groups_of(self.groups, model)
        return self.optimizer.init(model)

    def estimator_at(self, state: Any) -> Any:
        """The optimizer's."""
        return self.optimizer.estimator_at(state)

    def update(
        self,
        grads: PyTree,
        state: Any,
        model: PyTree,
        h_hat: PyTree | None = None,
        *,
        finite: Bool[Array, ""] | None = None,
    ) -> tuple[PyTree, Any]:
        """The step to add to the model, and the next state; arguments and errors are those of the optimizer."""
        updates, after = self.optimizer.update(grads, state, model, h_hat, finite=finite)
        factors = _by_group(self.groups, model, lambda group: 1.0 if group is None else group.learning_rate)
        scaled = jax.tree.map(lambda u, r: u if r == 1 else (r * u).astype(u.dtype), updates, factors)
        return scaled, after

    def refresh_due(self, step: int) -> bool:
        """The optimizer's."""
        return self.optimizer.refresh_due(step)

    def metrics(self, state: Any, num_targets: float | Float[Array, ""] | None = None) -> dict[str, Float[Array, ""]]:
        """The optimizer's."""
        return self.optimizer.metrics(state, num_targets)

    def unclipped(self, state: Any) -> PyTree[Bool[Array, "..."]] | None:
        """The optimizer's; None for an optimizer that clips no coordinate."""
        found = getattr(self.optimizer, "unclipped", None)
        return None if found is None else found(state)

    def matrix_work(self, num_microbatches: int) -> MatrixWork:
        """The optimizer's."""
        return self.optimizer.matrix_work(num_microbatches)


def group_weight_decay(
    groups: Sequence[ParameterGroup], rate: float, mask: WeightDecayMask = None
) -> Callable[[PyTree], PyTree[float]]:
    """The weight decay of each parameter, for `weight_decay_mask` of an optimizer with `weight_decay=1.0`.

    Args:
        groups: those of `ParameterGroups`.
        rate: the weight decay outside groups that have their own.
        mask: where it applies; the decay of groups applies to all of their parameters.
    """

    def rates(model: PyTree) -> PyTree[float]:
        params = trainable(model)
        shared = jax.tree.map(lambda factor: rate * factor, decay_mask_tree(mask, params))
        own = _by_group(groups, params, lambda group: -1.0 if group is None else _or(group.weight_decay, -1.0))
        return jax.tree.map(lambda s, g: s if g < 0 else g, shared, own)

    return rates


def groups_of(groups: Sequence[ParameterGroup], model: PyTree) -> dict[str, int]:
    """The group of each parameter that is in one: its index in `groups`, by the parameter's path.

    Raises:
        ValueError: if a group matches no parameter, or only such as are in groups before it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_named)
    # `trainable` would leave out the arrays of an abstract model.
    paths = [_path(path) for path, leaf in leaves if jnp.issubdtype(getattr(plain(leaf), "dtype", bool), jnp.inexact)]
    found = {path: index for path in paths if (index := _first(groups, path)) is not None}
    for index, group in enumerate(groups):
        if index not in found.values():
            earlier = " that is not in a group before it" if any(re.search(group.match, path) for path in paths) else ""
            raise ValueError(f"groups[{index}].match {group.match!r} matches no parameter{earlier}; there are {paths}")
    return found


def _by_group(groups: Sequence[ParameterGroup], model: PyTree, value: Callable[[Any], float]) -> PyTree[float]:
    """A number for each parameter, from its group or None."""

    def of(path: tuple, leaf: Any) -> Any:
        index = _first(groups, _path(path))
        number = value(None if index is None else groups[index])
        return jax.tree.map(lambda _: number, leaf)

    return jax.tree_util.tree_map_with_path(of, trainable(model), is_leaf=is_named)


def _first(groups: Sequence[ParameterGroup], path: str) -> int | None:
    return next((index for index, group in enumerate(groups) if re.search(group.match, path)), None)


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
