"""Modules from outside the package, imported for what they register. Free of jax until one imports it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable

from sophia_levanter.config.files import Layer, Setting, show_value
from sophia_levanter.errors import InputError
from sophia_levanter.printing import one_line

KEY = "plugins"


def with_plugins(layers: Iterable[Layer]) -> list[Layer]:
    """Import the modules that settings name under `plugins`; those of all layers, not of the last alone.

    Returns:
        The layers, with all plug-ins in a last one if there are any.

    Raises:
        InputError: if one cannot be imported; names it and says why.
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
        raise InputError(f"{setting.prefix}{KEY} is {show_value(value)}; it must be a list of names of modules")
    return value


def _import(name: str, setting: Setting) -> None:
    if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
        raise InputError(
            f"{setting.prefix}{KEY}: {show_value(name)} is not the name of a module; for my_module.py write my_module"
        )
    # `python -m` looks for modules in the working directory, and a console script does not.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"{setting.prefix}{KEY}: {name} needs {error.name}, which is not installed") from error
        raise InputError(
            f"{setting.prefix}{KEY}: the module {name} was not found; add its folder to PYTHONPATH"
        ) from error
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise InputError(f"{setting.prefix}{KEY}: {name} cannot be imported: {reason}") from error
