"""Train the runs of a study, each in its own `sophia_levanter.main` process, as a user would.

The runs are trained one after another, or as Ray tasks with one core each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sophia_levanter import checkpoint
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import dump_config
from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.corpora import prepare
from sophia_levanter.data.token_store import Tokens, TokenStore, digest_of
from sophia_levanter.errors import InputError, counted, one_line
from sophia_levanter.files import lock
from sophia_levanter.run.directory import LOCK_NAME, RunDirectory
from sophia_levanter.status import VARIABLE, Failure, read_status
from sophia_levanter.studies.records import Record, flat_config
from sophia_levanter.studies.runs import FACTS, Run, Series, has_diverged, read_files
from sophia_levanter.studies.sharing import SHARED_STEPS, Start, begin, find_starts, steps_taken_over
from sophia_levanter.training.stopping import StopRequest

POINTS = 50  # entries in a record's training curve
POLL_SECONDS = 1.0
CANCEL_SECONDS = 60


class RunFailed(Exception):
    """A run ended without a result. The message contains the error message of the run."""


@dataclass(frozen=True)
class Job:
    """A run to train.

    Attributes:
        config: the run's configuration.
        directory: the run directory, from which an interrupted run is resumed.
        threads: number of compute threads in the process; None for one thread per core.
        start: the steps to reuse from a shorter run; None to train from scratch.
        keep_step: the step at which to keep a checkpoint for a longer run; None to keep no checkpoint.
    """

    config: TrainConfig
    directory: Path
    threads: int | None = None
    start: Start | None = None
    keep_step: int | None = None


Result = tuple[int, Record | RunFailed]
CheckStop = Callable[[], None]


def job_directory(folder: Path, config: TrainConfig) -> Path:
    """Return the directory of a run. Its name is derived from the configuration, so a resumed study can find it."""
    return folder / hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]


def jobs_of(
    configs: Sequence[TrainConfig], missing: Sequence[TrainConfig], folder: Path, say: Callable[[str], None]
) -> list[Job]:
    """Create jobs for the runs without a record, in order. Runs of different lengths share steps if possible.

    Args:
        configs: the configurations of all runs in a study, shorter runs first.
        missing: the configurations without a record.
        folder: the folder that contains the run directories.
        say: prints messages about shared steps and about runs that start over.
    """
    # Leave the accelerators to the runs, which use separate processes.
    jax.config.update("jax_platforms", "cpu")
    places = {job_directory(folder, config): config for config in configs}
    to_do = [job_directory(folder, config) for config in missing]
    for directory in to_do:
        _set_aside(directory, places[directory], say)
    found, hindrance = find_starts(places)
    # If the shorter run finished earlier, its checkpoint may have been removed.
    starts = {
        directory: start
        for directory in to_do
        if (start := found.get(directory)) is not None
        and (not directory.exists() or steps_taken_over(directory))  # otherwise, it has already started from step 0
        and (start.directory in to_do or start.is_saved or steps_taken_over(directory))
    }
    kept = {start.directory: start.step for start in starts.values()}
    if starts:
        steps = sum(start.step for start in starts.values())
        runs = counted(len(starts), "run")
        say(f"{runs} will start from a shorter run's checkpoint, reusing {counted(steps, 'step')}")
    if hindrance:
        say(hindrance)
    return [Job(places[path], path, start=starts.get(path), keep_step=kept.get(path)) for path in to_do]


def _set_aside(directory: Path, config: TrainConfig, say: Callable[[str], None]) -> None:
    """Rename the directory of a run that has neither a record nor a checkpoint, so that the run can start over."""
    left = RunDirectory(directory, "never", config.trainer.checkpoint_dir)
    if not left.metrics_file.exists() or checkpoint.steps(left.checkpoints):
        return
    held = lock(directory / LOCK_NAME)
    if held is not None:  # otherwise, another process is training the run
        aside = directory.with_name(f"{directory.name}.old")
        with held:
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)
        say(
            one_line(
                f"{directory} had neither a record nor a checkpoint; it was renamed to {aside.name}, and the run "
                "starts again"
            )
        )


def digests(config: DataConfig) -> dict[str, str]:
    """Compute digests of the training and validation tokens, keyed by field name. Prepare tokens that are missing.

    Raises:
        InputError: if the training or validation text is missing or empty.
    """
    data = prepare(config, lambda line: print(one_line(line), flush=True))
    only = data.validation if "" in data.validation_sets else None
    return {"train": _digest(data.train, data.train.facts), "validation": _digest(only, data.validation_facts)}


def _digest(corpus: Tokens | None, facts: Mapping[str, Any]) -> str:
    return corpus.manifest.digest if isinstance(corpus, TokenStore) else digest_of(json.dumps(facts).encode())


def one_by_one(jobs: Sequence[Job], check_stop: CheckStop = lambda: None) -> Generator[Result, None, None]:
    """Run jobs in order, each on all cores. Yield the index of each job together with its record or failure.

    Args:
        jobs: the jobs.
        check_stop: called before and during each job. If it raises an exception, the job stops.
    """
    results: dict[Path, Record | RunFailed] = {}
    for index, job in enumerate(jobs):
        check_stop()
        results[job.directory] = _attempt(job, check_stop, *_result_before(job, results))
        yield index, results[job.directory]


def as_ray_tasks(jobs: Sequence[Job], check_stop: CheckStop) -> Generator[Result, None, None]:
    """Run jobs as Ray tasks with one thread each, as many in parallel as Ray has cores. Yield results as they arrive.

    This is faster for small models: two runs with one thread each take more steps in the same time than one run with
    two threads. All machines in a cluster must have access to the same files. Ray is started on this machine unless
    RAY_ADDRESS specifies a cluster.

    Args:
        jobs: the jobs.
        check_stop: called regularly. If it raises an exception, the tasks are stopped. It is needed because exceptions
            raised by signal handlers while Ray code is running can be lost.

    Raises:
        InputError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--ray requires Ray; install sophia-levanter[cluster]") from None
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    stop = signal.getsignal(signal.SIGTERM)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    # Replace Ray's own handler, which exits with a different status.
    signal.signal(signal.SIGTERM, stop)
    attempt = ray.remote(num_cpus=1, max_retries=0)(_task)
    tasks: dict[Path, Any] = {}
    for job in jobs:
        # Ray starts a task once its arguments are available.
        tasks[job.directory] = attempt.remote(replace(job, threads=1), *_result_before(job, tasks))
    pending = {task: index for index, task in enumerate(tasks.values())}
    try:
        while pending:
            done, _ = ray.wait(list(pending), timeout=POLL_SECONDS)
            for task in done:
                yield pending.pop(task), ray.get(task)
            check_stop()
    finally:
        for task in pending:
            ray.cancel(task)
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=CANCEL_SECONDS)
        ray.shutdown()


