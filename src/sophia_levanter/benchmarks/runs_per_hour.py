"""How many small runs an hour a machine does on its cores: `python -m sophia_levanter.benchmarks.runs_per_hour`.

Plain steps of one configuration in one process with all threads, in a process for each core, and with several runs in
one vmapped step. In each round each way has fresh processes, so that a noisy machine slows all alike; the processes of
one way start their clocks together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from sophia_levanter.benchmarks.arguments import parse_with_overrides
from sophia_levanter.benchmarks.stacked_steps import READY
from sophia_levanter.benchmarks.timing import Spread, markdown_table, spread
from sophia_levanter.command_line import dump_config
from sophia_levanter.comparison.runner import MALLOC
from sophia_levanter.errors import InputError


class Way(NamedTuple):
    """A way to use the machine.

    Attributes:
        name: in the table.
        processes: at the same time.
        threads: of each; None for one a core.
        malloc: whether glibc keeps freed buffers, as in the runs of a study.
        runs: in one vmapped step of each process.
    """

    name: str
    processes: int = 1
    threads: int | None = None
    malloc: bool = False
    runs: int = 1


class Row(NamedTuple):
    """What a way gives.

    Attributes:
        way: its name.
        tokens: tokens in a second of all its processes together.
        ratio: the same over that of the first way in the same round.
        runs: runs done in an hour.
    """

    way: str
    tokens: Spread
    ratio: Spread
    runs: float


class ProcessFailed(Exception):
    """A process ended without a result; the message is its own last line."""


def ways(num_cores: int) -> list[Way]:
    """The ways that are compared."""
    each = f"{num_cores} process(es) of one thread"
    return [
        Way("one process, all threads"),
        Way(each, num_cores, 1),
        Way(f"{each}, buffers kept", num_cores, 1, malloc=True),
        *(Way(f"{each}, buffers kept, {n} runs vmapped", num_cores, 1, malloc=True, runs=n) for n in (2, 4)),
    ]


def environment(way: Way, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a way's processes: the given one, but for threads and malloc, and the CPU for a platform."""
    kept = {name: value for name, value in given.items() if name not in ("NPROC", *MALLOC)}
    threads = {} if way.threads is None else {"NPROC": str(way.threads)}
    return kept | {"JAX_PLATFORMS": "cpu"} | threads | (MALLOC if way.malloc else {})


def tokens_per_second(way: Way, config_file: Path, seconds: float) -> float:
    """Tokens in a second of all the processes of a way together.

    Raises:
        ProcessFailed: if one of them ends early.
    """
    command = [sys.executable, "-m", "sophia_levanter.benchmarks.stacked_steps", "--config", str(config_file)]
    command += ["--runs", str(way.runs), "--seconds", str(seconds)]
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        processes = []
        for _ in range(way.processes):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(way, os.environ),
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            if _line(process) != READY:
                raise ProcessFailed(_last_line(log))
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        lines = [_line(process) for process in processes]
        if not all(lines):
            raise ProcessFailed(_last_line(log))
    results = [json.loads(line) for line in lines]
    return sum(result["tokens"] / result["seconds"] for result in results)


def _line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    return next(reversed(log.read().strip().splitlines()), "a process ended without a word")


def in_rounds(ways: Sequence[Way], config_file: Path, *, rounds: int, seconds: float) -> np.ndarray:
    """Tokens in a second, [way, round]; each way has its turn once a round."""
    rates = [[tokens_per_second(way, config_file, seconds) for way in ways] for _ in range(rounds)]
    return np.array(rates).T


def rows_of(ways: Sequence[Way], rates: np.ndarray, tokens_of_run: float) -> list[Row]:
    """What each way gives.

    Args:
        ways: the first is what the others are compared with.
        rates: tokens in a second, [way, round].
        tokens_of_run: what a run is trained on.
    """
    return [
        Row(way.name, spread(rate), spread(rate / rates[0]), 3600 * float(np.median(rate)) / tokens_of_run)
        for way, rate in zip(ways, rates, strict=True)
    ]


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> None:
    """Print what each way gives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=Path("config/studies/base.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each way in each round")
    parser.add_argument("--tokens", type=float, default=2e6, help="of a run, for the runs an hour")
    try:
        arguments, config = parse_with_overrides(parser, argv)
        for name in ("rounds", "seconds", "tokens"):
            if not getattr(arguments, name) > 0:
                raise InputError(f"--{name} is {getattr(arguments, name)}; it must be above 0")
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    compared = ways(num_cores())
    with tempfile.TemporaryDirectory() as folder:
        config_file = Path(folder) / "config.yaml"
        config_file.write_text(dump_config(config), encoding="utf-8")
        try:
            rates = in_rounds(compared, config_file, rounds=arguments.rounds, seconds=arguments.seconds)
        except ProcessFailed as error:
            parser.exit(1, f"error: {error}\n")
    model, trainer = config.model, config.trainer
    print(
        f"Plain steps of {trainer.batch_size} x {model.seq_len} tokens ({type(config.optimizer).__name__[:-6]}), "
        f"medians and quartiles over {arguments.rounds} rounds of {arguments.seconds:g} s; a run is "
        f"{arguments.tokens:.3g} tokens, without its start and its validation.\n"
    )
    print(
        markdown_table(
            ["processes", "tokens/s", "over the first", "runs an hour"],
            [
                (r.way, f"{r.tokens.median:.0f} ({r.tokens.low:.0f} to {r.tokens.high:.0f})", r.ratio, f"{r.runs:.1f}")
                for r in rows_of(compared, rates, arguments.tokens)
            ],
        )
    )


if __name__ == "__main__":
    main()
