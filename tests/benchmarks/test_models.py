import jax
import numpy as np
import pytest

from sophia_levanter.benchmarks.models import by_kind, train_batches, trained
from sophia_levanter.config.command_line import load_config
from sophia_levanter.data.prepare import prepare
from sophia_levanter.models.gpt2 import Gpt2, Gpt2Config

TINY = Gpt2Config(num_layers=2, num_heads=2, embed_dim=16, seq_len=6, use_bias=True, gradient_checkpointing="none")
ROWS = {"first": (0,), "others": (1, 2, 4)}


@pytest.fixture(scope="module")
def model() -> Gpt2:
    return Gpt2.init(TINY, vocab_size=20, key=jax.random.key(0))


def flat(x) -> list:
    return np.ravel(x.weight.array).tolist()


def test_kinds_hold_each_coordinate_once(model):
    parts = by_kind(model, ROWS)
    assert list(parts) == ["block matrices", "first", "others", "position embedding", "norms", "biases"]
    assert parts["first"].tolist() == model.wte.weight.array[0].tolist()
    assert parts["others"].tolist() == model.wte.weight.array[np.array([1, 2, 4])].ravel().tolist()
    assert parts["position embedding"].tolist() == flat(model.wpe)
    # Gains of 1 and biases of 0.
    assert sorted(parts["norms"].tolist()) == [0] * 5 * 16 + [1] * 5 * 16
    assert parts["block matrices"].shape == (2 * 12 * 16 * 16,)
    assert parts["biases"].shape == (2 * (3 + 1 + 4 + 1) * 16,)


def test_each_matrix_is_a_kind_if_wanted(model):
    parts, block = by_kind(model, ROWS, each_matrix=True), model.blocks.stacked
    assert list(parts)[:5] == ["attention qkv", "attention out", "mlp in", "mlp out", "first"]
    assert parts["attention qkv"].tolist() == flat(block.attn.c_attn)
    assert parts["attention out"].tolist() == flat(block.attn.c_proj)
    assert parts["mlp in"].tolist() == flat(block.mlp.c_fc)
    assert parts["mlp out"].tolist() == flat(block.mlp.c_proj)
    assert sum(x.size for x in parts.values()) == sum(x.size for x in by_kind(model, ROWS).values())


def test_a_run_passes_by_each_number_of_steps_once(tiny):
    config = load_config(tiny)
    data = prepare(config.data, print)
    batches = train_batches(config, data)
    seen = [
        (number, int(state.step), flat(state.model.wpe))
        for number, state in trained(config, batches, data.tokenizer.vocab_size, (3, 0, 3, 1))
    ]
    assert [(number, step) for number, step, _ in seen] == [(0, 0), (1, 1), (3, 3)]
    ((_, alone),) = trained(config, batches, data.tokenizer.vocab_size, [3])
    assert flat(alone.model.wpe) == seen[-1][2] != seen[0][2]
    assert int(alone.optimizer_state.refresh_count) == 1
