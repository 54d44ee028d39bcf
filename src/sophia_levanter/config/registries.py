"""Metrics and callbacks, which settings list by name. Free of jax until one is used."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sophia_levanter.errors import InputError

T = TypeVar("T")

# What the names of a run's own numbers begin with, here and in the Sophia authors' scripts.
BUILT_IN = ("train", "optim", "validation", "val")


class Registry(dict[str, Any]):
    """What is registered, by name.

    Args:
        kind: a metric or a callback; `trainer.KINDs` lists the names that a run uses.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Registers the function or class below it under a name, which the names of its numbers begin with.

        Raises:
            ValueError: if the name is taken or is not an identifier.
        """
        if name in (*METRICS, *CALLBACKS, *BUILT_IN) or not name.isidentifier():
            raise ValueError(f"the {self._kind} name {name!r} is reserved, taken or no identifier; choose another")

        def register(registered: T) -> T:
            self[name] = registered
            return registered

        return register

    def check(self, names: Sequence[str]) -> None:
        """Check that all names are registered.

        Raises:
            InputError: names the one that is not, and the nearest.
        """
        for name in names:
            if name not in self:
                nearest = difflib.get_close_matches(name, self, n=1)
                known = f"the registered ones are {', '.join(self)}" if self else f"--plugins adds {self._kind}s"
                hint = f"did you mean {nearest[0]}?" if nearest else known
                raise InputError(f"trainer.{self._kind}s has {name!r}, which is not registered; {hint}")


METRICS, CALLBACKS = Registry("metric"), Registry("callback")


def register_metric(name: str) -> Callable[[T], T]:
    """Registers a function for `trainer.metrics`.

    It is traced in the compiled step. It takes a `training.metrics.StepTrees` and returns a dict of scalars.
    """
    return METRICS.register(name)


def register_callback(name: str) -> Callable[[T], T]:
    """Registers a subclass of `training.callbacks.Callback` for `trainer.callbacks`."""
    return CALLBACKS.register(name)
