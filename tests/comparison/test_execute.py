"""Doing jobs in order; Ray's tasks are in tests/commands/test_compare.py."""

import sys
import time

import pytest

from sophia_levanter.comparison import execute
from sophia_levanter.comparison.execute import as_ray_tasks, one_by_one
from sophia_levanter.comparison.runner import Job, RunFailed
from sophia_levanter.config import TrainConfig
from sophia_levanter.errors import InputError


def test_a_run_that_fails_does_not_stop_the_others(monkeypatch, make_record, tmp_path):
    jobs = [Job(TrainConfig(), tmp_path / name) for name in "abc"]
    records = {"a": make_record(loss=1.0), "c": make_record(loss=None)}
    started = []

    def do(job: Job):
        started.append(job)
        if job.directory.name not in records:
            raise RunFailed("no text")
        return records[job.directory.name]

    monkeypatch.setattr(execute, "do", do)
    results = one_by_one(jobs)
    assert next(results) == (0, records["a"]) and started == jobs[:1], "a result is given before the next run starts"
    (second, failure), third = results
    assert (second, str(failure)) == (1, "no text") and isinstance(failure, RunFailed)
    assert third == (2, records["c"]) and started == jobs


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"install sophia-levanter\[cluster\]"):
        next(as_ray_tasks([Job(TrainConfig(), tmp_path)], lambda: False))


@pytest.mark.slow
def test_a_signal_that_ray_swallowed_stops_the_tasks_all_the_same(tmp_path, monkeypatch):
    def endless(job: Job) -> None:
        while True:
            time.sleep(0.1)

    monkeypatch.setattr(execute, "_task", endless)
    stop_at = time.monotonic() + 15
    with pytest.raises(KeyboardInterrupt):
        next(as_ray_tasks([Job(TrainConfig(), tmp_path)], lambda: time.monotonic() > stop_at))
