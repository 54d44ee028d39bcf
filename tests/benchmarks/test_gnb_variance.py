import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.batch import batch_from_windows
from sophia_levanter.benchmarks import gnb_variance
from sophia_levanter.benchmarks.gnb_variance import compare, embedding_rows, moments_over_draws, ragged_weights
from sophia_levanter.models.gpt2 import Gpt2, Gpt2Config

TINY = Gpt2Config(num_layers=2, num_heads=2, embed_dim=16, seq_len=6, gradient_checkpointing="none")


@pytest.fixture(scope="module")
def model() -> Gpt2:
    return Gpt2.init(TINY, vocab_size=20, key=jax.random.key(0))


def windows(rows: int) -> np.ndarray:
    """Token 0 in every row, the others in some."""
    drawn = np.random.default_rng(1).integers(0, 20, (rows, TINY.seq_len + 1), dtype=np.int32)
    return np.where(np.arange(TINY.seq_len + 1) == 0, 0, drawn)


def test_rows_are_told_apart_by_how_many_microbatches_read_them():
    rows = embedding_rows(np.array([[0, 1, 2], [0, 1, 3], [0, 0, 4]]), 6)
    assert rows == {
        "token embedding, frequent": (0,),
        "token embedding, between": (1,),
        "token embedding, rare": (2, 3, 4, 5),
    }


@pytest.mark.parametrize("num_draws", [7, 20])
def test_moments_are_numpys(num_draws):
    def estimate(key):
        return {"x": 5 + jax.random.normal(key, (3,))}

    key = jax.random.key(0)
    moments, sums = moments_over_draws(estimate, key, num_draws)
    drawn = np.array([estimate(jax.random.fold_in(key, i))["x"] for i in range(num_draws)], float)
    np.testing.assert_allclose(moments.mean["x"], drawn.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.squares["x"], num_draws * drawn.var(0), rtol=1e-4)
    np.testing.assert_allclose(sums["x"], drawn.sum(1), rtol=1e-5)


def test_one_microbatch_with_targets_leaves_no_difference(model):
    weights = np.ones((4, TINY.seq_len), np.float32) * (np.arange(4) == 2)[:, None]
    for c in compare(model, batch_from_windows(windows(4), weights, num_microbatches=4), num_draws=10):
        assert (c.variance, c.mean, c.mean_bound) == pytest.approx((1, 1, 0), abs=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
def test_several_microbatches_have_less_variance_and_the_same_mean(model, ragged):
    given = windows(16)
    weights = ragged_weights((16, TINY.seq_len), 8) if ragged else None
    batch = batch_from_windows(given, weights, num_microbatches=8)
    matrices = compare(model, batch, num_draws=200)[0]
    assert matrices.kind == "block matrices"
    assert 0.1 < matrices.variance < 0.4
    assert 0.1 < matrices.coordinates.median < 0.4
    # Four standard errors.
    assert abs(matrices.mean - 1) < 4 / 1.96 * matrices.mean_bound < 0.3


def test_ragged_weights_keep_another_share_in_each_microbatch():
    kept = ragged_weights((8, 1000), 4).mean(1)
    np.testing.assert_allclose(kept, [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1], atol=0.06)


def test_main_prints_a_table(tiny, capsys):
    gnb_variance.main(["--config", str(tiny), "--draws", "4", "--steps", "2", "--microbatches", "4"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {line.split("|")[1].strip() for line in lines[2:]} == {"0", "2"}
    assert len(lines) > 2 + 4 * 4
    assert jnp.isfinite(jnp.asarray([float(line.split("|")[4]) for line in lines[2:]])).all()
