from functools import partial
from pathlib import Path

import equinox as eqx
import gradient_noise
import haliax as hax
import jax
import jmp
import numpy as np
import pytest
from gradient_noise import gradient_and_curvature, moments, row
from haliax import NamedArray

from sophia_levanter.batch import Batch
from sophia_levanter.models.gpt2 import Gpt2, Gpt2Config

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package

TINY = Gpt2Config(num_layers=1, num_heads=2, embed_dim=8, seq_len=4, loss_block_size=4, gradient_checkpointing="none")
B, BATCHES, COORDINATES = 50, 200, 2000


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_row_has_the_ratio_and_the_critical_batch_of_known_noise(factor: float) -> None:
    rng = np.random.default_rng(0)
    variance = np.exp(rng.normal(size=COORDINATES))
    gradients = 0.3 + np.sqrt(variance) * rng.normal(size=(BATCHES, COORDINATES))
    found = np.stack([gradients.mean(0), gradients.var(0, ddof=1), B * variance / factor])
    cells = row("x", np.pad(found, ((0, 0), (0, COORDINATES))), num_targets=B, num_batches=BATCHES, by_metrics=7)
    assert cells[:3] == ["x", 2 * COORDINATES, "50.0%"]
    assert float(str(cells[3]).split()[0]) == pytest.approx(factor, rel=0.02)
    assert float(str(cells[4])) == pytest.approx(factor, rel=0.02)
    assert float(str(cells[5])) == pytest.approx(B * variance.sum() / (COORDINATES * 0.3**2), rel=0.05)
    assert cells[6] == "7"


@pytest.mark.parametrize(("by_the_model", "low", "high"), [(True, 0.85, 1.15), (False, 2, 100)])
def test_the_noise_is_the_curvature_where_the_model_is_right(by_the_model: bool, low: float, high: float) -> None:
    """Targets drawn from the model itself: then B Var(g) = h, and the mean gradient is 0."""
    model = jax.tree.map(lambda x: 8 * x, Gpt2.init(TINY, vocab_size=11, key=jax.random.key(0)))
    axes = hax.make_axes(microbatch=2, batch=3, position=4)

    @eqx.filter_jit
    def batch_of(key: jax.Array) -> Batch:
        keys = jax.random.split(key)
        tokens = NamedArray(jax.random.randint(keys[0], (2, 3, 4), 0, 11), axes)
        logits = model(tokens).rearrange((*axes, ...)).array
        targets = jax.random.categorical(keys[1], logits if by_the_model else 0 * logits)
        return Batch(tokens, NamedArray(targets, axes), hax.ones(axes))

    estimate = eqx.filter_jit(partial(gradient_and_curvature, jmp.get_policy("float32")))
    batches = map(batch_of, jax.random.split(jax.random.key(1), 300))
    mean, variance, h = moments(estimate, model, batches, jax.random.key(2))["blocks/stacked/mlp/c_fc/weight/0"]
    assert low < 24 * variance.sum() / h.sum() < high
    signal = np.sum(mean**2 - variance / 300) / variance.sum()
    assert signal < 0.003 if by_the_model else signal > 0.01


def test_a_table_for_each_number_of_steps(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(config_file), "--steps", "0", "2", "--batches", "6", "--optimizer.b1=0.9"]
    gradient_noise.main(words)
    _, *tables = capsys.readouterr().out.split("\nAfter ")
    assert [table.partition(" ")[0] for table in tables] == ["0", "2"]
    for table in tables:
        rows = [line.strip("| ").split(" | ") for line in table.splitlines() if "|" in line][2:]
        assert rows[-1][0] == "all"
        # Near its beginning the model knows how little it knows.
        assert all(0.3 < float(cells[4]) < 3 for cells in rows)
        assert sum(int(cells[1]) for cells in rows[:-1]) == int(rows[-1][1])
        assert np.isnan(float(rows[-1][6])) == table.startswith("0")
