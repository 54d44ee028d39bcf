"""Import plug-ins, and register metrics and callbacks under the names used in settings, without importing jax."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from sophia_levanter.config.files import Layer, Setting, show_value
from sophia_levanter.errors import InputError, one_line

T = TypeVar("T")

STATISTICS = "statistics"  # metric prefix for statistics of individual arrays
# Metric prefixes reserved for built-in metrics, in this package and in the Sophia authors' scripts.
BUILT_IN = ("train", "optim", "validation", "val", "tasks", STATISTICS)


class Registry(dict[str, Any]):
    """Registered functions or classes, keyed by name.

    Args:
        kind: "metric" or "callback". Runs select registered names with `trainer.metrics` or `trainer.callbacks`.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a function or class under a name, which is also the prefix of its metrics.

        Raises:
            ValueError: if the name is reserved, already taken or not an identifier.
        """
        if name in (*METRICS, *CALLBACKS, *BUILT_IN) or not name.isidentifier():
            raise ValueError(
                f"{self._kind} name {name!r} is reserved, already taken or not an identifier; choose another"
            )

        def register(registered: T) -> T:
            self[name] = registered
            return registered

        return register

    def check(self, names: Sequence[str]) -> None:
        """Check that all names are registered.

        Raises:
            InputError: if a name is not registered; the message suggests the nearest registered name.
        """
        for name in names:
            if name not in self:
                nearest = difflib.get_close_matches(name, self, n=1)
                known = f"registered {self._kind}s are {', '.join(self)}" if self else "use --plugins to register it"
                hint = f"did you mean {nearest[0]}?" if nearest else known
                raise InputError(f"trainer.{self._kind}s contains {name!r}, which is not registered; {hint}")


METRICS, CALLBACKS = Registry("metric"), Registry("callback")


def register_metric(name: str) -> Callable[[T], T]:
    """Return a decorator that registers a function for `trainer.metrics`.

    The function is traced in the compiled step. It takes a `training.metrics.StepTrees` and returns a dict of scalars.
    """
    return METRICS.register(name)


def register_callback(name: str) -> Callable[[T], T]:
    """Return a decorator that registers a subclass of `training.callbacks.Callback` for `trainer.callbacks`."""
    return CALLBACKS.register(name)


KEY = "plugins"


def with_plugins(layers: Iterable[Layer]) -> list[Layer]:
    """Import the modules listed under `plugins` in all layers, not only in the last one.

    Returns:
        The layers. If there are any plug-ins, a layer that lists all of them is appended.

    Raises:
        InputError: if a module cannot be imported; the message gives the module and the reason.
    """
    layers = list(layers)
    named = [(name, layer[KEY]) for layer in layers if KEY in layer for name in _names(layer[KEY])]
    for name, setting in named:
        _import(name, setting)
    if not named:
        return layers
    return [*layers, {KEY: Setting(list(dict.fromkeys(name for name, _ in named)), named[0][1].file)}]


def _names(setting: Setting) -> list[str]:
    value = setting.value
    if setting.file is None and isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise InputError(f"{setting.prefix}{KEY} is {show_value(value)}; it must be a list of module names")
    return value


def _import(name: str, setting: Setting) -> None:
    if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
        raise InputError(
            f"{setting.prefix}{KEY}: {show_value(name)} is not a module name; for my_module.py, use my_module"
        )
    # `python -m` searches the working directory for modules; a console script does not.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"{setting.prefix}{KEY}: {name} requires {error.name}, which is not installed") from error
        raise InputError(f"{setting.prefix}{KEY}: module {name} not found; add its directory to PYTHONPATH") from error
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise InputError(f"{setting.prefix}{KEY}: {name} cannot be imported: {reason}") from error
