"""Settings for parameter groups. jax is imported only when a group is built or matched against a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sophia_levanter.config.settings import Settings, setting
from sophia_levanter.errors import InputError

if TYPE_CHECKING:
    from sophia_levanter.optim import ParameterGroup

ROLES = ("embedding", "head", "matrix", "vector")  # the roles assigned by `LanguageModel.parameter_roles`


@dataclass(frozen=True)
class GroupConfig(Settings):
    """A group of parameters with its own learning rate or weight decay."""

    section: ClassVar[str] = "optimizer.groups"

    match: str | None = setting(None, "regular expression to search for in parameter paths, such as wte|wpe")
    learning_rate: float | str = setting("1 x", "peak rate, or a multiple of optimizer.learning_rate such as 0.1 x")
    weight_decay: float | None = setting(None, "weight decay; overrides optimizer.weight_decay", low=0)
    role: str | None = setting(None, "role of the parameters in the model; an alternative to match", choices=ROLES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match is None and self.role is None:
            raise InputError("optimizer.groups: match is missing; a group requires either match or role")
        if self.match is not None and self.role is not None:
            raise InputError(f"optimizer.groups: match {self.match!r} and role {self.role!r} are both set; keep one")
        try:
            re.compile(self.match or "")
        except re.error as error:
            raise InputError(
                f"optimizer.groups: match {self.match!r} is not a valid regular expression: {error}"
            ) from None
        if self.factor(1.0) is None:
            raise InputError(
                f"optimizer.groups: learning_rate is {self.learning_rate!r}; "
                "it must be a number, or a multiple such as 0.1 x"
            )

    def build(self, peak: float) -> ParameterGroup:
        """Build the group for an optimizer with peak learning rate `peak`."""
        from sophia_levanter.optim import ParameterGroup

        return ParameterGroup(self.match, self.factor(peak) or 0.0, self.weight_decay, self.role)

    def factor(self, peak: float) -> float | None:
        """Return the group's learning rate as a multiple of `peak`, or None if `learning_rate` is invalid."""
        if isinstance(self.learning_rate, int | float):
            return self.learning_rate / peak if self.learning_rate >= 0 else None
        found = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?) ?x", self.learning_rate.strip())
        try:
            return float(found[1]) if found else None
        except ValueError:
            return None


def check_groups(groups: Sequence[ParameterGroup], model: Any) -> dict[str, int]:
    """Map the path of each parameter that belongs to a group to the index of the group.

    Raises:
        InputError: if a group matches no parameters.
    """
    from sophia_levanter.models.language_model import parameter_roles
    from sophia_levanter.optim import groups_of

    try:
        return groups_of(groups, model, parameter_roles)
    except ValueError as error:
        raise InputError(f"optimizer.{error}") from None
