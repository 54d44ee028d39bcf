"""Doing runs and reading what they left, against processes that only pretend to train."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig
from sophia_levanter.config.command_line import load_config
from sophia_levanter.studies import runner
from sophia_levanter.studies.records import Record, flat_config
from sophia_levanter.studies.runner import Job, RunFailed, do, job_directory, record_of, remove_checkpoints
from sophia_levanter.studies.runs import read_files
from sophia_levanter.studies.sharing import Start
from tiny_runs import FACTS, run_config, write_manifest, write_run

CONFIG = run_config(trainer={"num_train_steps": 4})
# The padded vocabulary, positions, a block's matrices and three norms.
PARAMETERS = 8 * (384 + 10 + 12 * 8 + 3)


def step_line(step: int, loss: float | None, seconds: float, **more: float | None) -> dict:
    return {"step": step, "train/loss": loss, "train/tokens_per_second": 50 / seconds, **more}


METRICS = [
    step_line(0, 5.0, 0.4, **{"optim/win_rate": 0.0}),
    step_line(1, None, 0.1),
    {"step": 1, "validation/loss": 4.0, "validation/bits_per_byte": 6.0},
    step_line(2, 3.0, 0.6, **{"optim/win_rate": 0.5}),
    step_line(3, 2.0, 0.2),
    {"step": 3, "validation/loss": 2.5, "validation/bits_per_byte": 3.5},
]


def read_record(config: TrainConfig, directory: Path, *, diverged: bool) -> Record:
    return record_of(read_files("", directory, config), diverged=diverged)


def test_what_a_finished_run_says(tmp_path):
    write_run(tmp_path, lines=METRICS)
    write_manifest(tmp_path / "checkpoints", 2)
    write_manifest(tmp_path / "checkpoints", 4)
    record = read_record(CONFIG, tmp_path, diverged=False)
    assert record.config == flat_config(CONFIG)
    assert (record.status, record.loss, record.bits_per_byte) == ("done", 2.5, 3.5)
    assert record.validation == [[2, 4.0], [4, 2.5]]
    assert record.training == [[1, 5.0], [2, None], [3, 3.0], [4, 2.0]]
    assert record.win_rate == [[1, 0.0], [3, 0.5]]
    assert record.seconds == [pytest.approx(0.15), pytest.approx(0.5)]
    assert record.parameters == PARAMETERS
    # 6 for each weight of the layer and of the padded vocabulary (257 bytes and end-of-text), and attention's.
    assert record.flops_per_token == 6 * (12 * 8**2 + 384 * 8) + 12 * 8 * 10
    assert record.facts["data"] == FACTS["data"] and record.facts["environment"] == FACTS["environment"]
    assert re.match(r"\d+\.\d+", record.facts["version"])
    json.dumps(record.config)


def test_a_long_run_has_fifty_points(tmp_path):
    config = run_config(optimizer=AdamWConfig(warmup=0), trainer={"num_train_steps": 500})
    write_run(tmp_path, lines=[step_line(i, i / 10, 0.1) for i in range(500)])
    write_manifest(tmp_path / "checkpoints", 500)
    record = read_record(config, tmp_path, diverged=True)
    assert len(record.training) == 50
    assert record.training[0] == [10, pytest.approx(0.45)]
    assert record.training[-1] == [500, pytest.approx(49.45)]
    assert record.win_rate == []
    assert record.seconds[1] is None


def test_a_run_that_was_stopped_has_diverged(tmp_path):
    write_run(tmp_path, lines=METRICS[:4])
    write_manifest(tmp_path / "checkpoints", 3)
    record = read_record(CONFIG, tmp_path, diverged=True)
    assert (record.status, record.loss, record.bits_per_byte) == ("diverged", None, None)
    assert (record.validation, record.parameters) == ([[2, 4.0]], PARAMETERS)


@pytest.mark.parametrize("last", [{"validation/loss": None}, {}])
def test_a_last_loss_that_is_not_finite_is_a_divergence(last, tmp_path):
    """Infinity is null in the metrics, and not-a-number is not there; the loss of an earlier step is no result."""
    write_run(tmp_path, lines=[*METRICS[:5], {"step": 3, **last}])
    write_manifest(tmp_path / "checkpoints", 4)
    record = read_record(CONFIG, tmp_path, diverged=False)
    assert (record.status, record.loss, record.bits_per_byte) == ("diverged", None, None)


def test_a_run_may_diverge_before_its_first_checkpoint(tmp_path):
    write_run(tmp_path, lines=METRICS[:2])
    record = read_record(CONFIG, tmp_path, diverged=True)
    assert (record.status, record.parameters, list(record.facts)) == ("diverged", PARAMETERS, ["version"])


def test_each_configuration_has_a_directory_of_its_own(tmp_path):
    """Also those that make no other run: a run's directory takes no other configuration."""
    assert job_directory(tmp_path, CONFIG) == job_directory(tmp_path, CONFIG)
    changes = ({}, {"seed": 1}, {"evaluate_every": 7})
    directories = {job_directory(tmp_path, run_config(trainer=change)) for change in changes}
    assert len(directories) == 3
    assert all(directory.parent == tmp_path for directory in directories)


