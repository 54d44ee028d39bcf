"""Work on a batch piece by piece, so that only one piece's activations exist at a time."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from sophia_levanter.optim._checks import check_count, whole_number
from sophia_levanter.optim._trees import is_named


def split_microbatches(
    batch: PyTree, microbatch_size: int, *, fraction: float = 1.0, num_devices: int = 1
) -> tuple[PyTree, float]:
    """The first part of a batch in microbatches, for an estimator or `value_grad_and_curvature`.

    Args:
        batch: any pytree of arrays or NamedArrays whose first axis is the row, of the same length in all.
        microbatch_size: rows in a microbatch; it must divide the number of rows.
        fraction: the wanted part of the batch, in (0, 1], rounded to whole microbatches, at least one.
        num_devices: over how many devices the rows will be split; it must divide a microbatch, so that no device is
            without a row. Put the result on them with the sharding [None, devices].

    Returns:
        The same tree with arrays [microbatch, row, ...], and the share of the batch that it holds.

    Raises:
        ValueError: if the sizes do not fit, or the fraction is out of its range.

    Examples:
        >>> microbatches, share = split_microbatches({"x": jnp.zeros((8, 3))}, 2, fraction=0.5)
        >>> microbatches["x"].shape, share
        ((2, 2, 3), 0.5)
    """
    microbatch_size, num_devices = whole_number(microbatch_size), whole_number(num_devices)
    check_count("microbatch_size", microbatch_size)
    check_count("num_devices", num_devices)
    if not isinstance(fraction, Real) or not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction!r}; it must be in (0, 1]")
    rows = _common_length("the batch", batch, "rows")
    if rows % microbatch_size:
        raise ValueError(f"microbatch_size is {microbatch_size}; it must divide the {rows} rows of the batch")
    if microbatch_size % num_devices:
        raise ValueError(f"microbatch_size is {microbatch_size}; it must be a multiple of the {num_devices} devices")
    whole = rows // microbatch_size
    used = max(1, round(fraction * whole))

    def split(x: Any) -> Any:
        if not is_named(x):
            return jnp.asarray(x)[: used * microbatch_size].reshape(used, microbatch_size, *jnp.shape(x)[1:])
        row = x.axes[0]
        axes = type(row)("microbatch", used), row.resize(microbatch_size)
        return x[{row.name: slice(0, used * microbatch_size)}].unflatten_axis(row.name, axes)

    return jax.tree.map(split, batch, is_leaf=is_named), used / whole


def num_microbatches(microbatches: PyTree) -> int:
    """The length of the first axis.

    Raises:
        ValueError: if the arrays differ in it, or the tree has no arrays.
    """
    return _common_length("microbatches", microbatches, "microbatches")


def split_at(microbatches: PyTree, first: int) -> tuple[PyTree, PyTree | None]:
    """The first microbatches, and the rest if there are any."""

    def part(where: slice) -> PyTree:
        return jax.tree.map(lambda x: _at(x, where), microbatches, is_leaf=is_named)

    total = num_microbatches(microbatches)
    return part(slice(0, first)), part(slice(first, total)) if first < total else None


def sum_over_microbatches(
    function: Callable[[PyTree, Any], PyTree], microbatches: PyTree, start: PyTree | None = None
) -> PyTree:
    """The sum of `function(microbatch, index)` over the first axis, in a `lax.scan` that holds one at a time.

    Args:
        function: returns a tree of arrays, of the same shapes for each microbatch.
        microbatches: any pytree of arrays or NamedArrays [microbatch, ...].
        start: what is added to; zeros if not given.
    """

    def at(index: Any) -> PyTree:
        return function(jax.tree.map(lambda x: _at(x, index), microbatches, is_leaf=is_named), index)

    count = num_microbatches(microbatches)
    if count == 1:
        return at(0) if start is None else jax.tree.map(jnp.add, start, at(0))
    if start is None:
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(at, 0))
    summed, _ = jax.lax.scan(
        lambda carry, index: (jax.tree.map(jnp.add, carry, at(index)), None), start, jnp.arange(count)
    )
    return summed


def _at(x: Any, index: Any) -> Any:
    if is_named(x):
        return x[{x.axes[0].name: index}]
    # numpy's arrays cannot be indexed by a traced number.
    return (x if isinstance(x, jax.Array) else jnp.asarray(x))[index]


def _common_length(name: str, tree: PyTree, things: str) -> int:
    lengths = set()
    for x in jax.tree.leaves(tree, is_leaf=is_named):
        shape = [axis.size for axis in x.axes] if is_named(x) else jnp.shape(x)
        if not shape:
            raise ValueError(f"{name} has a scalar; its arrays must have the row, or microbatch, as first axis")
        lengths.add(shape[0])
    if not lengths:
        raise ValueError(f"{name} has no array; for a single pass give no microbatches")
    if len(lengths) > 1:
        raise ValueError(f"{name} has arrays with {sorted(lengths)} {things}; they must all have the same number")
    if lengths == {0}:
        raise ValueError(f"{name} has arrays with 0 {things}; there must be at least one")
    return lengths.pop()
