"""The complete examples of the docs run, and learn what they say they learn."""

import runpy
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

from sophia_levanter.optim import SophiaG

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def names_in(example):
    return runpy.run_path(str(EXAMPLES / f"{example}.py"))


def results_of(example):
    return names_in(example)["main"]()


def test_digits():
    """One test image is 0.3 %; logistic regression has about 96 % right."""
    results = results_of("digits")
    assert set(results) == {"sophia_g", "adamw"}
    for result in results.values():
        assert result["test_accuracy"] > 0.97
        assert result["training_loss"] < 0.01
    metrics = results["sophia_g"]["metrics"]
    assert 0.1 < metrics["win_rate"] < 0.95
    assert metrics["skipped_updates"] == metrics["skipped_refreshes"] == 0
    assert metrics["rho"] < 0.05


def test_digits_convolution():
    """The estimates leave the running statistics alone: those saw one batch a step."""
    results = results_of("digits_convolution")
    assert results["test_accuracy"] > 0.97
    assert results["training_loss"] < 0.01
    assert results["frozen_unchanged"]
    assert results["batches_in_statistics"] == 300
    for metrics in results["metrics"].values():
        assert 0.1 < metrics["win_rate"] < 0.95
        assert metrics["skipped_updates"] == metrics["skipped_refreshes"] == 0
        assert metrics["steps_since_refresh"] == 10
        assert metrics["rho"] != 0.05


@pytest.mark.slow
def test_regression():
    """Between the noise, below which nobody can be, and a third of what the best linear model has."""
    results = results_of("regression")
    for name in ("sophia_g", "sophia_h", "adamw"):
        assert 1 < results[name] < results["least_squares"] / 3
    assert set(results["win_rates"]) == {"sophia_g", "sophia_h"}
    assert all(0.1 < rate < 0.6 for rate in results["win_rates"].values())


@pytest.mark.slow
def test_char_transformer():
    """Below the bigram table by more than padding that is counted, or a step that is not taken, would leave."""
    results = results_of("char_transformer")
    assert results["bigram_loss"] > 1.9
    assert results["test_loss"] < results["bigram_loss"] - 0.25
    metrics = results["metrics"]
    assert 0.1 < metrics["win_rate"] < 0.6
    assert metrics["rho"] != 0.05
    assert metrics["skipped_updates"] == metrics["skipped_refreshes"] == 0


def test_char_transformer_looks_back_only():
    transformer = names_in("char_transformer")["Transformer"]
    model = eqx.filter_jit(lambda key: transformer(9, key))(jax.random.key(0))
    tokens = np.arange(64) % 9
    changed = np.where(np.arange(64) < 40, tokens, 0)
    before, after = eqx.filter_jit(jax.vmap(model))(np.stack([tokens, changed]))
    np.testing.assert_allclose(before[:40], after[:40], atol=1e-5)
    assert np.abs(before[40:] - after[40:]).max() > 0.01


@pytest.mark.slow
def test_char_transformer_leaves_padding_out_with_and_without_a_refresh():
    example, optimizer = names_in("char_transformer"), SophiaG()
    model = example["Transformer"](9, jax.random.key(0))
    rows = np.arange(16 * 65).reshape(16, 65) % 9
    batch = (rows, 3 * np.arange(16) + 5)
    state = optimizer.init(model)
    *_, loss = example["train_step"](optimizer, model, state, batch)
    *_, same = example["train_step_with_refresh"](optimizer, model, state, batch, jax.random.key(0))
    losses = -jax.nn.log_softmax(eqx.filter_vmap(model)(rows[:, :-1]))[
        np.arange(16)[:, None], np.arange(64), rows[:, 1:]
    ]
    wanted = sum(losses[i, :n].sum() for i, n in enumerate(batch[1])) / batch[1].sum()
    assert (float(loss), float(same)) == (pytest.approx(float(wanted), rel=1e-5),) * 2
