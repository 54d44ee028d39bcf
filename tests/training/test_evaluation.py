"""The validation loss: each token counts once, whatever the batches."""

import math

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

from sophia_levanter.models.gpt2 import Gpt2, Gpt2Config
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.evaluation import Evaluation, Evaluator, evaluate_sets

CONFIG = Gpt2Config(num_layers=1, num_heads=2, embed_dim=8, seq_len=6, gradient_checkpointing="none")


def test_the_mean_over_tokens_and_the_bits_over_bytes():
    model = eqx.filter_jit(Gpt2.init)(CONFIG, vocab_size=11, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: m.wte.weight, model, model.wte.weight * 20)
    random = np.random.default_rng(1)
    windows = random.integers(0, 11, (8, 7), dtype=np.int32)
    weights = np.ones((8, 6), np.float32)
    weights[5, 2:] = 0
    weights[6:] = 0
    byte_lengths = np.array([0, 1, 2, 3, 1, 1, 2, 1, 1, 4, 1])
    batches = [(windows[:4], weights[:4]), (windows[4:], weights[4:])]
    partition = partition_of(devices=jax.devices()[:4])
    evaluation = Evaluator(batches, byte_lengths, partition, jmp.get_policy("float32"))(model)

    logits_of = eqx.filter_jit(lambda m, tokens: m(tokens).rearrange(("batch", "position", "vocab")).array)
    logits = logits_of(model, hax.named(windows[:, :-1], ("batch", "position")))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 1:, None], -1)[..., 0]
    nats = -float((np.asarray(chosen) * weights).sum())
    assert evaluation.loss == pytest.approx(nats / weights.sum(), rel=1e-5)
    text_bytes = (byte_lengths[windows[:, 1:]] * weights).sum()
    assert text_bytes != (byte_lengths[windows[:, :-1]] * weights).sum()
    assert evaluation.bits_per_byte == pytest.approx(nats / np.log(2) / text_bytes, rel=1e-5)
    assert (evaluation.tokens, evaluation.text_bytes) == (weights.sum(), text_bytes)


def test_named_sets_count_the_same_however_long_they_are():
    large, small, calls = Evaluation(3.0, 4.0, 900, 1000), Evaluation(2.0, 3.5, 10, 8), []

    def evaluator(evaluation):
        def evaluate(model, on_progress):
            calls.append((model, on_progress))
            return evaluation

        return evaluate

    def progress():
        pass

    evaluators = {"books": evaluator(large), "code": evaluator(small)}
    found = evaluate_sets(evaluators, "model", progress)
    assert found == Evaluation(2.5, 3.75, 910, 1008, {"books": large, "code": small})
    assert calls == [("model", progress)] * 2
    assert found.numbers() == {
        "validation/loss": 2.5,
        "validation/bits_per_byte": 3.75,
        "validation/books/loss": 3.0,
        "validation/books/bits_per_byte": 4.0,
        "validation/code/loss": 2.0,
        "validation/code/bits_per_byte": 3.5,
    }
    assert list(found.numbers("average_"))[::2] == [
        "validation/average_loss",
        "validation/books/average_loss",
        "validation/code/average_loss",
    ]
    assert evaluate_sets({"": evaluator(small)}, "model", progress) is small
    empty = evaluate_sets({"books": evaluator(large), "none": evaluator(Evaluation(math.nan, math.nan, 0, 0))}, "model")
    assert math.isnan(empty.loss)
