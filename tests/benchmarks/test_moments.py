import jax
import numpy as np

from sophia_levanter.benchmarks.moments import Moments


def test_moments_are_numpys():
    values = 5 + np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    moments = Moments.like({"x": jax.ShapeDtypeStruct((3,), np.float32)})
    for value in values:
        moments = moments.with_value({"x": value})
    assert int(moments.number) == 7
    np.testing.assert_allclose(moments.mean["x"], values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.squares["x"], 7 * values.var(0), rtol=1e-4)
