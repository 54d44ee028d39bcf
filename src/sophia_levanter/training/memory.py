"""Bytes of a run on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from sophia_levanter.training.step import TrainState

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def bytes_by_kind(state: TrainState) -> dict[str, int]:
    """Bytes of a state on one device: parameters, momentum, curvature and what else the optimizer keeps."""
    optimizer_state = state.optimizer_state
    kinds = {
        "parameters": device_bytes(state.model),
        "momentum": device_bytes(_named(optimizer_state, ("momentum", "mu"))),
        "curvature": device_bytes(_named(optimizer_state, ("curvature",))),
    }
    others = device_bytes(state) - sum(kinds.values())
    return {kind: size for kind, size in {**kinds, "other optimizer state": others}.items() if size}


def _named(tree: Any, names: Sequence[str]) -> list[Any]:
    """The parts of optimizer states, also of optax's nested ones, that have one of these names."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        found = [getattr(tree, name) for name in names if name in tree._fields]
        return found or [part for child in tree for part in _named(child, names)]
    if isinstance(tree, tuple | list | dict):
        return [part for child in (tree.values() if isinstance(tree, dict) else tree) for part in _named(child, names)]
    return []


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of `jax.ShapeDtypeStruct`s on one device."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def step_bytes(compiled: jax.stages.Compiled) -> tuple[int, int] | None:
    """Bytes of a compiled program's arguments on a device, and of all else that it needs there at one time.

    None where the backend does not tell.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    outside = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes + max(0, outside)


def show_bytes(count: int) -> str:
    """`1.5 GiB`, in the largest unit of which there is one."""
    for name, unit in UNITS:
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} bytes"
