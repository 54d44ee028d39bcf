"""The trainer's step beside its peers: `python tests/benchmarks/peers.py`.

Times the trainer's step with every optimizer, a step with AdamW written by hand in JAX (`peers_by_hand.py`), and a step
in eager PyTorch (`peers_torch.py`) where `--torch` names a Python interpreter that has it. All take steps of the same
size on random tokens. Each round times every step once, in random order, so that a noisy machine slows all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before jax is imported, as sophia_levanter.main does

import jax
import numpy as np
from benchmark_tables import print_table
from peers_by_hand import step_by_hand

from sophia_levanter.allocation import keep_freed_memory
from sophia_levanter.batch import batch_from_sequences
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig, LionConfig, MuonConfig, SoapConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import OptimizerConfig, SophiaConfig, SophiaGConfig, SophiaHConfig
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.costs import lower_step
from sophia_levanter.training.step import StepSettings, TrainState

VOCAB_SIZE, BATCH_SIZE = 257, 8
TORCH_SCRIPT = Path(__file__).with_name("peers_torch.py")
WARMUP = 5  # rounds that are not counted
HEADER = ["step", "minimum, ms", "lower quartile, ms", "over AdamW"]
Step = Callable[[], float]  # takes a step and returns its seconds


def _model(width: int, num_heads: int, seq_len: int) -> Gpt2Config:
    model = Gpt2Config(num_layers=4, num_heads=num_heads, embed_dim=width, seq_len=seq_len)
    return dataclasses.replace(model, gradient_checkpointing="none", scan_unroll=4)


MODELS = {"nano": _model(128, 8, 128), "3.3M": _model(256, 4, 256)}


def optimizers(width: int) -> dict[str, OptimizerConfig]:
    """The optimizers to compare; times are divided by those of the first."""
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


def trainer_steps(model: Gpt2Config, optimizer: OptimizerConfig) -> list[Step]:
    """The trainer's compiled step and, for Sophia, the step that refreshes the curvature, on one state."""
    config = TrainConfig(model=model, optimizer=optimizer, trainer=TrainerConfig(batch_size=BATCH_SIZE))
    partition = partition_of(devices=jax.devices()[:1])
    windows = np.random.default_rng(0).integers(0, VOCAB_SIZE, (BATCH_SIZE, model.seq_len + 1), np.int32)
    batch = partition.place(batch_from_sequences(windows))
    built = model.build(vocab_size=VOCAB_SIZE, key=jax.random.key(0))
    state = partition.place(TrainState.init(built, StepSettings.of(config).optimizer))

    def compiled(refresh: bool) -> Step:
        step: Any = lower_step(config, partition, VOCAB_SIZE, refresh=refresh).compile()

        def run() -> Any:
            nonlocal state
            state, output = step(batch, state)
            return output.metrics["train/loss"]

        return partial(_seconds, run)

    return [compiled(refresh) for refresh in ((False, True) if isinstance(optimizer, SophiaConfig) else (False,))]


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


@contextmanager
def torch_step(python: Path, model: Gpt2Config) -> Iterator[Step]:
    """A step of PyTorch in a process of its own, which sleeps between two steps."""
    sizes = {name: getattr(model, name) for name in ("num_layers", "embed_dim", "num_heads", "mlp_ratio", "seq_len")}
    words = [f"--{name}={size}" for name, size in {**sizes, "vocab_size": VOCAB_SIZE, "batch_size": BATCH_SIZE}.items()]
    command = [str(python), str(TORCH_SCRIPT), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
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


def measure(model: Gpt2Config, rounds: int, torch: Path | None) -> dict[str, np.ndarray]:
    """The seconds of each step, [round]; for Sophia the mean over the steps from one refresh to the next."""
    configs = optimizers(model.embed_dim)
    steps = {name: trainer_steps(model, config) for name, config in configs.items()}
    steps["JAX by hand"] = [partial(_seconds, step_by_hand(model, VOCAB_SIZE, BATCH_SIZE))]
    with nullcontext() if torch is None else torch_step(torch, model) as pytorch:
        if pytorch is not None:
            steps["PyTorch, eager"] = [pytorch]
        timed = iter(_in_random_order([step for found in steps.values() for step in found], rounds))
    seconds = {name: [next(timed) for _ in found] for name, found in steps.items()}
    return {name: amortized(found, getattr(configs.get(name), "interval", 1)) for name, found in seconds.items()}


def _in_random_order(steps: Sequence[Step], rounds: int) -> np.ndarray:
    """Seconds, [step, round]. A step is slower after one that leaves its threads spinning, as PyTorch's do."""
    rng, timed = np.random.default_rng(0), np.empty((len(steps), WARMUP + rounds))
    for number in range(WARMUP + rounds):
        for index in rng.permutation(len(steps)):
            timed[index, number] = steps[index]()
    return timed[:, WARMUP:]


def amortized(seconds: Sequence[np.ndarray], interval: int) -> np.ndarray:
    """The mean of plain steps and one refresh in `interval` steps, where there are refreshes."""
    plain, refresh = seconds[0], seconds[-1]
    return plain + (refresh - plain) / interval


def rows(seconds: dict[str, np.ndarray]) -> Iterator[list[str]]:
    """Minima and lower quartiles, and ratios of lower quartiles."""
    quartiles = {name: float(np.quantile(values, 0.25)) for name, values in seconds.items()}
    for name, quartile in quartiles.items():
        ratio = quartile / quartiles["AdamW"]
        yield [name, f"{1e3 * seconds[name].min():.1f}", f"{1e3 * quartile:.1f}", f"{ratio:.3f}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each size of model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--torch", type=Path, metavar="PYTHON", help="a Python interpreter that has PyTorch")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    for name in arguments.models:
        print(f"\n{name}: {BATCH_SIZE} x {MODELS[name].seq_len} tokens, {arguments.rounds} rounds\n")
        print_table(HEADER, rows(measure(MODELS[name], arguments.rounds, arguments.torch)))


if __name__ == "__main__":
    main()
