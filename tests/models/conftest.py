import jax
import numpy as np
import pytest

from sophia_levanter.batch import Batch, batch_from_sequences


@pytest.fixture
def batch() -> Batch:
    """Two windows of eight positions; some targets are left out."""
    rng = np.random.default_rng(0)
    weights = rng.choice([0, 1, 1, 2], (2, 8)).astype(np.float32)
    batch = batch_from_sequences(rng.integers(0, 100, (2, 9)).astype(np.int32), weights)
    return jax.tree.map(lambda x: x["microbatch", 0], batch, is_leaf=lambda x: hasattr(x, "axes"))
