"""Tiny sizes for the measurements."""

from pathlib import Path

import pytest

TINY = """
model: {num_layers: 2, num_heads: 2, embed_dim: 16, seq_len: 8, loss_block_size: 8, gradient_checkpointing: none}
optimizer: {type: sophia_g, warmup_steps: 2, rho: 0.5, interval: 3}
data: {train: TEXT, tokenizer: bytes, cache_dir: CACHE}
trainer: {num_train_steps: 12, batch_size: 4}
"""


@pytest.fixture
def tiny(tmp_path: Path, text_file: Path) -> Path:
    """A configuration of a tiny Sophia-G run on some text."""
    path = tmp_path / "tiny_sophia.yaml"
    path.write_text(TINY.replace("TEXT", str(text_file)).replace("CACHE", str(tmp_path / "cache")))
    return path
