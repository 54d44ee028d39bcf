"""The trainer's step beside its peers: `python -m sophia_levanter.benchmarks.peers`.

For each size of model, in turns: the trainer's step with every optimizer, a step with AdamW written by hand in JAX
(`peers_by_hand`), and one in eager PyTorch where `--torch` names an interpreter that has it. All take steps of the same
size on random tokens, one after the other in every round, in a random order, so that a noisy machine slows all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from sophia_levanter.allocation import keep_freed_memory
from sophia_levanter.batch import batch_from_windows
from sophia_levanter.benchmarks.peers_by_hand import step_by_hand
from sophia_levanter.benchmarks.timing import markdown_table
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import (
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    SoapConfig,
    SophiaConfig,
    SophiaGConfig,
    SophiaHConfig,
)
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.step import StepSettings, TrainState, train_step

VOCAB_SIZE, BATCH_SIZE = 257, 8
TORCH_SCRIPT = Path(__file__).with_name("peers_torch.py")
WARMUP = 5  # rounds that are not counted
Step = Callable[[], float]  # takes a step, and returns its seconds


def _model(width: int, num_heads: int, seq_len: int) -> Gpt2Config:
    model = Gpt2Config(num_layers=4, num_heads=num_heads, embed_dim=width, seq_len=seq_len)
    return dataclasses.replace(model, gradient_checkpointing="none", scan_unroll=4)


MODELS = {"nano": _model(128, 8, 128), "3.3M": _model(256, 4, 256)}


def optimizers(width: int) -> dict[str, OptimizerConfig]:
    """What is compared; the first is what the others are divided by."""
    kronecker = SophiaGConfig(
        basis="kronecker", basis_max_size=width, interval=5, curvature_batch_fraction=0.25, curvature_microbatch_size=2
    )
    return {
        "AdamW": AdamWConfig(),
        "Lion": LionConfig(),
        "Sophia-G, whole batch": SophiaGConfig(curvature_batch_fraction=1.0),
        "Sophia-G, half the batch": SophiaGConfig(curvature_batch_fraction=0.5, curvature_microbatch_size=4),
        "Sophia-H, one row": SophiaHConfig(curvature_microbatch_size=1),
        "Sophia-G, Kronecker": kronecker,
        "Muon": MuonConfig(),
        "SOAP": SoapConfig(basis_max_size=width),
    }


def trainer_steps(model: Gpt2Config, optimizer: OptimizerConfig) -> dict[bool, Step]:
    """The trainer's compiled step and, for Sophia, the one that refreshes the curvature, on one state."""
    trainer = TrainerConfig(batch_size=BATCH_SIZE)
    partition = partition_of(devices=jax.devices()[:1])
    settings = StepSettings.of(TrainConfig(model=model, optimizer=optimizer, trainer=trainer))
    windows = np.random.default_rng(0).integers(0, VOCAB_SIZE, (BATCH_SIZE, model.seq_len + 1), np.int32)
    batch = partition.place(batch_from_windows(windows))
    state = partition.place(
        TrainState.init(model.build(vocab_size=VOCAB_SIZE, key=jax.random.key(0)), settings.optimizer)
    )

    def compiled(refresh: bool) -> Step:
        step: Any = eqx.filter_jit(partial(train_step, settings, refresh), donate="all-except-first")
        with partition.active():
            step = step.lower(batch, state).compile()

        def run() -> Any:
            nonlocal state
            state, output = step(batch, state)
            return output.metrics["train/loss"]

        return partial(_seconds, run)

    return {refresh: compiled(refresh) for refresh in (False, True)[: 1 + isinstance(optimizer, SophiaConfig)]}


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


@contextmanager
def torch_step(python: Path, model: Gpt2Config) -> Iterator[Step]:
    """A step of PyTorch, in a process of its own that sleeps between two steps."""
    sizes = {name: getattr(model, name) for name in ("num_layers", "embed_dim", "num_heads", "mlp_ratio", "seq_len")}
    words = [f"--{name}={size}" for name, size in {**sizes, "vocab_size": VOCAB_SIZE, "batch_size": BATCH_SIZE}.items()]
    with subprocess.Popen(
        [str(python), str(TORCH_SCRIPT), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def step() -> float:
            stdin.write("step\n")
            stdin.flush()
            return float(stdout.readline())

        try:
            yield step
        finally:
            stdin.close()


def measure(model: Gpt2Config, rounds: int, torch: Path | None, only: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Seconds of a step, [round], by name; those of Sophia are weighted means of plain and refresh steps.

    Args:
        model: its shape.
        rounds: how often each step is timed.
        torch: an interpreter that has PyTorch; None leaves it out.
        only: names of optimizers to time; all if empty.
    """
    wanted = {name: config for name, config in optimizers(model.embed_dim).items() if not only or name in only}
    steps: dict[tuple[str, bool], Step] = {
        (name, refresh): step
        for name, config in wanted.items()
        for refresh, step in trainer_steps(model, config).items()
    }
    steps["JAX by hand", False] = partial(_seconds, step_by_hand(model, VOCAB_SIZE, BATCH_SIZE))
    with nullcontext() if torch is None else torch_step(torch, model) as pytorch:
        if pytorch is not None:
            steps["PyTorch, eager", False] = pytorch
        timed = _in_random_order(list(steps.values()), WARMUP + rounds)[WARMUP:]
    seconds = dict(zip(steps, timed.T, strict=True))
    return {name: _amortised(seconds, name, wanted.get(name)) for name, refresh in steps if not refresh}


def _in_random_order(steps: Sequence[Step], rounds: int) -> np.ndarray:
    """Seconds, [round, step]. A step runs slower after one that leaves its threads spinning, as PyTorch's do."""
    rng, timed = np.random.default_rng(0), np.empty((rounds, len(steps)))
    for row in timed:
        for index in rng.permutation(len(steps)):
            row[index] = steps[index]()
    return timed


def _amortised(seconds: Mapping[tuple[str, bool], np.ndarray], name: str, config: OptimizerConfig | None) -> np.ndarray:
    plain = seconds[name, False]
    if not isinstance(config, SophiaConfig):
        return plain
    return plain + (seconds[name, True] - plain) / config.interval


def table(seconds: Mapping[str, np.ndarray]) -> str:
    """Minima and lower quartiles in ms, and ratios of lower quartiles."""
    quartiles = {name: float(np.quantile(values, 0.25)) for name, values in seconds.items()}
    base = quartiles["AdamW"]
    rows = [
        (name, f"{1e3 * values.min():.1f}", f"{1e3 * quartiles[name]:.1f}", f"{quartiles[name] / base:.3f}")
        for name, values in seconds.items()
    ]
    return markdown_table(["step", "minimum, ms", "lower quartile, ms", "over AdamW"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=optimizers(1), default=[], help="optimizers to time besides AdamW")
    parser.add_argument("--torch", type=Path, metavar="PYTHON", help="an interpreter that has PyTorch")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    only = ["AdamW", *arguments.only] if arguments.only else []
    for name in arguments.models:
        print(f"\n{name}: {BATCH_SIZE} x {MODELS[name].seq_len} tokens, {arguments.rounds} rounds\n")
        print(table(measure(MODELS[name], arguments.rounds, arguments.torch, only)))


if __name__ == "__main__":
    main()
