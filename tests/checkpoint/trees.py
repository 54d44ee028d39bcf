"""Trees to save, and what the tests of checkpoints do with them."""

import functools
from pathlib import Path
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.checkpoint import Retention, save

Embed = hax.Axis("embed", 6)
Mlp = hax.Axis("mlp", 4)


class Model(eqx.Module):
    up: hax.nn.Linear
    scale: jax.Array
    activation: Any
    dropout: float
    name: str = eqx.field(static=True)


class State(eqx.Module):
    model: Model
    optimizer: Any
    step: jax.Array


@functools.cache
def make_model(seed: int = 0, activation: Any = jax.nn.gelu) -> Model:
    up = hax.nn.Linear.init(Embed, Mlp, key=jax.random.PRNGKey(seed))
    scale = jnp.array([1.5, jnp.nan, -0.0, jnp.inf], jnp.bfloat16)
    return Model(up, scale, activation, 0.1, "m")


@functools.cache
def make_state(seed: int = 0) -> State:
    model = make_model(seed)
    optimizer = (
        {"momentum": jax.tree.map(lambda x: x * 0 if eqx.is_array(x) else x, model), "mask": jnp.array([True, False])},
        (jnp.arange(5, dtype=jnp.int8), None, np.random.default_rng(seed).standard_normal((2, 3))),
        [jnp.zeros((0, 3)), np.float32(2.5), jax.random.PRNGKey(seed)],
    )
    return State(model, optimizer, jnp.asarray(seed, jnp.int32))


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def bits(tree: Any) -> list[Any]:
    """Each array leaf as (dtype, shape, bytes)."""
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree) if is_array(x)]


def blank(tree: Any) -> Any:
    """The same structure with other numbers in it."""
    return jax.tree.map(lambda x: x + jnp.ones((), x.dtype) if isinstance(x, jax.Array) else x, tree)


def put(directory: Path, step: int, tree: Any, *, keep: int = 9) -> Path:
    folder = save(directory, step, tree, run_id="run", metadata={"seed": step}, retention=Retention(keep))
    return Path(folder)


def silent(line: str) -> None:
    raise AssertionError(f"unexpected report: {line}")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def chunk_files(folder: Path) -> list[Path]:
    return [path for path in files(folder) if path.name.startswith("c")]


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)
