"""Parameter groups with their own learning rate and weight decay, for any optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from sophia_levanter.optim._checks import check_number
from sophia_levanter.optim._protocol import OptimizerWrapper
from sophia_levanter.optim._trees import WeightDecayMask, decay_mask_tree, fit_prefix, is_named, plain, trainable

Roles: TypeAlias = PyTree[str] | Callable[[PyTree], PyTree[str]] | None


@dataclass(frozen=True)
class ParameterGroup:
    """Settings for a group of parameters, which are selected by path (with a regular expression) or by role.

    Attributes:
        match: a regular expression to search for in parameter paths, such as `wte|wpe` or `attention.*weight`.
        learning_rate: factor by which the learning rate of the optimizer is multiplied.
        weight_decay: weight decay of the group; None uses that of the optimizer.
        role: a role assigned to parameters by `roles`, such as `embedding`; an alternative to `match`.

    Raises:
        ValueError: if `match` and `role` are both given or both missing, the expression is invalid, or a number is
            negative.

    Examples:
        >>> ParameterGroup(role="embedding", learning_rate=0.1).includes("wte.weight", "embedding")
        True
    """

    match: str | None = None
    learning_rate: float = 1.0
    weight_decay: float | None = None
    role: str | None = None

    def __post_init__(self) -> None:
        if (self.match is None) == (self.role is None):
            raise ValueError(f"match is {self.match!r} and role is {self.role!r}; specify exactly one of them")
        try:
            re.compile(self.match or "")
        except re.error as error:
            raise ValueError(f"match {self.match!r} is not a valid regular expression: {error}") from None
        check_number("learning_rate", self.learning_rate, low=0)
        if self.weight_decay is not None:
            check_number("weight_decay", self.weight_decay, low=0)

    def includes(self, path: str, role: str | None) -> bool:
        """Return whether a parameter with this path and role belongs to the group."""
        return role == self.role if self.match is None else re.search(self.match, path) is not None


class ParameterGroups(OptimizerWrapper):
    """Wrapper that scales the steps of an optimizer by group: theta <- theta + r step, where r is the group's factor.

    A parameter belongs to the first group that matches its path, such as `blocks.attention.query.weight`, or its role.
    If no group matches, r = 1. The state is that of the wrapped optimizer, which also applies weight decay: create it
    with `weight_decay=1.0, weight_decay_mask=group_weight_decay(groups, rate, mask, roles)`.

    Args:
        optimizer: an optimizer that implements the `Optimizer` protocol.
        groups: the parameter groups; earlier groups take precedence.
        roles: a pytree of role names (or a prefix of one), or a function that maps the parameters to one. Required if a
            group has a role.

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
    roles: Roles = None

    def init(self, model: PyTree) -> Any:
        """Return the optimizer state before the first step.

        Raises:
            ValueError: if a group matches no parameter.
        """
        groups_of(self.groups, model, self.roles)
        return self.optimizer.init(model)

    def update(
        self,
        grads: PyTree,
        state: Any,
        model: PyTree,
        h_hat: PyTree | None = None,
        *,
        finite: Bool[Array, ""] | None = None,
    ) -> tuple[PyTree, Any]:
        """Return the step to add to the model, and the next state. See the optimizer for arguments and errors."""
        updates, after = self.optimizer.update(grads, state, model, h_hat, finite=finite)
        factors = self.learning_rate_factors(model)
        scaled = jax.tree.map(lambda u, r: u if r == 1 else (r * u).astype(u.dtype), updates, factors)
        return scaled, after

    def learning_rate_factors(self, model: PyTree) -> PyTree[float]:
        """Return the factor r for each parameter."""
        return _by_group(self.groups, self.roles, model, [group.learning_rate for group in self.groups], 1.0)


