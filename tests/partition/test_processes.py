"""Runs of several real processes, which find each other by `jax.distributed` and talk through gloo."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from fake_gcs import FakeGcs, serving
from sophia_levanter import checkpoint
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.errors import InputError
from sophia_levanter.partition import processes as processes_module
from sophia_levanter.partition.processes import Processes

pytestmark = pytest.mark.timeout(600)


def start(arguments, devices, folder=None):
    """A training process with so many devices of its own, in a folder."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "sophia_levanter.main", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_two(arguments, of_second=()):
    """Two processes of one run, with two devices each, and what the second has besides."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    mesh = ["--mesh.coordinator", address, "--mesh.num_processes", "2"]
    return [
        start([*arguments, *mesh, "--mesh.process_id", str(i), *(of_second if i else ())], devices=2) for i in range(2)
    ]


def ended(processes):
    try:
        results = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *result) for process, result in zip(processes, results, strict=True)]


def losses(run_dir, name="train/loss"):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return np.array([line[name] for line in lines if name in line])


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on(config_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["--config", str(config_file), "--mesh.fsdp", "embed", "--trainer.sample_tokens", "3"]
    results = ended([start([*common, "--trainer.run_dir", str(one)], devices=4)])
    # Both save after every step, by the clock of the first.
    often = ["--trainer.checkpoint_minutes", "1e-6", "--trainer.keep_checkpoints", "12"]
    results += ended(start_two([*common, *often, "--trainer.run_dir", str(two)]))
    assert [status for status, _, _ in results] == [0, 0, 0], results
    assert checkpoint.steps(two / "checkpoints") == list(range(1, 13))
    np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses(two, "validation/loss"), losses(one, "validation/loss"), rtol=0, atol=1e-5)
    # The second process has nothing to say.
    assert "4 cpu devices, data 4, embed over data" in results[1][1]
    samples = [said[said.index("sample (prompt in brackets)") :].splitlines()[1] for _, said, _ in results[:2]]
    assert samples[0] == samples[1]
    assert results[2][1].replace("[Gloo]", "").count("step ") == 0

    # What two saved, one takes up on another mesh, and two take up what one saved.
    more = ["--trainer.num_train_steps", "16"]
    on_one = ended([start(["--resume", str(two), "--mesh.coordinator", "null", *ALONE, *more], devices=1)])
    on_two = ended(start_two(["--resume", str(one), *more]))
    assert [status for status, _, _ in on_one + on_two] == [0, 0, 0], (on_one, on_two)
    assert len(losses(two)) == 16
    np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1e-5)


ALONE = ["--mesh.num_processes", "null", "--mesh.process_id", "null"]


@pytest.mark.slow
def test_two_processes_start_from_the_weights_of_a_file(config_file, gpt2_folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["--config", str(config_file), "--mesh.fsdp", "embed", "--model.use_bias", "true"]
    common += ["--trainer.initial_weights", str(gpt2_folder), "--trainer.num_train_steps", "3"]
    results = ended([start([*common, "--trainer.run_dir", str(one)], devices=4)])
    results += ended(start_two([*common, "--trainer.run_dir", str(two)]))
    assert [status for status, _, _ in results] == [0, 0, 0], results
    np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_measure_named_sets_and_tasks_as_one(config_file, text_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    questions = [{"goal": f"Line {i}", "sol1": "says that", "sol2": "is", "label": i % 2} for i in range(40)]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "other.txt").write_text("Some other text.\n" * 40)
    sets = ["--data.validation.lines", str(text_file), "--data.validation.other", str(tmp_path / "other.txt")]
    tasks = ["--trainer.tasks", f"[{{task: piqa, file: {tmp_path}/piqa.jsonl}}]", "--trainer.best_by", "other"]
    common = ["--config", str(config_file), *sets, *tasks, "--trainer.num_train_steps", "3"]
    results = ended([start([*common, "--trainer.run_dir", str(one)], devices=4)])
    results += ended(start_two([*common, "--trainer.run_dir", str(two)]))
    assert [status for status, _, _ in results] == [0, 0, 0], results
    for name in ("validation/loss", "validation/lines/loss", "validation/other/loss", "tasks/piqa/accuracy"):
        assert len(losses(one, name))
        np.testing.assert_allclose(losses(two, name), losses(one, name), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "statuses"), [(signal.SIGTERM, [75, 75]), (signal.SIGINT, [75, 130])])
def test_a_signal_to_one_process_stops_all_after_the_same_step(number, statuses, config_file, tmp_path):
    run_dir = tmp_path / "run"
    processes = start_two(
        ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--trainer.num_train_steps", "100000"]
    )
    wait_for_steps(run_dir, 5, processes)
    processes[1].send_signal(number)
    results = ended(processes)
    assert [status for status, _, _ in results] == statuses, results
    steps = losses(run_dir, "step")
    saved = sorted((run_dir / "checkpoints").iterdir())[-1].name
    assert int(saved.removeprefix("step-")) == steps[-1] + 1


def wait_for_steps(run_dir, count, processes):
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > count):
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.2)


@pytest.mark.slow
def test_two_processes_with_a_bucket_share_no_disk(config_file, tmp_path, monkeypatch):
    """Each has a run directory of its own; a third that has none goes on from the bucket alone."""
    with serving(FakeGcs()) as bucket:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.address)
        kept = ["--config", str(config_file), "--trainer.checkpoint_dir", "gs://bucket/run", "--mesh.fsdp", "embed"]
        steady = ["--optimizer.schedule", "constant", "--resume", "auto", "--trainer.run_dir"]
        six = ["--trainer.num_train_steps", "6"]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        mesh = ["--mesh.coordinator", address, "--mesh.num_processes", "2", "--mesh.process_id"]
        for number in range(2):
            (tmp_path / f"host{number}").mkdir()
        processes = [
            start([*kept, *six, *steady, "run", *mesh, str(i)], devices=2, folder=tmp_path / f"host{i}")
            for i in range(2)
        ]
        results = ended(processes)
        assert [status for status, _, _ in results] == [0, 0], results
        assert (tmp_path / "host0" / "run" / "metrics.jsonl").exists() and not (tmp_path / "host1" / "run").exists()
        assert checkpoint.steps("gs://bucket/run") == [6]
        results = ended([start([*kept, *steady, str(tmp_path / "third")], devices=4)])
        assert results[0][0] == 0, results
        assert "resuming after step 6" in results[0][1]
        assert losses(tmp_path / "third", "step").max() == 11


@pytest.mark.slow
def test_a_save_that_fails_ends_all_processes(config_file, tmp_path, monkeypatch):
    with serving(FakeGcs(refused="step-00000012/")) as bucket:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.address)
        kept = ["--config", str(config_file), "--trainer.checkpoint_dir", "gs://bucket/run", "--mesh.fsdp", "embed"]
        long = ["--trainer.num_train_steps", "100000", "--trainer.run_dir", str(tmp_path / "run")]
        results = ended(start_two([*kept, *long]))
        assert [status for status, _, _ in results] == [1, 1], results
        for _, _, error in results:
            (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
            assert "step-00000012 could not be written: process " in line and "quota" in line
        assert "Traceback" not in results[0][2] + results[1][2]
        assert checkpoint.steps("gs://bucket/run") == [6]


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_an_error_in_all_processes(config_file, tmp_path):
    (tmp_path / "file").touch()
    arguments = ["--trainer.run_dir", str(tmp_path / "run"), "--trainer.checkpoint_dir", str(tmp_path / "file")]
    for status, _, error in ended(start_two(["--config", str(config_file), *arguments])):
        assert status == 2
        assert error.splitlines()[-1].startswith(f"error: {tmp_path / 'file'} is not writable: Not a directory")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on(config_file, tmp_path):
    """Within the heartbeat and what it takes to tell."""
    run_dir = tmp_path / "run"
    common = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--mesh.heartbeat_timeout", "5"]
    processes = start_two([*common, "--trainer.num_train_steps", "100000", "--optimizer.schedule", "constant"])
    wait_for_steps(run_dir, 20, processes)
    processes[1].kill()
    killed = time.monotonic()
    assert processes[0].wait(60) != 0
    assert time.monotonic() - killed < 10
    ended(processes)
    (*_, last) = checkpoint.steps(run_dir / "checkpoints")
    results = ended(start_two(["--resume", str(run_dir), "--trainer.num_train_steps", str(last + 3)]))
    assert [status for status, _, _ in results] == [0, 0], results
    assert sorted(set(losses(run_dir, "step").tolist())) == list(range(last + 3))


@pytest.mark.slow
def test_a_process_that_is_stopped_is_noticed(config_file, tmp_path):
    """Alive, with a heartbeat, and stuck: the others' watchdogs end the run."""
    run_dir = tmp_path / "run"
    common = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--trainer.step_timeout", "30"]
    processes = start_two([*common, "--trainer.num_train_steps", "100000", "--mesh.heartbeat_timeout", "100"])
    wait_for_steps(run_dir, 5, processes)
    processes[1].send_signal(signal.SIGSTOP)
    assert processes[0].wait(120) == 1
    processes[1].kill()
    (_, error), _ = [process.communicate() for process in processes]
    assert "took longer than 30 s (trainer.step_timeout)" in error
    assert "Current thread" in error or "most recent call first" in error


