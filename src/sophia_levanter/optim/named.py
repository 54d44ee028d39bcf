"""Haliax's NamedArrays among the inputs, by what they can do, so that haliax itself need not be imported."""

from __future__ import annotations

from typing import Any

import jax


def is_named(x: Any) -> bool:
    """Whether x is an array with named axes."""
    return hasattr(x, "axes") and hasattr(x, "array") and hasattr(x, "resolve_axis")


def plain(x: Any) -> jax.Array:
    """The array without its axes' names."""
    return x.array if is_named(x) else x


def axis_names(x: Any) -> str:
    """The axes of a NamedArray, for an error."""
    return ", ".join(axis.name for axis in x.axes)
