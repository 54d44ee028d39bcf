"""Run directories as training leaves them, written by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sophia_levanter.checkpoint.manifest import FILE_NAME, Manifest, SavedArray, encode_manifest
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import dump_config
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import SophiaGConfig
from sophia_levanter.config.trainer import TrainerConfig

MODEL = Gpt2Config(num_layers=1, num_heads=1, embed_dim=8, seq_len=10)
TEXT = {"tokenizer": "bytes'", "documents": 3, "tokens": 1000, "digest": "abc"}
FACTS = {
    "environment": {"jax": "0.10.2", "cpu_threads": 2, "XLA_FLAGS": "--secret", "device": "cpu", "device_count": 1},
    "data": TEXT | {"digest": "fed"},
    "validation": TEXT,
}


def run_config(**changes: Any) -> TrainConfig:
    """Of a run of 10 steps of 5 windows of 10 tokens; a section's fields by `SECTION={...}`."""
    trainer = {"num_train_steps": 10, "batch_size": 5} | changes.pop("trainer", {})
    data = {"train": "/texts/train.txt", "tokenizer": "bytes"} | changes.pop("data", {})
    optimizer = changes.pop("optimizer", SophiaGConfig(interval=2, warmup_steps=0))
    return TrainConfig(
        model=changes.pop("model", MODEL),
        optimizer=optimizer,
        data=DataConfig(**data),
        trainer=TrainerConfig(**trainer),
    )


def step_lines(steps: int, loss: float = 4.0, *, validate_every: int = 5, seconds: float = 0.1) -> list[dict[str, Any]]:
    """What such a run logs: losses fall to `loss`, and a step takes so long."""
    lines = []
    for step in range(steps):
        numbers = {
            "train/loss": loss + 1 / (step + 1),
            "train/grad_norm": 1.0,
            "train/learning_rate": 1e-3,
            "train/skipped_steps": 0,
            "train/tokens_per_second": 50 / seconds,
            "train/mfu": 0.25,
        }
        if step % 2 == 0:
            numbers |= {"optim/win_rate": 0.3, "optim/curvature_norm": 2.0, "optim/momentum_norm": 1.0}
            numbers |= {"optim/curvature_nonpositive": 0.0, "optim/rho": 0.5}
        lines.append({"step": step, **numbers})
        if (step + 1) % validate_every == 0:
            validation = loss + 1 / (step + 1)
            lines.append({"step": step, "validation/loss": validation, "validation/bits_per_byte": validation * 1.4427})
    return lines


def write_run(path: Path, config: TrainConfig | None = None, lines: Sequence[dict[str, Any]] | None = None) -> Path:
    """Writes a run directory without checkpoints; of a finished run, if no lines of metrics are given."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(dump_config(config or run_config()))
    written = step_lines(10) if lines is None else lines
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    return path


def write_manifest(folder: Path, step: int, metadata: dict[str, Any] | None = None, *, vocab_size: int = 384) -> Path:
    """Writes a checkpoint's manifest, without its arrays."""
    place = folder / f"step-{step:08}"
    place.mkdir(parents=True)
    array = SavedArray("model.wte.weight", "0", (vocab_size, 8), "float32", (vocab_size, 8), "", {})
    manifest = Manifest("id", step, 0.0, FACTS if metadata is None else metadata, "arrays", [array])
    (place / FILE_NAME).write_bytes(encode_manifest(manifest))
    return place / FILE_NAME
