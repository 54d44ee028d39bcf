"""Statistics of individual arrays, layer by layer, at the steps selected by `trainer.statistics_every`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sophia_levanter.config.registries import STATISTICS
from sophia_levanter.optim import Optimizer
from sophia_levanter.optim._trees import is_named, plain, trainable, upcast
from sophia_levanter.partition.mesh import shard_params
from sophia_levanter.training.metrics import StepTrees

PyTree = Any

QUANTILES = {"curvature_p10": 0.1, "curvature_p50": 0.5, "curvature_p90": 0.9}


def array_statistics(optimizer: Optimizer, step: StepTrees) -> dict[str, jax.Array]:
    """Return statistics for each array in a step.

    | kind | |
    |---|---|
    | `weight_rms` | root mean square of the weights before the step |
    | `gradient_rms` | root mean square of the mean gradient before clipping |
    | `update_rms` | root mean square of the update, including the learning rate and weight decay |
    | `update_ratio` | `update_rms / weight_rms`; not finite where the weights are 0 |
    | `win_rate` | the fraction of coordinates whose step is not clipped |
    | `curvature_p10`, `curvature_p50`, `curvature_p90` | quantiles of the stored h |

    The last two rows require an optimizer with an `unclipped` method, such as Sophia. With a Kronecker basis, they are
    measured in the coordinates of h.

    Returns:
        float32 statistics keyed by `ARRAY/KIND`, where ARRAY is the path of the parameter, such as
        `blocks/stacked/attn/c_attn/weight`: [layers] for an array of stacked layers, a scalar for any other array.
    """
    trees = {"weight": trainable(step.before.model), "gradient": step.grads, "update": step.updates}
    found = {f"{array}/{kind}_rms": _rms(x) for kind, tree in trees.items() for array, x in _arrays(tree).items()}
    for array in _arrays(trees["weight"]):
        found[f"{array}/update_ratio"] = found[f"{array}/update_rms"] / found[f"{array}/weight_rms"]
    state = step.after.optimizer_state
    measure = getattr(optimizer, "unclipped", None)
    unclipped = None if measure is None else measure(state)
    while hasattr(state, "optimizer_state"):  # unwrap the state of a wrapper such as `Hyperball`
        state = state.optimizer_state
    if unclipped is not None:
        found |= {f"{array}/win_rate": _mean(plain(x), _inner(x)) for array, x in _arrays(unclipped).items()}
        for array, h in _arrays(state.curvature).items():
            numbers = quantiles(plain(h), _inner(h), tuple(QUANTILES.values()))
            found |= {f"{array}/{kind}": number for kind, number in zip(QUANTILES, numbers, strict=True)}
    return shard_params(found)  # replicate on every device, so that the host can read all values


def by_layer(statistics: Mapping[str, jax.Array]) -> dict[str, float]:
    """Convert statistics to numbers: for each kind, one per array, or one per layer of a stacked array.

    The keys are `statistics/ARRAY/KIND` or `statistics/ARRAY/LAYER/KIND`, sorted by array, then by layer.
    """
    found = []
    for name, values in statistics.items():
        array, _, kind = name.rpartition("/")
        for layer, value in enumerate(np.asarray(values).ravel().tolist()):
            place = f"{array}/{layer}" if values.ndim else array
            found.append(((array, layer, kind), f"{STATISTICS}/{place}/{kind}", value))
    return {name: value for _, name, value in sorted(found)}


def quantiles(x: jax.Array, axes: Sequence[int], shares: Sequence[float]) -> jax.Array:
    """Compute quantiles over some axes of an array, following NumPy's `inverted_cdf` method.

    The bits of each quantile are determined one at a time by counting smaller numbers. Sorting is not an option,
    because it would gather an array that is sharded over devices.

    Args:
        x: an array without NaN; it is converted to float32.
        axes: the axes to reduce.
        shares: the probabilities of the quantiles, above 0 and at most 1; they index the first axis of the result.
    """
    sign = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    ordered = jnp.where(bits & sign, ~bits, bits | sign)  # unsigned integers that sort like the floats
    count = math.prod(x.shape[axis] for axis in axes)
    left = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)

    def quantile(rank: jax.Array) -> jax.Array:
        def with_bit(i: int, found: jax.Array) -> jax.Array:
            candidate = found | (sign >> jnp.uint32(i))
            below = jnp.sum(ordered < jnp.expand_dims(candidate, axes), axis=axes, dtype=jnp.int32)
            return jnp.where(below < rank, candidate, found)

        return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros(left, jnp.uint32))

    ranks = jnp.asarray([max(1, math.ceil(share * count)) for share in shares], jnp.int32)
    found = jax.vmap(quantile)(ranks)
    return jax.lax.bitcast_convert_type(jnp.where(found & sign, found ^ sign, ~found), jnp.float32)


def _arrays(tree: PyTree) -> dict[str, Any]:
    """Return the arrays in a tree, keyed by path. NamedArrays keep their axes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_named)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if plain(leaf) is not None}


def _inner(x: Any) -> tuple[int, ...]:
    """Return the indices of all axes except the layer axis."""
    names = [axis.name for axis in x.axes] if is_named(x) else [""] * x.ndim
    return tuple(i for i, name in enumerate(names) if name != "layers")


def _rms(x: Any) -> jax.Array:
    return jnp.sqrt(_mean(jnp.square(upcast(plain(x))), _inner(x)))


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.mean(x, axis=axes, dtype=jnp.float32)