class ScaledGradients(OptimizerWrapper):
    """Wrapper that multiplies gradients and curvature estimates by factors before passing them to an optimizer.

    For AdamW, scaling by s is equivalent to using eps / s. For Sophia-G, scaling the curvature by s^2 as well is
    equivalent to using eps / s and rho s. The wrapped optimizer computes its state and metrics from scaled values.

    Args:
        optimizer: an optimizer that implements the `Optimizer` protocol.
        gradient_scales, curvature_scales: functions that map the parameters to a pytree of floats (or a prefix of one).
    """

    optimizer: Any
    gradient_scales: Callable[[PyTree], PyTree[float]]
    curvature_scales: Callable[[PyTree], PyTree[float]]

    def init(self, model: PyTree) -> Any:
        """Return the optimizer state before the first step."""
        return self.optimizer.init(model)

    def update(
        self,
        grads: PyTree,
        state: Any,
        model: PyTree,
        h_hat: PyTree | None = None,
        *,
        finite: Bool[Array, ""] | None = None,
    ) -> tuple[PyTree, Any]:
        """Return the step to add to the model, and the next state. See the optimizer for arguments and errors."""

        def scaled(name: str, scales: Callable[[PyTree], PyTree[float]], tree: PyTree) -> PyTree:
            factors = fit_prefix(name, scales, trainable(model), lambda x: isinstance(x, float), "a float")
            return jax.tree.map(lambda s, x: s * x, factors, trainable(tree))

        grads = scaled("gradient_scales", self.gradient_scales, grads)
        if h_hat is not None:
            h_hat = scaled("curvature_scales", self.curvature_scales, h_hat)
        return self.optimizer.update(grads, state, model, h_hat, finite=finite)


def group_weight_decay(
    groups: Sequence[ParameterGroup], rate: float, mask: WeightDecayMask = None, roles: Roles = None
) -> Callable[[PyTree], PyTree[float]]:
    """Return a `weight_decay_mask` with the weight decay of each parameter, for an optimizer with `weight_decay=1.0`.

    Args:
        groups, roles: as for `ParameterGroups`.
        rate: the weight decay of parameters whose weight decay is not set by a group.
        mask: where `rate` applies. A weight decay set by a group applies to all parameters in the group.
    """
    decays = [-1.0 if group.weight_decay is None else group.weight_decay for group in groups]

    def rates(model: PyTree) -> PyTree[float]:
        params = trainable(model)
        shared = jax.tree.map(lambda factor: rate * factor, decay_mask_tree(mask, params))
        own = _by_group(groups, roles, params, decays, -1.0)
        return jax.tree.map(lambda s, g: s if g < 0 else g, shared, own)

    return rates


def groups_of(groups: Sequence[ParameterGroup], model: PyTree, roles: Roles = None) -> dict[str, int]:
    """Map the path of each parameter to the index of its group in `groups`; ungrouped parameters are omitted.

    Args:
        groups, roles: as for `ParameterGroups`.
        model: the model; its arrays may be abstract.

    Raises:
        ValueError: if a group matches no parameter outside earlier groups, or if it has a role and `roles` is None.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_named)
    # `trainable` would drop the arrays of an abstract model.
    paths = [_path(path) for path, leaf in leaves if jnp.issubdtype(getattr(plain(leaf), "dtype", bool), jnp.inexact)]
    by_path = _roles_by_path(groups, roles, model)
    found = {path: index for path in paths if (index := _first(groups, path, by_path)) is not None}
    for index, group in enumerate(groups):
        if index not in found.values():
            included = any(group.includes(path, by_path.get(path)) for path in paths)
            earlier = " that is not already in an earlier group" if included else ""
            what, known = (
                ("match", paths) if group.role is None else ("role", sorted({by_path[path] for path in paths}))
            )
            value = getattr(group, what)
            raise ValueError(f"groups[{index}].{what} {value!r} matches no parameter{earlier}; choose from {known}")
    return found


def _by_group(
    groups: Sequence[ParameterGroup], roles: Roles, model: PyTree, values: Sequence[float], default: float
) -> PyTree[float]:
    """Return a number for each parameter: the value of its group, or the default if it has no group."""
    params = trainable(model)
    by_path = _roles_by_path(groups, roles, params)

    def of(path: tuple, leaf: Any) -> Any:
        index = _first(groups, _path(path), by_path)
        number = default if index is None else values[index]
        return jax.tree.map(lambda _: number, leaf)

    return jax.tree_util.tree_map_with_path(of, params, is_leaf=is_named)


def _roles_by_path(groups: Sequence[ParameterGroup], roles: Roles, model: PyTree) -> dict[str, str]:
    """Map the path of each parameter to its role. The result is empty if no group has a role."""
    asked = [group.role for group in groups if group.role is not None]
    if not asked:
        return {}
    if roles is None:
        raise ValueError(f"a group has the role {asked[0]!r}, but roles is None; it must specify each parameter's role")
    fitted = fit_prefix("roles", roles, model, lambda x: isinstance(x, str), "a role name")
    leaves = jax.tree_util.tree_leaves_with_path(fitted, is_leaf=is_named)
    return {_path(path): plain(role) for path, role in leaves}


def _first(groups: Sequence[ParameterGroup], path: str, roles: dict[str, str]) -> int | None:
    return next((index for index, group in enumerate(groups) if group.includes(path, roles.get(path))), None)


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
