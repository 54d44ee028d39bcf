from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from tiny_runs import xla_flags

# 64 tokens in a step.
TINY = """
model: {num_layers: 1, num_heads: 1, embed_dim: 16, seq_len: 32, loss_block_size: 32, gradient_checkpointing: none}
optimizer: {learning_rate: 1e-2}
data: {train: TEXT, validation: VALIDATION, tokenizer: bytes, cache_dir: CACHE}
trainer: {batch_size: 2, evaluation_windows: 8, log_every: 100}
"""


@pytest.fixture
def write(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a study; its runs have one device, as a user without accelerators has it."""
    jax.devices()  # this process keeps its eight
    monkeypatch.setenv("XLA_FLAGS", xla_flags())
    validation = tmp_path / "validation.txt"
    validation.write_text(text_file.read_text()[-2000:])
    names = {"TEXT": text_file, "VALIDATION": validation, "CACHE": tmp_path / "cache"}
    tiny = TINY
    for name, path in names.items():
        tiny = tiny.replace(name, str(path))
    (tmp_path / "tiny.yaml").write_text(tiny)

    def write(text: str) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(text)
        return path

    return write


# With the steps of `tiny_runs.CONFIG` under AdamW, which are compiled once.
TRAINED = """
model: {num_layers: 2, num_heads: 2, embed_dim: 16, seq_len: 16, loss_block_size: 8, gradient_checkpointing: none}
optimizer: {type: adamw, warmup: 2, learning_rate: 1e-2, final_learning_rate: 1e-3}
data: {train: ROOT/text.txt, tokenizer: bytes, cache_dir: ROOT/cache}
trainer: {num_train_steps: 12, batch_size: 16, microbatch_size: 8, checkpoint_every: 6, evaluate_every: 6,
  evaluation_windows: 10, sample_tokens: 0}
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, `run`, with checkpoints after 6 and 12 steps; its configuration, `tiny.yaml`; and
    the same model exported, `exported`. Tests only read them."""
    from sophia_levanter.commands import export
    from sophia_levanter.main import main

    root = tmp_path_factory.mktemp("trained")
    (root / "text.txt").write_text("".join(f"Line {i} says {i * i} — naïve.\n" for i in range(300)))
    (root / "tiny.yaml").write_text(TRAINED.replace("ROOT", str(root)))
    assert main(["--config", str(root / "tiny.yaml"), "--trainer.run_dir", str(root / "run")]) == 0
    assert export.main([str(root / "run"), str(root / "exported")]) == 0
    return root