PRETEND = """
import json, os, pathlib, signal, sys, time
from sophia_levanter.status import report_failure
metrics = pathlib.Path(sys.argv[1], "metrics.jsonl")
def log(losses, last=None):
    # As a run does it: what stands there is replaced, and then added to.
    metrics.parent.mkdir(exist_ok=True)
    new = metrics.with_name("new")
    new.write_text("")
    new.replace(metrics)
    with metrics.open("a") as file:
        for step, loss in enumerate(losses):
            file.write(json.dumps({"step": step, "train/loss": loss, "train/tokens_per_second": 1.0}) + "\\n")
        if last is not None:
            file.write(json.dumps({"step": 3, "validation/loss": last, "validation/bits_per_byte": last}) + "\\n")
"""


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Jobs are done by this text of Python in place of training; gives the job, and the processes as they come."""
    processes: list[subprocess.Popen] = []
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)

    def plan(text: str) -> tuple[Job, list[subprocess.Popen]]:
        job = Job(CONFIG, tmp_path / "runs" / "job")

        class Popen(subprocess.Popen):
            def __init__(self, command: list[str], **options: object) -> None:
                assert command[1:3] == ["-m", "sophia_levanter.main"] and command[-2:] == ["--resume", "auto"]
                super().__init__([sys.executable, "-c", PRETEND + text, str(job.directory)], **options)
                processes.append(self)

        monkeypatch.setattr(runner.subprocess, "Popen", Popen)
        return job, processes

    yield plan
    for process in processes:
        process.kill()
        process.wait()


def test_a_finished_run_is_recorded_and_its_checkpoints_go(pretend):
    job, _ = pretend("log([5.0] * 4, last=2.0)")
    write_manifest(job.directory / "checkpoints", 4)
    record = do(job)
    remove_checkpoints([job.directory], [])
    assert (record.status, record.loss, record.parameters) == ("done", 2.0, PARAMETERS)
    assert [path.name for path in job.directory.iterdir()] == ["metrics.jsonl"]
    written = load_config(job.directory.with_suffix(".yaml"))
    assert written.trainer.run_dir == str(job.directory)
    assert flat_config(written) == flat_config(CONFIG)


@pytest.mark.parametrize(("step", "every", "wanted"), [(6, 4, 3), (7, 4, 7), (10, 4, None), (None, 4, None)])
def test_a_run_saves_after_the_step_that_it_is_to_keep(step, every, wanted, pretend):
    """At the divisor of the step that is nearest to the usual interval; the last step is saved in any case."""
    job, _ = pretend("log([5.0] * 10, last=2.0)")
    job = dataclasses.replace(job, config=run_config(trainer={"checkpoint_every": every}), keep_step=step)
    do(job)
    written = load_config(job.directory.with_suffix(".yaml")).trainer
    assert (written.checkpoint_every, written.keep_every) == ((wanted, step) if wanted else (every, None))


@pytest.mark.parametrize(("saved", "stays"), [([3, 4], True), ([2, 4], False)])
def test_a_checkpoint_stays_for_a_longer_run_until_that_is_done(saved, stays, pretend):
    job, _ = pretend("log([5.0] * 4, last=2.0)")
    for step in saved:
        write_manifest(job.directory / "checkpoints", step)
    job = dataclasses.replace(job, keep_step=3)
    assert "shared_steps" not in do(job).facts
    longer = Job(job.config, job.directory.with_name("longer"), start=Start(job.directory, 3))
    write_manifest(longer.directory / "checkpoints", 1)
    remove_checkpoints([job.directory, longer.directory], [longer])
    assert (job.directory / "checkpoints").exists() == stays
    assert (longer.directory / "checkpoints").exists()
    shorter = job.directory.rename(job.directory.with_name("shorter"))
    job.directory.mkdir()
    (job.directory / "shared_steps").write_text("3\n")
    job = dataclasses.replace(job, start=Start(shorter, 3))
    assert do(job).facts["shared_steps"] == 3
    remove_checkpoints([shorter, job.directory], [])
    assert not (shorter / "checkpoints").exists()


def test_a_run_whose_record_was_not_written_is_taken_over(pretend):
    """Its checkpoint is there until then: the run has nothing left to do, and tells the same once more."""
    job, _ = pretend("if not metrics.exists(): log([5.0] * 4, last=2.0)")
    write_manifest(job.directory / "checkpoints", 4)
    record = do(job)
    assert record.facts["data"] == FACTS["data"]
    assert do(job) == record


def test_a_run_is_told_its_threads(pretend):
    job, _ = pretend("log([1.0], last=float(os.environ['NPROC']))")
    assert do(Job(job.config, job.directory, threads=3)).loss == 3.0


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ("report_failure('bad_input', 'data.train is empty'); sys.exit('words for people')", "data.train is empty"),
        ("print('model: GPT-2'); sys.exit('error: the disk is full')", "error: the disk is full"),
    ],
    ids=["reported", "printed only"],
)
def test_a_run_that_fails_says_why(failing, said, pretend):
    job, _ = pretend(failing)
    with pytest.raises(RunFailed) as caught:
        do(job)
    assert str(caught.value) == f"{job.directory.with_suffix('.log')}: {said}"


def test_a_run_that_dies_silently_has_a_status(pretend):
    job, _ = pretend("sys.exit(3)")
    with pytest.raises(RunFailed, match=r"job\.log: exit status 3$"):
        do(job)


def test_a_run_that_gives_up_has_diverged(pretend):
    job, _ = pretend("log([5.0, None]); report_failure('loss_not_finite', 'in 10 steps in a row'); sys.exit(1)")
    record = do(job)
    assert (record.status, record.loss) == ("diverged", None)


def test_a_run_that_gives_up_for_spikes_has_failed(pretend):
    job, _ = pretend("report_failure('loss_spikes', 'the loss spiked, and is not finite'); sys.exit(1)")
    with pytest.raises(RunFailed, match="the loss spiked"):
        do(job)


def test_a_run_that_diverges_is_stopped(pretend):
    job, processes = pretend("log([5.0] * 50 + [7.0] * 50); time.sleep(600)")
    assert do(job).status == "diverged"
    assert processes[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize("lines", [100, 3])
def test_what_an_attempt_before_left_is_not_this_run(lines, pretend):
    """Its metrics stand there until the run replaces them, and need not end where the new lines begin."""
    job, _ = pretend("time.sleep(0.3); log([5.0] * 100, last=2.0); time.sleep(0.3)")
    write_run(job.directory, lines=[step_line(i, 5.0 if i < 50 else 9.0, 0.123) for i in range(lines)])
    assert do(job).loss == 2.0


def test_a_run_that_rolls_back_is_read_from_the_start(pretend):
    """It replaces its metrics with a shorter file, in which an old position may lie in the middle of a line."""
    job, _ = pretend("log([5.25] * 20); time.sleep(0.3); log([5.0] * 4); time.sleep(0.3); log([5.0] * 90, last=2.0)")
    assert do(job).loss == 2.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_interrupted_stops_the_run_and_lets_it_save(number, pretend):
    """The run itself must not get the signal of its whole group besides: the second would end it without saving."""
    job, processes = pretend("""
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, frame: got.append(n))
log([5.0])
while not got:
    time.sleep(0.01)
time.sleep(0.3)
(metrics.parent / "saved").write_text(repr([int(n) for n in got]))
""")

    def interrupt() -> None:
        while not (job.directory / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, stop)
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            do(job)
    finally:
        thread.join()
        signal.signal(number, before)
    assert processes[0].returncode == 0
    assert (job.directory / "saved").read_text() == repr([int(signal.SIGTERM)])


def test_a_second_interruption_kills_the_run(pretend):
    job, processes = pretend("signal.signal(signal.SIGTERM, signal.SIG_IGN); log([5.0]); time.sleep(600)")

    def check_stop() -> None:
        if (job.directory / "metrics.jsonl").exists():
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGUSR1]).start()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            do(job, check_stop)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert processes[0].wait() == -signal.SIGKILL


def test_a_run_is_in_no_group_of_ours(pretend):
    job, _ = pretend("log([5.0], last=float(os.getpgid(0) == os.getpid()))")
    assert do(job).loss == 1.0
