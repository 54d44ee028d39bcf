"""Temporary memory of the trainer's steps: `python tests/benchmarks/step_memory.py`.

The figures are XLA's own analysis of the steps, compiled as the trainer compiles them for one device of the platform
that jax runs on. Nothing is allocated or computed, so a laptop can analyse large models.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from benchmark_tables import print_table

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import load_config
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.costs import lower_step

HEADER = ["microbatch", "step", "temporary MB", "beside", "its MB", "ratio"]


def temporary_bytes(config: TrainConfig, *, refresh: bool, vocab_size: int = 50257) -> int:
    """Bytes that a step needs besides its arguments and results."""
    partition = partition_of(devices=jax.devices()[:1])
    analysis = lower_step(config, partition, vocab_size, refresh=refresh).compile().memory_analysis()
    assert analysis is not None, f"no memory analysis on {jax.default_backend()}"
    return analysis.temp_size_in_bytes


def rows(configs: Path, microbatch_sizes: Sequence[int], curvature_divisors: Sequence[int]) -> Iterator[list[object]]:
    """Plain steps of Sophia beside AdamW's, and refresh steps beside plain ones.

    Args:
        configs: the common beginning of the files' names, such as `config/gpt2_small`.
        microbatch_sizes: sizes of the gradient's microbatch.
        curvature_divisors: Hutchinson's microbatch is the gradient's divided by each of these.
    """

    def temporary(optimizer: str, refresh: bool, size: int, *more: tuple[str, str]) -> int:
        path = configs.with_name(f"{configs.name}_{optimizer}.yaml")
        return temporary_bytes(load_config(path, [("trainer.microbatch_size", str(size)), *more]), refresh=refresh)

    def row(size: int, step: str, taken: int, beside: str, reference: int) -> list[object]:
        return [size, step, f"{taken / 1e6:.0f}", beside, f"{reference / 1e6:.0f}", f"{taken / reference:.3f}"]

    for size in microbatch_sizes:
        adamw, g, h = (temporary(name, False, size) for name in ("adamw", "sophia", "sophia_h"))
        yield row(size, "Sophia-G, plain", g, "AdamW", adamw)
        yield row(size, "Sophia-H, plain", h, "AdamW", adamw)
        for fraction in ("1.0", "0.5"):
            refresh = temporary("sophia", True, size, ("optimizer.curvature_batch_fraction", fraction))
            yield row(size, f"Sophia-G, refresh on {fraction} of the batch", refresh, "its plain step", g)
        for own in [size // divisor for divisor in curvature_divisors if size % divisor == 0]:
            refresh = temporary("sophia_h", True, size, ("optimizer.curvature_microbatch_size", str(own)))
            yield row(size, f"Sophia-H, refresh in microbatches of {own}", refresh, "its plain step", h)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the temporary memory of each step beside that of another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, default=Path("config/gpt2_small"), help="beginning of the files' names")
    parser.add_argument("--microbatch_sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--curvature_divisors", type=int, nargs="+", default=[2, 4, 8])
    arguments = parser.parse_args(argv)
    print_table(HEADER, rows(arguments.configs, arguments.microbatch_sizes, arguments.curvature_divisors))


if __name__ == "__main__":
    main()