def _result_before(job: Job, results: Mapping[Path, Any]) -> list[Any]:
    """Return a list with the result of the shorter run that a job depends on, or an empty list if there is none."""
    return [results[job.start.directory]] if job.start and job.start.directory in results else []


def _task(job: Job, before: Record | RunFailed | None = None) -> Record | RunFailed:
    # Ray cancels tasks with SIGINT. Handle it even if it was ignored before, as in commands that a shell runs in the
    # background. A second SIGINT must not prevent the run from saving.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = StopRequest(signals=[signal.SIGINT])
    try:
        return _attempt(job, stop.check, before)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _attempt(job: Job, check_stop: CheckStop, before: Record | RunFailed | None = None) -> Record | RunFailed:
    if isinstance(before, RunFailed):
        return RunFailed(f"{job.directory} was not started, because it depends on a shorter run that failed")
    try:
        return do(job, check_stop)
    except RunFailed as failure:
        return failure


def do(job: Job, check_stop: CheckStop = lambda: None) -> Record:
    """Train one run until it ends or diverges. Its checkpoints are kept until `remove_checkpoints` is called.

    Args:
        job: the run.
        check_stop: called regularly. If it raises an exception, the run saves its state and stops. A second exception
            kills the run.

    Raises:
        RunFailed: if the process failed.
    """
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    trainer = replace(job.config.trainer, run_dir=str(job.directory), **_saving(job))
    config = replace(job.config, trainer=trainer)
    if job.start is not None:
        begin(job.start, config, job.directory)
    config_file = job.directory.with_suffix(".yaml")
    config_file.write_text(dump_config(config), encoding="utf-8")
    log, metrics = job.directory.with_suffix(".log"), job.directory / "metrics.jsonl"
    stale = _inode(metrics)
    # Variables that limit the number of threads in XLA, and in LAPACK when it is called by XLA.
    limits = ("NPROC", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    with log.open("w") as output, tempfile.TemporaryFile("w+") as status:
        process = subprocess.Popen(
            [sys.executable, "-m", "sophia_levanter.main", "--config", str(config_file), "--resume", "auto"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Without this, Ctrl-C would also reach the run, and a second signal would end it without saving.
            process_group=0,
            env=os.environ
            | {VARIABLE: str(status.fileno())}
            | ({} if job.threads is None else dict.fromkeys(limits, str(job.threads))),
            pass_fds=[status.fileno()],
        )
        try:
            diverged = _watch(process, metrics, stale, check_stop)
        except BaseException:
            # Let the run save its state, from which the study can continue later.
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        finally:
            process.kill()  # does nothing, unless a second exception ended the wait
        status.seek(0)
        failures = [found for line in status if isinstance(found := read_status(line.rstrip()), Failure)]
    if not diverged and process.returncode != 0:
        if not any(failure.reason == "loss_not_finite" for failure in failures):
            messages = [failure.message for failure in failures] or log.read_text(errors="replace").strip().splitlines()
            raise RunFailed(f"{log}: {messages[-1] if messages else f'exit status {process.returncode}'}")
        diverged = True
    return record_of(read_files(job.directory.name, job.directory, config), diverged=diverged)


def remove_checkpoints(directories: Iterable[Path], left: Collection[Job]) -> None:
    """Remove the checkpoints that are no longer needed. Call this whenever a new record has been written.

    Args:
        directories: the directories of the runs in a study.
        left: the jobs that do not have a record yet.
    """
    needed = {job.directory for job in left}
    needed |= {job.start.directory for job in left if job.start is not None and job.start.is_saved}
    for directory in set(directories) - needed:
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def _saving(job: Job) -> dict[str, Any]:
    """Return settings that make a run save after `keep_step`, and otherwise about as often as configured."""
    step, trainer = job.keep_step, job.config.trainer
    if step is None or step == trainer.num_train_steps:
        return {}
    divisors = [number for number in range(1, step + 1) if step % number == 0]
    every = min(divisors, key=lambda number: abs(math.log(number / trainer.checkpoint_interval)))
    return {"checkpoint_every": every, "keep_every": step}


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _watch(process: subprocess.Popen, metrics: Path, stale: int | None, check_stop: CheckStop) -> bool:
    """Wait for the process to end, or stop it if the run has diverged. Return whether the run has diverged.

    A metrics file with the inode `stale` is from an earlier attempt; the process replaces it when the run resumes.
    """
    losses: list[float] = []
    position, before = 0, None
    while process.poll() is None:
        for _ in range(10):  # poll often, so that a second signal can interrupt the wait
            check_stop()
            time.sleep(POLL_SECONDS / 10)
        if (inode := _inode(metrics)) in (None, stale):
            continue
        if inode != before:  # a run that rolls back replaces the file with a shorter one
            losses, position, before = [], 0, inode
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


def record_of(run: Run, *, diverged: bool) -> Record:
    """Create the record of a run.

    Args:
        run: the run, as read from its directory.
        diverged: whether the run was stopped because it diverged. A run without a finite final validation loss is also
            considered diverged.
    """
    nothing = Series(np.zeros(0, np.int64), np.zeros(0))
    validation, training, win_rate = (
        run.series.get(name, nothing) for name in ("validation/loss", "train/loss", "optim/win_rate")
    )
    loss = _at_the_end(run, "validation/loss")
    diverged = diverged or loss is None
    return Record(
        config=flat_config(run.config),
        status="diverged" if diverged else "done",
        loss=None if diverged else loss,
        bits_per_byte=None if diverged else _at_the_end(run, "validation/bits_per_byte"),
        validation=[[int(s), _finite(float(v))] for s, v in zip(validation.steps, validation.values, strict=True)],
        training=_means(training, max(1, run.total_steps // POINTS)),
        win_rate=_means(win_rate, max(1, len(win_rate.steps) // POINTS)),
        seconds=_step_seconds(run, refreshes=win_rate.steps),
        parameters=run.parameters or 0,
        flops_per_token=run.flops_per_token or 0.0,
        facts={name: run.facts[name] for name in FACTS if name in run.facts}
        | {"version": version("sophia-levanter")}
        | ({SHARED_STEPS: steps} if (steps := steps_taken_over(run.path)) else {}),
    )


def _at_the_end(run: Run, name: str) -> float | None:
    series = run.series.get(name)
    return _finite(series.last) if series is not None and series.steps[-1] == run.total_steps else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _means(series: Series, size: int) -> list[list[float | None]]:
    """Return the last step and the mean of the finite values for each group of `size` points."""
    curve: list[list[float | None]] = []
    for start in range(0, len(series.steps), size):
        values = series.values[start : start + size]
        known = values[np.isfinite(values)]
        step = int(series.steps[start : start + size][-1])
        curve.append([step, round(float(known.mean()), 5) if known.size else None])
    return curve


def _step_seconds(run: Run, refreshes: np.ndarray) -> list[float | None]:
    """Return the median seconds of steps without a refresh and of steps with a refresh."""
    if run.rates is None:
        return [None, None]
    seconds = run.config.trainer.batch_size * run.config.model.seq_len / run.rates.values
    refresh = np.isin(run.rates.steps, refreshes)
    return [round(float(np.median(kind)), 6) if kind.size else None for kind in (seconds[~refresh], seconds[refresh])]
