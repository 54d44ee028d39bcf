"""Doing the runs of a study: each is a process of `sophia_levanter.main`, so a comparison tests what users run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sophia_levanter import checkpoint
from sophia_levanter.comparison.records import Record, flat_config
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import dump_config
from sophia_levanter.data.tokenizer import load_tokenizer
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.tracking.jsonl import read_records

# A run whose training loss is this many nats above its lowest, over as many steps, will not come back in time.
DIVERGED_NATS, DIVERGED_STEPS = 1.0, 50
POINTS = 50  # entries of a record's training curve
POLL_SECONDS = 1.0
FACTS = ("environment", "data", "validation")  # of a run's checkpoint that go into its record


def threads_environment(threads: int) -> dict[str, str]:
    """What keeps a process to a number of threads: XLA's, and those of LAPACK, where XLA calls it."""
    return {name: str(threads) for name in ("NPROC", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}


class RunFailed(Exception):
    """A run ended without a result; the message is its own."""


@dataclass(frozen=True)
class Job:
    """One run to do.

    Attributes:
        config: the run's configuration.
        directory: where it goes; a run that was cut short goes on from what is there.
        threads: how many threads its process computes with; None for one a core.
    """

    config: TrainConfig
    directory: Path
    threads: int | None = None


def job_directory(folder: Path, config: TrainConfig) -> Path:
    """The directory of a run, by its configuration: where an interrupted study finds it again."""
    return folder / hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]


def do(job: Job) -> Record:
    """Train one run to its end, or until it has diverged.

    Raises:
        RunFailed: if the process ended otherwise.
    """
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    config = replace(job.config, trainer=replace(job.config.trainer, run_dir=str(job.directory)))
    config_file = job.directory.with_suffix(".yaml")
    config_file.write_text(dump_config(config), encoding="utf-8")
    log, metrics = job.directory.with_suffix(".log"), job.directory / "metrics.jsonl"
    stale = _inode(metrics)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sophia_levanter.main", "--config", str(config_file), "--resume", "auto"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # ^C of a terminal would reach the run too, and a second signal ends it without saving.
            process_group=0,
            env=os.environ | ({} if job.threads is None else threads_environment(job.threads)),
        )
        try:
            diverged = _watch(process, metrics, stale)
        except BaseException:
            # The run saves where it is, and the study goes on from there.
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    if not diverged and process.returncode != 0:
        message = log.read_text(errors="replace").strip().splitlines()[-1:]
        if not (message and "not finite" in message[0]):
            said = message[0].removeprefix("error: ") if message else f"exit status {process.returncode}"
            raise RunFailed(f"{log}: {said}")
        diverged = True
    record = read_run(config, job.directory, diverged=diverged)
    shutil.rmtree(job.directory / "checkpoints", ignore_errors=True)
    return record


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _watch(process: subprocess.Popen, metrics: Path, stale: int | None) -> bool:
    """Wait for the process to end; stop it if the run has diverged, and say so.

    The process replaces a metrics file of an attempt before, `stale`, by the part that it goes on from.
    """
    losses: list[float] = []
    position = 0
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if _inode(metrics) in (None, stale):
            continue
        with metrics.open() as file:
            file.seek(position)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break
                position += len(line)
                losses += [math.inf if v is None else v for k, v in json.loads(line).items() if k == "train/loss"]
        if has_diverged(losses):
            process.send_signal(signal.SIGTERM)
            process.wait()
            return True
    return False


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the mean training loss of the last steps is far above the lowest mean before.

    A single step whose loss is not finite changes nothing, and many in a row end the run by themselves.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    means = [
        statistics.fmean(finite[i : i + DIVERGED_STEPS])
        for i in range(0, len(finite) - DIVERGED_STEPS + 1, DIVERGED_STEPS)
    ]
    return len(means) > 1 and means[-1] > min(means) + DIVERGED_NATS


def read_run(config: TrainConfig, directory: Path, *, diverged: bool) -> Record:
    """What a run's files say of it.

    Args:
        config: its configuration.
        directory: its run directory, checkpoints included.
        diverged: whether it was stopped; it also has if its last validation loss is not finite.
    """
    lines = list(read_records(directory / "metrics.jsonl"))

    def series(name: str) -> list[list[float | None]]:
        return [[line["step"] + 1, line[name]] for line in lines if name in line]

    steps = config.trainer.num_train_steps
    validation = series("validation/loss")
    last = {key: value for line in lines if line["step"] + 1 == steps for key, value in line.items()}
    loss, bits = last.get("validation/loss"), last.get("validation/bits_per_byte")
    diverged = diverged or loss is None
    every = max(1, steps // POINTS)
    rates = series("optim/win_rate")
    saved = checkpoint.steps(directory / "checkpoints")
    manifest = checkpoint.read_step(directory / "checkpoints", saved[-1]) if saved else None
    arrays = [] if manifest is None else manifest.arrays
    facts = {} if manifest is None else {name: manifest.metadata[name] for name in FACTS}
    return Record(
        config=flat_config(config),
        status="diverged" if diverged else "done",
        loss=None if diverged else loss,
        bits_per_byte=None if diverged else bits,
        validation=validation,
        training=[_mean(chunk) for chunk in _chunks(series("train/loss"), every)],
        win_rate=[_mean(chunk) for chunk in _chunks(rates, max(1, len(rates) // POINTS))],
        seconds=_step_seconds(config, lines),
        parameters=sum(math.prod(array.shape) for array in arrays if array.path.startswith("model.")),
        flops_per_token=abstract_model(config.model, load_tokenizer(config.data.tokenizer).vocab_size).flops_per_token,
        facts=facts | {"version": version("sophia-levanter")},
    )


def _chunks(values: list, size: int) -> Iterator[list]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _mean(chunk: list[list[float | None]]) -> list[float | None]:
    values = [value for _, value in chunk if value is not None]
    return [chunk[-1][0], round(statistics.fmean(values), 5) if values else None]


def _step_seconds(config: TrainConfig, lines: list[dict[str, Any]]) -> list[float | None]:
    tokens = config.trainer.batch_size * config.model.seq_len
    plain: list[float] = []
    refresh: list[float] = []
    for line in lines:
        if rate := line.get("train/tokens_per_second"):
            (refresh if "optim/win_rate" in line else plain).append(tokens / rate)
    return [round(statistics.median(kind), 6) if kind else None for kind in (plain, refresh)]
