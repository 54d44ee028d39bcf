from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.batch import Batch, batch_from_windows
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.models.gpt2 import Gpt2

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def golden() -> Callable[[str], Any]:
    return lambda name: np.load(GOLDEN / f"{name}.npz")


@pytest.fixture
def make_model() -> Callable[..., Gpt2]:
    """A tiny model with weights large enough for the layers to matter, drawn without jax, which takes long to."""

    def make(vocab_size: int = 100, **changes: Any) -> Gpt2:
        shape = {"num_layers": 2, "num_heads": 2, "embed_dim": 8, "seq_len": 8, "loss_block_size": 3}
        config = Gpt2Config(**(shape | {"gradient_checkpointing": "none"} | changes))
        template = eqx.filter_eval_shape(Gpt2.init, config, vocab_size=vocab_size, key=jax.random.key(0))
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), template)

    return make


@pytest.fixture
def batch() -> Batch:
    """Two windows of eight positions; some targets are left out."""
    rng = np.random.default_rng(0)
    weights = rng.choice([0, 1, 1, 2], (2, 8)).astype(np.float32)
    batch = batch_from_windows(rng.integers(0, 100, (2, 9)).astype(np.int32), weights)
    return jax.tree.map(lambda x: x["microbatch", 0], batch, is_leaf=lambda x: hasattr(x, "axes"))
