"""The command itself: whole tiny runs and what they report, and what it says to bad input."""

import os
import subprocess
import sys

import numpy as np
import pytest

from sophia_levanter import checkpoint
from sophia_levanter.main import main
from tiny_runs import command, metrics, start


@pytest.mark.parametrize(
    "optimizer",
    [
        *("sophia_g", "sophia_h"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "soap", "lion", "muon", "ademamix")),
    ],
)
def test_a_run_learns_and_says_how_it_went(optimizer, finished_run, config_file, tmp_path, capfd):
    """All lines of the first are in tests/snapshots/run.txt."""
    if optimizer == "sophia_g":
        run_dir, out = finished_run.path, finished_run.output
    else:
        run_dir = tmp_path / "run"
        extra = ["--trainer.sample_tokens", "3"]
        extra += [] if optimizer != "sophia_h" else ["--optimizer.rho", "0.1", "--optimizer.interval", "3"]
        words = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--optimizer.type", optimizer]
        status = main([*words, *extra])
        out = capfd.readouterr().out
        assert status == 0, out
    losses = metrics(run_dir)
    assert list(losses) == list(range(12))
    assert losses[11] < losses[0] - 0.1
    assert checkpoint.steps(run_dir / "checkpoints") == [6, 12]
    assert "schedule: 12 steps, learning rate 0.01 after 2 warm-up steps, then cosine to 0.001\n" in out
    assert ("win rate:" in out) == optimizer.startswith("sophia")
    assert ("sample (prompt in brackets):\n[" in out) == (optimizer != "sophia_g")
    assert ("curvature: every 3 steps, on" in out and ", rho 0." in out) == optimizer.startswith("sophia")
    for name in ("train/grad_norm", "train/learning_rate", "train/tokens_per_second", "train/mfu"):
        assert 0 in metrics(run_dir, name)
    validation, bits = metrics(run_dir, "validation/loss"), metrics(run_dir, "validation/bits_per_byte")
    assert list(validation) == list(bits) == [5, 11]
    # One token is one byte of this text, but for the end of the document.
    assert bits[11] == pytest.approx(validation[11] / np.log(2), rel=0.01)
    refreshes = list(metrics(run_dir, "optim/win_rate"))
    assert refreshes == ([0, 3, 6, 9] if optimizer.startswith("sophia") else [])


def test_memory_and_lapack_are_set_up_before_jax_is_imported(config_file, tmp_path):
    """Seen from outside: a run that is refused after they are set leaves jax alone."""
    program = f"""
import os, sys
from sophia_levanter import allocation, main
from sophia_levanter.run import directory
kept = []
allocation.keep_freed_memory = lambda: kept.append("jax" in sys.modules)
status = main.main(["--config", {str(config_file)!r}, "--resume", {str(tmp_path / "none")!r}])
directory.choose_run_directory = lambda command: sys.exit(9)
for given in (None, "2"):
    os.environ.pop("OPENBLAS_NUM_THREADS", None)
    if given is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = given
    try:
        main.main(["--config", {str(config_file)!r}])
    except SystemExit:
        print(status, kept, os.environ["OPENBLAS_NUM_THREADS"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "2 [False] 1\n2 [False, False] 2\n"


def test_a_run_outlives_its_reader(config_file, tmp_path):
    run_dir = tmp_path / "run"
    options = ["--optimizer.type", "lion", "--trainer.num_train_steps", 3, "--trainer.log_every", 1]
    process = start(command("--config", config_file, "--trainer.run_dir", run_dir, *options))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(300) == 0
    assert checkpoint.steps(run_dir / "checkpoints") == [3]


def test_another_platform_is_bad_input(config_file, tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "nosuch"}
    done = subprocess.run(command("--config", config_file), capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nosuch" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "wanted"),
    [
        (["--help"], 0, "--optimizer.rho"),
        (["--config", "CONFIG", "--print_config"], 0, "learning_rate: 0.01"),
        (["--config", "CONFIG", "--data.train", "*.none"], 2, "*.none"),
        (["--resume", "NOWHERE"], 2, "NOWHERE"),
    ],
)
def test_an_answer_before_training_is_all_that_is_printed(
    arguments, status, wanted, config_file, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([str(config_file) if a == "CONFIG" else a for a in arguments]) == status
    out, err = capfd.readouterr()
    said, silent = (err, out) if status else (out, err)
    assert wanted in said and not silent
    assert not status or said.count("\n") == 1


BAD = {
    "curvature microbatches": (
        ["--optimizer.type", "sophia_h", "--optimizer.rho", "0.1", "--optimizer.curvature_microbatch_size", "5"],
        "optimizer.curvature_microbatch_size 5 does not divide trainer.batch_size 16",
    ),
    "cudnn": (
        ["--model.attention", "cudnn"],
        "model.attention is 'cudnn', which requires a GPU, but this device is a CPU",
    ),
    "devices": (
        ["--trainer.batch_size", "6", "--trainer.microbatch_size", "3"],
        "is not divisible by the 8 devices on mesh.data",
    ),
    "empty file": (["--data.train", "EMPTY"], "empty"),
    "binary file": (["--data.train", "BINARY"], "binary.txt"),
    "short text": (["--data.train", "SHORT"], "model.seq_len"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, config_file, tmp_path, capfd, monkeypatch):
    """What is found before that is in tests/snapshots/refusals.txt."""
    arguments, wanted = BAD[name]
    monkeypatch.chdir(tmp_path)
    for file, content in {"empty.txt": b"", "binary.txt": b"\x80\x81\x00\xff" * 9, "short.txt": b"a b"}.items():
        (tmp_path / file).write_bytes(content)
    files = {"EMPTY": "empty.txt", "BINARY": "binary.txt", "SHORT": "short.txt"}
    words = ["--config", str(config_file), "--trainer.run_dir", "run", *(files.get(a, a) for a in arguments)]
    assert main(words) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert wanted in error
    assert not (tmp_path / "run").exists()


def test_a_run_started_several_times_is_refused(config_file, tmp_path, capfd, monkeypatch):
    variables = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: SLURM_STEP_NUM_TASKS is 2, but mesh.coordinator is null, ")
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", ["FILE/x", "/proc/x", "x" * 300])
def test_a_run_directory_that_cannot_be_is_bad_input(bad, config_file, text_file, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", str(config_file), "--trainer.run_dir", bad.replace("FILE", str(text_file))]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: trainer.run_dir ") and error.count("\n") == 1
