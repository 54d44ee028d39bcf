"""Declare settings, each with its default, help text and bounds in one place."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Collection
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal

from sophia_levanter.errors import InputError

DECLARATION = "setting"  # the key in the metadata of dataclass fields
_type_hints = functools.cache(typing.get_type_hints)


@dataclass(frozen=True)
class Declaration:
    """The properties of a setting other than its type and default.

    Attributes:
        help: one line for `--help` and the reference page.
        low, high: inclusive bounds.
        above, below: exclusive bounds.
        choices: the only valid values or, for a setting with bounds, the words allowed in addition to numbers.
        empty: the remedy to suggest in the error message for an empty string.
        free: for a model setting, whether a trained model still works with a different value.
        steps: whether the value is a number of steps: an integer, or a fraction of the run if below 1.
        former: the setting's name in the previous release, which is still accepted.
    """

    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Collection[str] = ()
    empty: str = "omit it to use the default"
    free: bool = False
    steps: bool = False
    former: str = ""

    def check(self, name: str, value: Any, *, nullable: bool = False) -> None:
        """Check a value that has the field's type. None is always valid.

        Args:
            name: the field's path, for error messages.
            value: the value.
            nullable: whether the field may be None, for error messages.

        Raises:
            InputError: if the value is invalid; the message names the field, the value and the valid values.
        """
        if value is None:
            return
        if value == "":
            raise InputError(f"{name} is empty; {self.empty}")
        is_word = not self._is_bounded or (isinstance(value, str) and bool(self.choices))
        if self.choices and is_word and value not in self.choices:
            options = ["a number"] * self._is_bounded + [*self.choices] + ["null"] * nullable
            one_of = "one of " if len(options) > 2 else ""
            last = ", or null" if nullable and one_of else f" or {options[-1]}" if not one_of else f", {options[-1]}"
            raise InputError(f"{name} is {value!r}; it must be {one_of}{', '.join(options[:-1])}{last}")
        if not is_word and not self._holds(value):
            raise InputError(f"{name} is {value}; it must be {self._range}")
        if self.steps and value >= 1 and not float(value).is_integer():
            raise InputError(
                f"{name} is {value}; it must be an integer number of steps or a fraction of the run (less than 1)"
            )

    @property
    def described(self) -> str:
        """The help text, followed by the choices in brackets if they are the only valid values."""
        return f"{self.help} [{'|'.join(self.choices)}]" if self.choices and not self._is_bounded else self.help

    @property
    def _is_bounded(self) -> bool:
        return any(bound is not None for bound in (self.low, self.high, self.above, self.below))

    def _holds(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and math.isfinite(value)
        )

    @property
    def _range(self) -> str:
        """The bounds in words: `at least 1`, `above 0`, `between 1 and 8`, `in [0, 1)`."""
        lower = self.above if self.low is None else self.low
        upper = self.below if self.high is None else self.high
        if self.low is not None and self.high is not None:
            return f"between {lower} and {upper}"
        if lower is not None and upper is not None:
            return f"in {'(' if self.low is None else '['}{lower}, {upper}{')' if self.high is None else ']'}"
        if lower is not None:
            return f"above {lower}" if self.low is None else f"at least {lower}"
        return f"below {upper}" if self.high is None else f"at most {upper}"


def setting(default: Any, help: str, **bounds: Any) -> Any:
    """Declare a setting as a dataclass field.

    Args:
        default: the default, or `dataclasses.MISSING` if a value is required. The only supported mapping is {}.
        help: one line for `--help` and the reference page.
        bounds: the other attributes of `Declaration`.
    """
    metadata = {DECLARATION: Declaration(help, **bounds)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def steps_of(value: float, num_train_steps: int) -> int:
    """Convert the value of a setting declared with `steps` to a step count for a run of `num_train_steps` steps."""
    return round(value * num_train_steps) if value < 1 else int(value)


def declaration(field: dataclasses.Field[Any]) -> Declaration:
    """Return a field's declaration, or an empty declaration if the field has none."""
    found = field.metadata.get(DECLARATION, Declaration(""))
    assert isinstance(found, Declaration)
    return found


def kinds_of(annotation: object) -> tuple[Any, ...]:
    """Return the types joined by `|` in a setting's annotation."""
    joined = isinstance(annotation, UnionType) or typing.get_origin(annotation) is typing.Union
    return typing.get_args(annotation) if joined else (annotation,)


def words_of(annotation: object) -> list[str]:
    """Return the words that a setting accepts in addition to numbers, such as `auto` for `float | Literal["auto"]`."""
    literals = [kind for kind in kinds_of(annotation) if typing.get_origin(kind) is Literal]
    return [word for kind in literals for word in typing.get_args(kind)]


def not_defined(settings: Settings, method: str) -> InputError:
    """Return the error for a registered class that lacks a required method."""
    return InputError(f"{settings.section}: {type(settings).__qualname__} does not define {method}()")


def check_subclass(registered: type, base: type, field: str) -> None:
    """Check that a registered class can be instantiated.

    Raises:
        InputError: if the class is not a subclass of `base` or lacks a method required by `base`.
    """
    if not issubclass(registered, base):
        raise InputError(f"{field}: {registered.__qualname__} is not a subclass of {base.__qualname__}")
    if missing := sorted(getattr(registered, "__abstractmethods__", ())):
        names = " and ".join(f"{name}()" for name in missing)
        raise InputError(f"{field}: {registered.__qualname__} does not define {names}")


def free_settings(settings: Settings) -> list[str]:
    """Return the paths of the model settings that may change after training."""
    return [settings.path(field.name) for field in dataclasses.fields(settings) if declaration(field).free]


@dataclass(frozen=True)
class Settings:
    """A section of settings. The constructor checks each value against its declaration.

    Raises:
        InputError: if a value is out of bounds.
    """

    section: ClassVar[str] = ""  # the section's name in configuration files and on command lines

    def __post_init__(self) -> None:
        kind: type = type(self)
        hints = _type_hints(kind)
        for field in dataclasses.fields(self):
            nullable = NoneType in kinds_of(hints[field.name])
            declaration(field).check(self.path(field.name), getattr(self, field.name), nullable=nullable)

    @classmethod
    def path(cls, name: str) -> str:
        """Return a field's dotted path, such as `optimizer.rho`."""
        return f"{cls.section}.{name}" if cls.section else name
