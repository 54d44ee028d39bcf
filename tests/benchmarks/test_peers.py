import sys
from pathlib import Path

import jax
import numpy as np
import peers
import pytest
from peers_by_hand import _attention, step_by_hand

from sophia_levanter.config.model import Gpt2Config

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package

TINY = Gpt2Config(num_layers=2, num_heads=2, embed_dim=8, seq_len=16, gradient_checkpointing="none")
# Answers each line as `peers_torch.py` does, for an interpreter without torch.
STAND_IN = "import sys\nfor line in sys.stdin:\n    print(0.25, flush=True)\n"


def test_every_optimizer_takes_steps_beside_the_step_by_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert peers.TORCH_SCRIPT.is_file()
    script = tmp_path / "peers_torch.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(peers, "TORCH_SCRIPT", script)
    monkeypatch.setattr(peers, "MODELS", {"tiny": TINY})
    peers.main(["--models", "tiny", "--rounds", "2", "--torch", sys.executable])
    _, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [row[0] for row in rows] == [*peers.optimizers(8), "JAX by hand", "PyTorch, eager"]
    assert rows[-1][1:3] == ["250.0", "250.0"]


def test_a_refresh_counts_once_in_its_interval() -> None:
    plain, refresh = np.array([1.0, 2.0]), np.array([2.0, 4.0])
    np.testing.assert_allclose(peers.amortized([plain, refresh], 10), [1.1, 2.2])
    np.testing.assert_allclose(peers.amortized([plain], 10), plain)


def test_the_step_by_hand_learns() -> None:
    """Its first loss is that of a uniform guess."""
    step = step_by_hand(TINY, 50, 4)
    losses = [float(step()) for _ in range(30)]
    assert losses[0] == pytest.approx(np.log(50), abs=0.05)
    assert losses[-1] < losses[0] - 0.01


def test_attention_by_hand_is_attention() -> None:
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 16, 4)).astype(np.float32)

    def expected(*qkv: jax.Array) -> jax.Array:
        q, k, v = (x[:, :, None] for x in qkv)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)[:, :, 0]

    np.testing.assert_allclose(_attention(q, k, v), expected(q, k, v), atol=1e-5)
    gradients = [jax.grad(lambda *x, f=f: (f(*x) ** 2).sum(), (0, 1, 2))(q, k, v) for f in (_attention, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
