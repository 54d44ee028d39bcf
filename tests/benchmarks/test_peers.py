import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sophia_levanter.benchmarks import peers
from sophia_levanter.benchmarks.peers_by_hand import _attention, step_by_hand
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import SophiaGConfig

TINY = Gpt2Config(num_layers=2, num_heads=2, embed_dim=8, seq_len=16, gradient_checkpointing="none")
# What `peers_torch` says in answer to each line, for an interpreter without torch.
STAND_IN = "import sys\nfor line in sys.stdin:\n    print(0.25, flush=True)\n"


def test_every_optimizer_takes_steps_beside_the_step_by_hand(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(peers, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(peers, "BATCH_SIZE", 8)
    script = tmp_path / "peers_torch.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(peers, "TORCH_SCRIPT", script)
    peers.main(["--models", "tiny", "--rounds", "2", "--torch", sys.executable])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert names == [*peers.optimizers(8), "JAX by hand", "PyTorch, eager"]
    assert lines[-1].split(" | ")[1:3] == ["250.0", "250.0"]


def test_a_refresh_counts_as_often_as_it_comes():
    seconds = {("G", False): np.array([1.0, 2.0]), ("G", True): np.array([2.0, 4.0])}
    np.testing.assert_allclose(peers._amortised(seconds, "G", SophiaGConfig(interval=10)), [1.1, 2.2])
    np.testing.assert_allclose(peers._amortised(seconds, "G", None), [1.0, 2.0])


def test_the_step_by_hand_computes_the_loss_of_the_same_model():
    """Its first loss is that of a uniform guess, and it goes down."""
    step = step_by_hand(TINY, 50, 4)
    losses = [float(step()) for _ in range(30)]
    assert losses[0] == pytest.approx(np.log(50), abs=0.05)
    assert losses[-1] < losses[0] - 0.01


def test_attention_by_hand_is_attention():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 16, 4)).astype(np.float32)

    def wanted(q, k, v):
        q, k, v = (x[:, :, None] for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)[:, :, 0]

    np.testing.assert_allclose(_attention(q, k, v), wanted(q, k, v), atol=1e-5)
    gradients = [jax.grad(lambda *x, f=f: (f(*x) ** 2).sum(), (0, 1, 2))(q, k, v) for f in (_attention, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_script_for_pytorch_is_shipped():
    assert Path(peers.TORCH_SCRIPT).is_file()
