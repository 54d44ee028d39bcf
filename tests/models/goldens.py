"""What transformers computed of models, with their weights."""

import json

import haliax as hax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.batch import Batch


def named(array):
    return hax.named(jnp.asarray(array), ("batch", "position"))


class Golden:
    """Arrays of tests/golden.

    Attributes:
        config: the fields of transformers' configuration.
        weights: the model's arrays by transformers' names.
        batch: the tokens that transformers had; the last ones of rows have no target.
    """

    def __init__(self, arrays):
        self.arrays, self.config = arrays, json.loads(str(arrays["config"]))
        self.weights = {name.removeprefix("weight/"): arrays[name] for name in arrays if name.startswith("weight/")}
        tokens = arrays["input_ids"].astype(np.int32)
        counted = np.ones(tokens.shape, np.float32)
        counted[:, -1] = 0
        self.batch = Batch(named(tokens), named(np.roll(tokens, -1, axis=1)), named(counted))

    def check(self, loss, grads):
        """Compares the summed loss and its gradients by name with transformers', which are of the mean loss."""
        targets = float(self.batch.weights.array.sum())
        assert float(loss) / targets == pytest.approx(float(self.arrays["loss"]), rel=1e-6)
        assert {f"grad/{name}" for name in grads} == {name for name in self.arrays if name.startswith("grad/")}
        for name, grad in grads.items():
            np.testing.assert_allclose(grad / targets, self.arrays[f"grad/{name}"], rtol=0, atol=1e-5, err_msg=name)
