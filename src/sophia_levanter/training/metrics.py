"""The object passed to registered metrics, and checks of the results of registered metrics and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from sophia_levanter.errors import InputError, one_line
from sophia_levanter.optim._trees import plain, trainable

if TYPE_CHECKING:
    from sophia_levanter.training.step import TrainState

PyTree = Any


class StepTrees(NamedTuple):
    """The argument passed to a registered metric.

    Attributes:
        grads: the mean gradient before clipping, with the same tree structure as the trainable part of the model.
        updates: the updates to add to the parameters, with the same structure as `grads`; zeros if the step is skipped.
        before: the state before the step, with `model` and `optimizer_state`.
        after: the state after the step.
    """

    grads: PyTree
    updates: PyTree
    before: TrainState
    after: TrainState


Metric = Callable[[StepTrees], Mapping[str, Any]]


def measure(metrics: Iterable[tuple[str, Metric]], trees: StepTrees) -> dict[str, jax.Array]:
    """Compute the given metrics for a step. Return float32 scalars keyed by `METRIC/KEY`.

    Raises:
        InputError: if a metric fails, or returns anything other than a dict of scalars.
    """
    numbers: dict[str, jax.Array] = {}
    for name, metric in metrics:
        try:
            values = metric(trees)
        except Exception as error:
            raise InputError(one_line(f"trainer.metrics: {name} failed: {type(error).__name__}: {error}")) from error
        numbers |= {key: jnp.float32(value) for key, value in scalars("trainer.metrics", name, values).items()}
    return numbers


def check_results(metrics: Iterable[tuple[str, Metric]], state: TrainState) -> None:
    """Trace metrics for a state of `jax.ShapeDtypeStruct`s, so that `measure` finds mistakes before a run starts."""

    def trace(state: TrainState) -> dict[str, jax.Array]:
        params = trainable(state.model)
        return measure(metrics, StepTrees(params, params, state, state))

    eqx.filter_eval_shape(trace, state)


def metric_rows(names: Sequence[str], numbers: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return a console row for each metric or callback with results: its name and `KEY VALUE, KEY VALUE, ...`."""
    registered = {name: {k: v for k, v in numbers.items() if k.startswith(f"{name}/")} for name in names}
    return [
        (name, ", ".join(f"{key.removeprefix(f'{name}/')} {value:.4g}" for key, value in values.items()))
        for name, values in registered.items()
        if values
    ]


def scalars(setting: str, name: str, values: Any) -> dict[str, Any]:
    """Return the scalars in the result of a metric or callback, keyed by `NAME/KEY`.

    Raise an InputError that names `setting`, which lists the metric or callback, unless `values` is a dict of scalars.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{setting}: {name} returns a {type(values).__name__}; it must return a dict")
    found = {}
    for key, value in values.items():
        scalar = plain(value)
        try:
            shape = None if jnp.iscomplexobj(scalar) else jnp.asarray(scalar, jnp.float32).shape
        except (TypeError, ValueError):
            shape = None
        if shape != ():
            shown = f"{value!r}" if shape is None else f"an array of shape {shape}"
            raise InputError(one_line(f"{setting}: {name} returns {shown} for {key!r}; it must be a scalar"))
        found[f"{name}/{key}"] = scalar
    return found
