"""Work on a batch piece by piece, so that only one piece's activations exist at a time."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp

from sophia_levanter.optim.checks import check_count, whole_number
from sophia_levanter.optim.named import is_named

PyTree = Any


def split_microbatches(
    batch: PyTree, microbatch_size: int, *, fraction: float = 1.0, num_devices: int = 1
) -> tuple[PyTree, float]:
    """The first part of a batch in microbatches, for an estimator or `value_grad_and_curvature`.

    Args:
        batch: any pytree of arrays or NamedArrays whose first axis is the row, of the same length in all.
        microbatch_size: rows in a microbatch; it must divide the number of rows.
        fraction: the wanted part of the batch, in (0, 1]; what comes is the nearest number of whole microbatches, but
            at least one.
        num_devices: over how many devices the rows will be spread; a microbatch must divide over them, so that no
            device is left without a row. Put the result on them with the sharding [None, devices].

    Returns:
        The same tree with arrays [microbatch, row, ...], and the share of the batch that it holds.

    Raises:
        ValueError: if the sizes do not fit, or the fraction is out of its range.
    """
    microbatch_size = whole_number(microbatch_size)
    check_count("microbatch_size", microbatch_size)
    num_devices = whole_number(num_devices)
    check_count("num_devices", num_devices)
    if not isinstance(fraction, Real) or not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction!r}; it must be in (0, 1]")
    lengths = {_length(leaf) for leaf in _leaves(batch)}
    if not lengths:
        raise ValueError("the batch holds no array")
    if len(lengths) != 1:
        raise ValueError(f"the arrays of the batch have {sorted(lengths)} rows; they must all have the same number")
    (rows,) = lengths
    if rows == 0:
        raise ValueError("the arrays of the batch have 0 rows")
    if rows % microbatch_size:
        raise ValueError(f"microbatch_size is {microbatch_size}; it must divide the {rows} rows of the batch")
    if microbatch_size % num_devices:
        raise ValueError(f"microbatch_size is {microbatch_size}; it must be a multiple of the {num_devices} devices")
    whole = rows // microbatch_size
    used = max(1, round(fraction * whole))
    return jax.tree.map(lambda x: _split(x, microbatch_size, used), batch, is_leaf=is_named), used / whole


def num_microbatches(microbatches: PyTree) -> int:
    """The length of the first axis, which must be the same in all arrays.

    Raises:
        ValueError: if it is not, or there is no array.
    """
    lengths = {_length(leaf) for leaf in _leaves(microbatches)}
    if not lengths:
        raise ValueError("microbatches has no array; give None for a single pass")
    if len(lengths) != 1:
        raise ValueError(
            f"microbatches has arrays with {sorted(lengths)} microbatches; they must all have the same number"
        )
    (count,) = lengths
    if count == 0:
        raise ValueError("microbatches has arrays of length 0; there must be one microbatch at least")
    return count


def split_at(microbatches: PyTree, first: int) -> tuple[PyTree, PyTree | None]:
    """The first microbatches, and the rest if there are any."""

    def part(where: slice) -> PyTree:
        return jax.tree.map(
            lambda x: x[{x.axes[0].name: where}] if is_named(x) else x[where], microbatches, is_leaf=is_named
        )

    total = num_microbatches(microbatches)
    return part(slice(0, first)), part(slice(first, total)) if first < total else None


def sum_over_microbatches(
    function: Callable[[Any, Any], PyTree], microbatches: PyTree, start: PyTree | None = None
) -> PyTree:
    """The sum of `function(microbatch, index)` over the first axis, in a `lax.scan` that holds one at a time.

    Args:
        function: gives a tree of arrays, of the same shapes for each microbatch.
        microbatches: any pytree of arrays or NamedArrays [microbatch, ...].
        start: what the sum begins with; zeros if not given.
    """

    def at(index: int | jax.Array) -> PyTree:
        return function(jax.tree.map(lambda x: _take(x, index), microbatches, is_leaf=is_named), index)

    count = num_microbatches(microbatches)
    if count == 1:
        return at(0) if start is None else jax.tree.map(jnp.add, start, at(0))
    if start is None:
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(at, 0))
    summed, _ = jax.lax.scan(
        lambda carry, index: (jax.tree.map(jnp.add, carry, at(index)), None), start, jnp.arange(count)
    )
    return summed


def _leaves(tree: PyTree) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=is_named)


def _length(x: Any) -> int:
    shape = [axis.size for axis in x.axes] if is_named(x) else jnp.shape(x)
    if not shape:
        raise ValueError("a batch holds a scalar; its arrays must have the row, or microbatch, as first axis")
    return shape[0]


def _take(x: Any, index: int | jax.Array) -> Any:
    if is_named(x):
        return x[{x.axes[0].name: index}]
    # numpy's arrays cannot be indexed by a traced number.
    return (x if isinstance(x, jax.Array) else jnp.asarray(x))[index]


def _split(x: Any, size: int, used: int) -> Any:
    if not is_named(x):
        return jnp.asarray(x)[: used * size].reshape(used, size, *jnp.shape(x)[1:])
    row = x.axes[0]
    part = x[{row.name: slice(0, used * size)}]
    return part.unflatten_axis(row.name, (type(row)("microbatch", used), row.resize(size)))
