from functools import partial

import equinox as eqx
import jax
import numpy as np
import pytest

from sophia_levanter.batch import batch_from_windows
from sophia_levanter.benchmarks.stacked_steps import initial_state, stacked, stacked_batches, steps_within
from sophia_levanter.command_line import load_config
from sophia_levanter.models.gpt2 import decay_mask
from sophia_levanter.training.optimizers import build_step_settings
from sophia_levanter.training.step import train_step

VOCAB_SIZE = 20


@pytest.mark.parametrize("optimizer", ["sophia_g", "adamw"])
def test_a_stacked_step_is_the_trainers_of_each_run(tiny, optimizer):
    def config(rate: float, seed: int):
        peak, final = (str(rate * x) for x in (1e-2, 1e-3))
        rates = [("optimizer.learning_rate", peak), ("optimizer.final_learning_rate", final)]
        shape = [("model.num_layers", "1"), ("model.dropout", "0.1"), ("trainer.microbatch_size", "2")]
        chosen = [("optimizer.type", optimizer), ("optimizer.warmup_steps", "2"), ("trainer.seed", str(seed))]
        return load_config(tiny, [*chosen, *rates, *shape])

    windows = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 4, 9), dtype=np.int32)
    batches = [batch_from_windows(w, num_microbatches=2) for w in windows]
    step, states = stacked(config(1.0, 0), VOCAB_SIZE, (3, 4), (1.0, 0.25))
    stepped = jax.jit(step)
    own = config(0.25, 4)
    settings = build_step_settings(own.optimizer, own.trainer, decay_mask)
    alone = jax.jit(partial(train_step, settings, False))
    state = eqx.filter_jit(partial(initial_state, own, settings, VOCAB_SIZE))(4)
    for _ in range(3):
        states, outputs = stepped(stacked_batches(batches), states)
        state, output = alone(batches[1], state)
    second = jax.tree.map(lambda x: x[1], (states, outputs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), second, (state, output))
    assert outputs.metrics["train/learning_rate"].tolist() == pytest.approx([1e-2, 0.25e-2])
    assert len(set(outputs.metrics["train/loss"].tolist())) == 2


def test_steps_are_counted_until_the_time_is_over(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))

    class State:
        step = 0

    class Output:
        metrics: dict = {}  # noqa: RUF012

    taken = []

    def step(batch, state):
        taken.append(batch)
        return State(), Output()

    # The clock is looked at once before each step, and once at the end.
    assert steps_within(step, "batch", State(), seconds=4) == (4, 5)
    assert taken == ["batch"] * 4
