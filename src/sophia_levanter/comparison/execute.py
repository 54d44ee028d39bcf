"""Doing jobs one after the other here, or as Ray tasks of one core each."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

from sophia_levanter.comparison.records import Record
from sophia_levanter.comparison.runner import POLL_SECONDS, Job, RunFailed, do
from sophia_levanter.errors import InputError

Result = tuple[int, Record | RunFailed]
CANCEL_SECONDS = 60


def one_by_one(jobs: Sequence[Job]) -> Generator[Result, None, None]:
    """The index of each job with its record or its failure, in order; each has all cores."""
    for index, job in enumerate(jobs):
        yield index, _attempt(job)


def as_ray_tasks(jobs: Sequence[Job], stopped: Callable[[], bool]) -> Generator[Result, None, None]:
    """The same in the order in which they end; as many at a time as Ray has cores, with one thread each.

    Small models gain: two runs of one thread do more steps than one run of two. On a cluster of several machines they
    must see the same files. Ray is started here unless RAY_ADDRESS names a cluster.

    Args:
        jobs: what to do.
        stopped: whether a signal has come. An exception that its handler raises inside Ray can be lost there.

    Raises:
        KeyboardInterrupt: if one has; the tasks have ended then.
        InputError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray; install sophia-levanter[cluster]") from None
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    stop = signal.getsignal(signal.SIGTERM)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    # Ray puts in its own, which ends with another exit status.
    signal.signal(signal.SIGTERM, stop)
    attempt = ray.remote(num_cpus=1, max_retries=0)(_task)
    pending = {attempt.remote(replace(job, threads=1)): index for index, job in enumerate(jobs)}
    try:
        while pending:
            done, _ = ray.wait(list(pending), timeout=POLL_SECONDS)
            if stopped():
                raise KeyboardInterrupt
            for task in done:
                yield pending.pop(task), ray.get(task)
    finally:
        for task in pending:
            ray.cancel(task)
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=CANCEL_SECONDS)
        ray.shutdown()


def _task(job: Job) -> Record | RunFailed:
    # Ray cancels by SIGINT, which a shell ignores for what it runs in the background, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return _attempt(job)


def _attempt(job: Job) -> Record | RunFailed:
    try:
        return do(job)
    except RunFailed as failure:
        return failure