@pytest.mark.slow
def test_a_process_that_is_left_alone_says_so(config_file, tmp_path):
    mesh = ["--mesh.coordinator", "localhost:1", "--mesh.num_processes", "2", "--mesh.process_id", "1"]
    arguments = ["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run"), "--mesh.start_timeout", "3"]
    ((status, _, error),) = ended([start([*arguments, *mesh], devices=1)])
    # Not bad input: a launcher is to try again.
    assert status == 1
    wanted = "error: mesh.coordinator localhost:1: the 2 processes did not all connect within 3 s (mesh.start_"
    assert error.startswith(wanted) and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


class Service:
    """Keeps messages as jax's coordination service does: no name may be used twice."""

    def __init__(self):
        self.messages = {}

    def key_value_set(self, key, value):
        assert key not in self.messages, key
        self.messages[key] = value

    def blocking_key_value_get(self, key, timeout):
        return self.messages[key]

    def key_value_delete(self, prefix):
        self.messages = {key: value for key, value in self.messages.items() if not key.startswith(prefix)}


def test_messages_of_a_second_run_of_the_same_processes_are_its_own(monkeypatch):
    service = Service()
    monkeypatch.setattr(processes_module, "_client", lambda: service)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    runs = []
    for index in range(2):
        monkeypatch.setattr(processes_module, "_runs", itertools.count(), raising=False)
        monkeypatch.setattr("jax.process_index", lambda index=index: index)
        runs.append([Processes.of_this_run() for _ in range(2)])
    for number in range(2):
        first, second = runs[0][number], runs[1][number]
        assert first.broadcast("saved", str(number), 1) == second.broadcast("saved", None, 1) == str(number)
        second.gather("written/all", "theirs", 1)
        assert first.gather("written/all", "mine", 1) == ["mine", "theirs"]
    runs[0][0].forget("written/all")
    assert len(service.messages) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "here"}, r"^mesh.coordinator is 'here'; it must be HOST:PORT, auto or null$"),
        ({"coordinator": "here:99999"}, r"^mesh.coordinator is 'here:99999'; it must be HOST:PORT, auto or null$"),
        ({"coordinator": "here:80"}, "^mesh.num_processes is missing; mesh.coordinator here:80 requires it$"),
        (
            {"coordinator": "here:80", "num_processes": 2},
            "^mesh.process_id is missing; mesh.coordinator here:80 requires it",
        ),
        (
            {"coordinator": "here:80", "num_processes": 0, "process_id": 0},
            "^mesh.num_processes is 0; it must be at least 1",
        ),
        (
            {"coordinator": "here:80", "num_processes": 2, "process_id": 2},
            r"^mesh.process_id is 2; it must be from 0 to 1 \(mesh.num_processes - 1\)$",
        ),
        ({"num_processes": 2}, "^mesh.num_processes 2 requires mesh.coordinator HOST:PORT$"),
        ({"coordinator": "auto", "process_id": 0}, "^mesh.process_id 0 requires mesh.coordinator HOST:PORT$"),
        ({"start_timeout": 0}, "^mesh.start_timeout is 0; it must be at least 1$"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--optimizer.learning_rate", "1e-3"], "the configuration differs between processes"),
        (["--trainer.batch_size", "32"], "the configuration differs between processes"),
        (["--data.validation_fraction", "0.5"], "the text differs between processes"),
        (["--data.validation.own", "own.txt"], "the configuration differs between processes"),
    ],
)
def test_processes_of_different_commands_do_not_train_together(config_file, tmp_path, option, expected):
    processes = start_two(["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run")], option)
    for status, _, error in ended(processes):
        assert status == 2
        assert expected in error.splitlines()[-1]
    assert not (tmp_path / "run").exists()
