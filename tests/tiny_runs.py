"""Tiny runs and tiny texts: how they are configured, started and read, and what they leave, written by hand.

The steps of two runs are compiled once if the runs have the same settings and shapes, and the number of steps is one of
the settings. A test that needs no other settings therefore takes those of `CONFIG`, and stops a run to make it short.
One to which the optimizer does not matter adds `--optimizer.type adamw`, whose only step many tests share as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import dump_config
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import SophiaGConfig
from sophia_levanter.config.trainer import TrainerConfig

if TYPE_CHECKING:
    from sophia_levanter.data.corpora import TextData
    from sophia_levanter.data.token_store import TokenStore
    from sophia_levanter.data.tokenizer import Tokenizer

# Nothing here imports jax: tests/conftest.py sets its variables first.

CONFIG = """
model: {num_layers: 2, num_heads: 2, embed_dim: 16, seq_len: 16, loss_block_size: 8, gradient_checkpointing: none}
optimizer:
  type: sophia_g
  learning_rate: 1e-2
  final_learning_rate: 1e-3
  warmup: 2
  rho: 0.5
  interval: 3
  bias_correct_curvature: true
data: {train: TEXT, tokenizer: bytes, cache_dir: CACHE}
trainer:
  num_train_steps: 12
  batch_size: 16
  microbatch_size: 8
  evaluate_every: 6
  evaluation_windows: 20
  checkpoint_every: 6
  log_every: 4
  sample_tokens: 0
"""


def write_text(folder: Path) -> Path:
    """Some 20 kB of text with a pattern in it."""
    path = folder / "text.txt"
    path.write_text("".join(f"Line {i} says that {i} times {i % 7} is {i * (i % 7)}.\n" for i in range(500)))
    return path


def write_config(folder: Path, text: Path) -> Path:
    """The configuration of a tiny run on that text, for `--config`; its token stores go to the folder."""
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.replace("TEXT", str(text)).replace("CACHE", str(folder / "cache")))
    return path


@dataclass(frozen=True)
class FinishedRun:
    """A tiny run that many tests read and none changes.

    Attributes:
        path: its directory, with checkpoints after 6 and 12 steps.
        config_file: that it was started with.
        cache: its token stores.
        output: what it printed.
    """

    path: Path
    config_file: Path
    cache: Path
    output: str

    def copy(self, to: Path, *, steps: Sequence[int] = (6, 12)) -> Path:
        """A copy of its directory for one test to change, with the checkpoints after these steps."""
        shutil.copytree(self.path, to)
        for step in {6, 12} - set(steps):
            shutil.rmtree(to / "checkpoints" / f"step-{step:08}")
        return to


def finish_run(folder: Path, *options: str) -> FinishedRun:
    """Trains with `CONFIG` and these options, in a folder that is kept for all tests that read the run."""
    from sophia_levanter.main import main

    config, output = write_config(folder, write_text(folder)), io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["--config", str(config), *options, "--trainer.run_dir", str(folder / "run")]) == 0
    return FinishedRun(folder / "run", config, folder / "cache", output.getvalue())


def metrics(run_dir: Path, name: str = "train/loss") -> dict[int, float | None]:
    """A number by step; a step that is logged twice fails."""
    found: dict[int, float | None] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if name in record:
            assert record["step"] not in found
            found[record["step"]] = record[name]
    return found


# Runs in processes of their own.


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sophia_levanter.main", *map(str, arguments)]


def xla_flags(devices: int = 1) -> str:
    """XLA's flags of the tests, for a process with so many devices."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")


def start(words: Sequence[object], *, devices: int = 1) -> subprocess.Popen[str]:
    """A process, by default on one device, as a user without accelerators has it."""
    return subprocess.Popen(
        list(map(str, words)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"XLA_FLAGS": xla_flags(devices)},
    )


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and step in steps_so_far(run_dir):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def steps_so_far(run_dir: Path) -> set[int]:
    """The steps in the metrics of a run that goes on, or was killed."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {json.loads(line)["step"] for line in lines if line.endswith("}")}


# Run directories as training leaves them, written by hand.

MODEL = Gpt2Config(num_layers=1, num_heads=1, embed_dim=8, seq_len=10)
TEXT = {"tokenizer": "bytes'", "documents": 3, "tokens": 1000, "digest": "abc"}
FACTS = {
    "environment": {"jax": "0.10.2", "cpu_threads": 2, "XLA_FLAGS": "--secret", "device": "cpu", "device_count": 1},
    "data": TEXT | {"digest": "fed"},
    "validation": TEXT,
}


def run_config(**changes: Any) -> TrainConfig:
    """The configuration of 10 steps of 5 windows of 10 tokens; a section's fields by `SECTION={...}`."""
    trainer = {"num_train_steps": 10, "batch_size": 5} | changes.pop("trainer", {})
    data = {"train": "/texts/train.txt", "tokenizer": "bytes"} | changes.pop("data", {})
    optimizer = changes.pop("optimizer", SophiaGConfig(interval=2, warmup=0))
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
    from sophia_levanter.checkpoint.manifest import FILE_NAME, Manifest, SavedArray, encode_manifest

    place = folder / f"step-{step:08}"
    place.mkdir(parents=True)
    array = SavedArray("model.wte.weight", "0", (vocab_size, 8), "float32", (vocab_size, 8), "", {})
    manifest = Manifest("id", step, 0.0, FACTS if metadata is None else metadata, "arrays", [array])
    (place / FILE_NAME).write_bytes(encode_manifest(manifest))
    return place / FILE_NAME


# Texts, and the token stores that are made of them.

TEXTS = [f"the document number {i}, naïve\n" for i in range(60)]


def quiet(line: str) -> None:
    assert "\n" not in line


def documents(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    texts: list[list[int]] = [[]]
    for token in store.read(0, store.num_tokens).tolist():
        if token == tokenizer.end_of_text:
            texts.append([])
        else:
            texts[-1].append(token)
    assert texts.pop() == []  # the last document is ended too
    assert len(texts) == store.num_documents
    return [tokenizer.decode(text) for text in texts]


def sides(data: TextData) -> tuple[list[str], list[str]]:
    return documents(data.train, data.tokenizer), documents(data.validation, data.tokenizer)


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def json_lines(texts: list) -> bytes:
    return "\n".join(json.dumps({"text": text}) for text in texts).encode()


def parquet(texts: list) -> bytes:
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer)
    return buffer.getvalue()
