"""Temporary memory of the trainer's steps: `python -m sophia_levanter.benchmarks.step_memory`.

The figures are XLA's own analysis of the steps as the trainer compiles them, for one device of the platform that jax
runs on. Parameters are abstract: nothing is allocated or computed, so that large models can be looked at on a laptop.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from sophia_levanter.benchmarks.timing import markdown_table
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import load_config
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.costs import lower_step

VOCAB_SIZE = 50257


class Row(NamedTuple):
    """A step's temporary memory beside another's, in bytes."""

    microbatch_size: int
    step: str
    beside: str
    num_bytes: int
    beside_bytes: int


def temporary_bytes(config: TrainConfig, *, refresh: bool) -> int:
    """What a step needs besides its arguments and results, by XLA's analysis.

    Args:
        config: the run; its data are not looked at.
        refresh: whether the step refreshes the curvature.
    """
    partition = partition_of(devices=jax.devices()[:1])
    compiled = lower_step(config, partition, VOCAB_SIZE, refresh=refresh).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None, f"no memory analysis on {jax.default_backend()}"
    return analysis.temp_size_in_bytes


def measure(
    configs: Path,
    microbatch_sizes: Sequence[int],
    curvature_divisors: Sequence[int],
    overrides: Sequence[tuple[str, str]] = (),
) -> list[Row]:
    """Temporary memory of plain and refresh steps.

    Args:
        configs: the files' common beginning, as `config/gpt2_small`.
        microbatch_sizes: rows of the gradient's microbatch.
        curvature_divisors: Hutchinson's microbatch is the gradient's divided by these, where it divides.
        overrides: as for `load_config`, for all files.
    """

    def temporary(optimizer: str, refresh: bool, *more: tuple[str, str]) -> int:
        path = configs.with_name(f"{configs.name}_{optimizer}.yaml")
        return temporary_bytes(load_config(path, [*overrides, *more]), refresh=refresh)

    rows = []
    for size in microbatch_sizes:
        rows_of_gradient = ("trainer.microbatch_size", str(size))
        adamw, g, h = (temporary(name, False, rows_of_gradient) for name in ("adamw", "sophia", "sophia_h"))
        rows.append(Row(size, "Sophia-G, plain", "AdamW", g, adamw))
        rows.append(Row(size, "Sophia-H, plain", "AdamW", h, adamw))
        for fraction in ("1.0", "0.5"):
            part = ("optimizer.curvature_batch_fraction", fraction)
            refresh = temporary("sophia", True, rows_of_gradient, part)
            rows.append(Row(size, f"Sophia-G, refresh on {fraction} of the batch", "its plain step", refresh, g))
        for own in [size // divisor for divisor in curvature_divisors if size % divisor == 0]:
            refresh = temporary("sophia_h", True, rows_of_gradient, ("optimizer.curvature_microbatch_size", str(own)))
            rows.append(Row(size, f"Sophia-H, refresh in microbatches of {own}", "its plain step", refresh, h))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print each step's temporary memory beside that of another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, default=Path("config/gpt2_small"), help="the files' common beginning")
    parser.add_argument("--microbatch_sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--curvature_divisors", type=int, nargs="+", default=[2, 4, 8])
    arguments = parser.parse_args(argv)
    rows = measure(arguments.configs, arguments.microbatch_sizes, arguments.curvature_divisors)
    print(
        markdown_table(
            ["microbatch", "step", "temporary MB", "beside", "its MB", "ratio"],
            [
                (
                    row.microbatch_size,
                    row.step,
                    f"{row.num_bytes / 1e6:.0f}",
                    row.beside,
                    f"{row.beside_bytes / 1e6:.0f}",
                    f"{row.num_bytes / row.beside_bytes:.3f}",
                )
                for row in rows
            ],
        )
    )


if __name__ == "__main__":
    main()
