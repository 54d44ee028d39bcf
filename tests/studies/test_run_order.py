"""When the runs of a study are done: one after the other or as Ray tasks, and longer ones after shorter ones."""

import dataclasses
import sys
import time
import types

import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.errors import InputError
from sophia_levanter.studies import runner
from sophia_levanter.studies.runner import CheckStop, Job, RunFailed, as_ray_tasks, one_by_one
from sophia_levanter.studies.sharing import Start


def test_a_run_that_fails_does_not_stop_the_others(monkeypatch, make_record, tmp_path):
    jobs = [Job(TrainConfig(), tmp_path / name) for name in "abc"]
    records = {"a": make_record(loss=1.0), "c": make_record(loss=None)}
    started = []

    def do(job: Job, check_stop: CheckStop):
        started.append(job)
        if job.directory.name not in records:
            raise RunFailed("no text")
        return records[job.directory.name]

    monkeypatch.setattr(runner, "do", do)
    results = one_by_one(jobs)
    assert next(results) == (0, records["a"]) and started == jobs[:1], "a result is given before the next run starts"
    (second, failure), third = results
    assert (second, str(failure)) == (1, "no text") and isinstance(failure, RunFailed)
    assert third == (2, records["c"]) and started == jobs


def test_a_longer_run_is_not_started_where_the_shorter_one_failed(monkeypatch, make_record, tmp_path):
    jobs = [Job(TrainConfig(), tmp_path / name) for name in "abc"]
    jobs[1] = dataclasses.replace(jobs[1], start=Start(tmp_path / "a", 3))
    jobs[2] = dataclasses.replace(jobs[2], start=Start(tmp_path / "done_before", 3))
    started = []

    def do(job: Job, check_stop: CheckStop):
        started.append(job.directory.name)
        if job.directory.name == "a":
            raise RunFailed("no text")
        return make_record()

    monkeypatch.setattr(runner, "do", do)
    _, (index, failure), (_, record) = one_by_one(jobs)
    assert index == 1 and isinstance(failure, RunFailed)
    assert str(failure) == f"{tmp_path}/b was not started, because it depends on a shorter run that failed"
    assert record == make_record() and started == ["a", "c"]


class FakeRay:
    """Does a task when its result is asked for, after those whose results it takes; the last one seems done first."""

    def __init__(self) -> None:
        self.results: dict[object, object] = {}
        self.tasks: dict[object, tuple] = {}
        self.init = self.shutdown = lambda **options: None

    def remote(self, **options: object) -> object:
        def start(function):
            def remote(*arguments):
                self.tasks[task := object()] = (function, arguments)
                return task

            return types.SimpleNamespace(remote=remote)

        return start

    def wait(self, pending: list[object], **options: object) -> tuple[list[object], list[object]]:
        return pending[-1:], pending[:-1]

    def get(self, task: object) -> object:
        if task not in self.results:
            function, arguments = self.tasks[task]
            taken = [self.get(argument) if type(argument) is object else argument for argument in arguments]
            self.results[task] = function(*taken)
        return self.results[task]


def test_a_longer_run_is_a_task_that_waits_for_the_shorter_one(monkeypatch, make_record, tmp_path):
    jobs = [Job(TrainConfig(), tmp_path / name) for name in "ab"]
    jobs[1] = dataclasses.replace(jobs[1], start=Start(tmp_path / "a", 3))
    started = []
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    monkeypatch.setattr(runner, "do", lambda job, check_stop: (started.append(job.directory.name), make_record())[1])
    assert [index for index, _ in as_ray_tasks(jobs, lambda: None)] == [1, 0]
    assert started == ["a", "b"]


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"install sophia-levanter\[cluster\]"):
        next(as_ray_tasks([Job(TrainConfig(), tmp_path)], lambda: None))


@pytest.mark.slow
def test_a_signal_that_ray_swallowed_stops_the_tasks_all_the_same(tmp_path, monkeypatch):
    def endless(job: Job) -> None:
        while True:
            time.sleep(0.1)

    monkeypatch.setattr(runner, "_task", endless)
    stop_at = time.monotonic() + 15

    def check_stop() -> None:
        if time.monotonic() > stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(as_ray_tasks([Job(TrainConfig(), tmp_path)], check_stop))
