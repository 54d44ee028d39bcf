"""The command itself: whole tiny runs, how they end, how they go on, and what it says to bad input."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sophia_levanter import checkpoint
from sophia_levanter.data import corpora
from sophia_levanter.data.corpora import Leak
from sophia_levanter.data.nanogpt import NanogptTokens
from sophia_levanter.main import main
from sophia_levanter.status import VARIABLE, Failure, read_status


def losses(run_dir: Path) -> dict[int, float]:
    """train/loss by step; a step that stands there twice fails."""
    found: dict[int, float] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "train/loss" in record:
            assert record["step"] not in found
            found[record["step"]] = record["train/loss"]
    return found


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sophia_levanter.main", *map(str, arguments)]


@pytest.mark.parametrize("optimizer", ["sophia_g", "sophia_h", "adamw", "lion", "muon", "soap"])
def test_a_run_learns_and_says_how_it_went(optimizer, config_file, tmp_path, capfd):
    run_dir = tmp_path / "run"
    extra = [] if optimizer != "sophia_h" else ["--optimizer.rho", "0.1", "--optimizer.interval", "3"]
    status = main(
        ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--optimizer.type", optimizer, *extra]
    )
    out = capfd.readouterr().out
    assert status == 0, out
    assert list(losses(run_dir)) == list(range(12))
    assert losses(run_dir)[11] < losses(run_dir)[0] - 0.1
    assert checkpoint.steps(run_dir / "checkpoints") == [6, 12]
    for wanted in (
        r"model: GPT-2, [\d,]+ parameters",
        r"schedule: 12 steps, learning rate 0\.01 after 2 of them, then cosine to 0\.001\n",
        r"memory: [\d.]+ KiB of state on each device: parameters [\d.]+ KiB",
        r"compiling \d training step\(s\)\ncompiled in [\d.]+ s; a step needs at most [\d.]+ [KM]iB on each device\n",
        r"step 4/12  loss \d\.\d+  smoothed \d\.\d+  [\d,]+ tokens/s  MFU",
        r"done: 12 steps, 3,072 tokens, 0:\d\d:\d\d, [\d,]+ tokens/s",
        r"best validation: \d\.\d+ nats per token, after step 12\n",
        r"validation: \d\.\d+ nats per token, \d\.\d+ bits per byte; a byte-bigram .* needs \d\.\d+",
        rf"checkpoint: {re.escape(str(run_dir))}/checkpoints/step-00000012",
        r"sample, after the prompt in brackets:\n\[",
    ):
        assert re.search(wanted, out), wanted
    assert ("win rate:" in out) == optimizer.startswith("sophia")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {"train/grad_norm", "train/learning_rate", "train/tokens_per_second", "train/mfu"} <= records[0].keys()
    validation = [r for r in records if "validation/loss" in r]
    assert [r["step"] for r in validation] == [5, 11]
    # One token is one byte of this text, but for the end of the document.
    assert validation[-1]["validation/bits_per_byte"] == pytest.approx(
        validation[-1]["validation/loss"] / np.log(2), rel=0.01
    )
    refreshes = [r["step"] for r in records if "optim/win_rate" in r]
    assert refreshes == ([0, 3, 6, 9] if optimizer.startswith("sophia") else [])


def test_every_switch_of_the_curvature_together(config_file, tmp_path):
    run_dir = tmp_path / "run"
    switches = {
        "denominator": "add",
        "refresh_order": "after",
        "first_refresh": "2",
        "target_win_rate": "0.9",
        "curvature_reduce": "average_then_square",
        "curvature_max_grad_norm": "1.0",
        "curvature_labels": "data",
        "basis": "kronecker",
    }
    options = [option for name, value in switches.items() for option in (f"--optimizer.{name}", value)]
    precision = ["--trainer.compute_dtype", "bfloat16"]
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir), *options, *precision]) == 0
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rho = {r["step"]: r["optim/rho"] for r in records if "optim/rho" in r}
    assert list(rho) == [2, 5, 8, 11]
    assert 0.5 < rho[2] < rho[5] < rho[8] < rho[11]
    assert losses(run_dir)[11] < losses(run_dir)[0] - 0.1


@pytest.mark.parametrize(
    ("stopped_at", "options"),
    [
        (5, []),
        (7, []),
        (7, ["--optimizer.basis", "kronecker"]),
        (7, ["--model.type", "llama", "--model.num_kv_heads", "1", "--model.qk_norm", "true"]),
        pytest.param(7, ["--optimizer.type", "muon"], marks=pytest.mark.slow),
        pytest.param(7, ["--optimizer.type", "soap"], marks=pytest.mark.slow),
    ],
    ids=["next_step_refreshes", "next_step_is_plain", "kronecker", "llama", "muon", "soap"],
)
def test_a_stopped_and_resumed_run_is_bitwise_the_undisturbed_one(
    stopped_at, options, config_file, tmp_path, capfd, stop_after
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = ["--config", str(config_file), "--trainer.checkpoint_every", "100", *options]
    assert main([*config, "--trainer.run_dir", str(whole)]) == 0
    stop_after(stopped_at - 1)
    assert main([*config, "--trainer.run_dir", str(parts)]) == 130
    steps = checkpoint.steps(parts / "checkpoints")
    # The step that runs while the signal comes is finished, not thrown away.
    assert len(steps) == 1 and steps[0] in (stopped_at, stopped_at + 1)
    assert (steps[0] % 3 == 0) == (stopped_at == 5), "the interval is 3"
    assert f"stopped after step {steps[0]}, which is saved; --resume {parts} goes on" in capfd.readouterr().out
    assert main(["--resume", str(parts)]) == 0
    assert losses(parts) == losses(whole)
    last = [run_dir / "checkpoints" / "step-00000012" / "arrays" for run_dir in (whole, parts)]
    files = [sorted(p.relative_to(arrays) for p in arrays.rglob("c*") if p.is_file()) for arrays in last]
    assert files[0] == files[1] and files[0]
    for file in files[0]:
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes(), file


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
try:
    main.main(["--config", {str(config_file)!r}])
except SystemExit:
    print(status, kept, os.environ["OPENBLAS_NUM_THREADS"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    for given, wanted in (({}, "1"), ({"OPENBLAS_NUM_THREADS": "2"}, "2")):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment | given, check=True
        )
        assert done.stdout.strip() == f"2 [False] {wanted}"


def test_sigterm_means_run_me_again_and_auto_does(config_file, tmp_path, capfd, stop_after):
    run_dir = tmp_path / "run"
    again = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--resume", "auto"]
    stop_after(4, signal.SIGTERM)
    assert main(again) == 75
    assert main(again) == 0
    assert list(losses(run_dir)) == list(range(12))
    assert "resuming after step" in capfd.readouterr().out
    # Once more: there is nothing left to do, and that is no error.
    assert main(again) == 0
    assert "all 12 steps are done" in capfd.readouterr().out


def test_a_finished_run_can_be_extended(config_file, tmp_path, capfd):
    run_dir = tmp_path / "run"
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 0
    capfd.readouterr()
    assert main(["--resume", str(run_dir), "--trainer.num_train_steps", "15"]) == 0
    out = capfd.readouterr().out
    assert "trainer.num_train_steps was 12 and is 15" in out
    assert re.search(r"at step 12 the learning rate was 0\.001 and is 0\.00\d+", out)
    assert list(losses(run_dir)) == list(range(15))


def test_a_damaged_newest_checkpoint_falls_back_loudly(config_file, tmp_path, capfd):
    run_dir = tmp_path / "run"
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 0
    before = losses(run_dir)
    chunk = next(p for p in (run_dir / "checkpoints/step-00000012").rglob("c*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1])
    capfd.readouterr()
    assert main(["--resume", str(run_dir)]) == 0
    assert "step-00000012" in capfd.readouterr().out
    assert losses(run_dir) == before
    assert checkpoint.steps(run_dir / "checkpoints") == [6, 12]


def test_no_whole_checkpoint_is_a_failure_and_never_a_new_start(config_file, tmp_path, capfd):
    run_dir = tmp_path / "run"
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 0
    for manifest in run_dir.rglob("manifest.json"):
        manifest.write_text("{}")
    assert main(["--resume", str(run_dir)]) == 1
    assert "error: " in capfd.readouterr().err


def test_too_many_bad_steps_end_the_run(config_file, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    run_dir = tmp_path / "run"
    arguments = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--trainer.max_skipped_steps", "3"]
    huge = ["--optimizer.type", "adamw", "--optimizer.learning_rate", "1e38", "--optimizer.final_learning_rate", "1e38"]
    assert main([*arguments, *huge, "--optimizer.warmup_steps", "0", "--optimizer.weight_decay", "1e3"]) == 1
    out = capfd.readouterr()
    assert "the step changed nothing" in out.out
    assert "not finite in 3 steps in a row" in out.err
    failure = read_status(out.out.splitlines()[-1])
    assert isinstance(failure, Failure) and failure.reason == "loss_not_finite"
    assert not (run_dir / "checkpoints").exists() or not checkpoint.steps(run_dir / "checkpoints")


def test_bfloat16_microbatches_and_a_blocked_loss_on_eight_devices_learn(config_file, tmp_path):
    run_dir = tmp_path / "run"
    options = [
        "--trainer.compute_dtype",
        "bfloat16",
        "--model.gradient_checkpointing",
        "full",
        "--model.dropout",
        "0.1",
    ]
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir), *options]) == 0
    assert losses(run_dir)[11] < losses(run_dir)[0] - 0.1


BAD = {
    "misspelt key": (["--optimizer.lerning_rate", "1"], "optimizer.learning_rate"),
    "wrong type": (["--trainer.num_train_steps", "many"], "trainer.num_train_steps is 'many'"),
    "unknown optimizer": (["--optimizer.type", "sofia"], "sophia_g"),
    "unknown tokenizer": (["--data.tokenizer", "gpt3"], "gpt2"),
    "heads": (["--model.num_heads", "3"], "model.num_heads 3 does not divide model.embed_dim 16"),
    "microbatches": (["--trainer.microbatch_size", "5"], "trainer.microbatch_size 5 does not divide"),
    "curvature microbatches": (
        ["--optimizer.type", "sophia_h", "--optimizer.rho", "0.1", "--optimizer.curvature_microbatch_size", "5"],
        "optimizer.curvature_microbatch_size 5 does not divide trainer.batch_size 16",
    ),
    "curvature devices": (
        ["--optimizer.type", "sophia_h", "--optimizer.rho", "0.1", "--optimizer.curvature_microbatch_size", "4"],
        "optimizer.curvature_microbatch_size 4 does not divide over mesh.data 8 devices",
    ),
    "cudnn": (["--model.attention", "cudnn"], "model.attention is 'cudnn', which needs a GPU, and this is a CPU"),
    "devices": (
        ["--trainer.batch_size", "6", "--trainer.microbatch_size", "3"],
        "does not divide over mesh.data 8 devices",
    ),
    "missing file": (["--data.train", "nowhere.txt"], "nowhere.txt"),
    "empty file": (["--data.train", "EMPTY"], "empty"),
    "binary file": (["--data.train", "BINARY"], "binary.txt"),
    "short text": (["--data.train", "SHORT"], "model.seq_len"),
    "steps": (["--trainer.num_train_steps", "3000000000"], "must be between 1 and 2147483647"),
    "added eps": (
        ["--optimizer.type", "sophia_h", "--optimizer.rho", "0.1", "--optimizer.denominator", "add"],
        "optimizer.denominator is 'add', and the curvature of sophia_h may be negative, "
        "where an added eps turns the step uphill; use max",
    ),
    "eps": (["--optimizer.eps", "1e-50"], "optimizer.eps is 1e-50"),
    "warm-up": (["--optimizer.warmup_steps", "99"], "optimizer.warmup_steps 99"),
    "another run": (["--trainer.run_dir", "FULL"], "holds files already"),
    "auto without a directory": (["--resume", "auto"], "trainer.run_dir"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, config_file, tmp_path, capfd, monkeypatch):
    arguments, wanted = BAD[name]
    monkeypatch.chdir(tmp_path)
    for file, content in {"empty.txt": b"", "binary.txt": b"\x80\x81\x00\xff" * 9, "short.txt": b"a b"}.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    files = {"EMPTY": "empty.txt", "BINARY": "binary.txt", "SHORT": "short.txt", "FULL": "full"}
    run_dir = [] if name in ("another run", "auto without a directory") else ["--trainer.run_dir", "run"]
    assert main(["--config", str(config_file), *run_dir, *(files.get(a, a) for a in arguments)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert wanted in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes"]


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    ],
    ids=["srun", "mpirun", "torchrun"],
)
def test_a_run_started_several_times_is_refused(variables, config_file, tmp_path, capfd, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {next(iter(variables))} is 2 and mesh.coordinator is null: ")
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused(config_file, tmp_path, capfd):
    run_dir = tmp_path / "run"
    short = ["--trainer.num_train_steps", "3"]
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir), *short]) == 0
    before = (run_dir / "config.yaml").read_text()
    capfd.readouterr()
    assert main(["--resume", str(run_dir), "--model.embed_dim", "32", "--trainer.num_train_steps", "9"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "wte" in error and "16" in error and "32" in error
    assert (run_dir / "config.yaml").read_text() == before
    # The same shapes do not make the same model.
    assert main(["--resume", str(run_dir), "--model.num_heads", "4", "--trainer.num_train_steps", "9"]) == 2
    assert "another model" in capfd.readouterr().err
    # Another optimizer's state does not fit either.
    assert main(["--resume", str(run_dir), "--optimizer.type", "adamw", "--trainer.num_train_steps", "9"]) == 2
    # Nor does another text, which would not be the same run.
    other = tmp_path / "other.txt"
    other.write_text("Another text. " * 200)
    assert main(["--resume", str(run_dir), "--data.train", str(other), "--trainer.num_train_steps", "9"]) == 2
    # A run directory that has lost its checkpoints has nothing to resume from.
    shutil.rmtree(run_dir / "checkpoints")
    capfd.readouterr()
    assert main(["--resume", str(run_dir)]) == 2
    assert "holds no checkpoint" in capfd.readouterr().err


def test_a_text_of_the_same_size_is_another_text(config_file, text_file, tmp_path, capfd):
    run_dir = tmp_path / "run"
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 0
    text_file.write_text(text_file.read_text().replace("times", "TIMES"))
    assert main(["--resume", str(run_dir), "--trainer.num_train_steps", "15"]) == 2
    assert "the training text is another one" in capfd.readouterr().err


def test_a_run_directory_has_one_process_at_a_time(config_file, tmp_path):
    run_dir = tmp_path / "run"
    long = ["--trainer.num_train_steps", 100_000, "--trainer.evaluate_every", 100_000]
    process = start(["--config", config_file, "--trainer.run_dir", run_dir, *long], tmp_path)
    wait_for_step(run_dir, 7, process)
    environment = os.environ | {VARIABLE: "1"}
    done = subprocess.run(command("--resume", run_dir), capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{run_dir} is in use by another process" in done.stderr
    failure = read_status(done.stdout.splitlines()[-1])
    assert failure == Failure("directory_in_use", done.stderr.removeprefix("error: ").rstrip())
    process.terminate()
    assert process.wait(120) == 75


def test_a_run_outlives_its_reader(config_file, tmp_path):
    run_dir = tmp_path / "run"
    process = start(["--config", config_file, "--trainer.run_dir", run_dir, "--trainer.log_every", 1], tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(300) == 0
    assert checkpoint.steps(run_dir / "checkpoints") == [6, 12]


@pytest.mark.parametrize("bad", ["FILE/x", "/proc/x", "x" * 300])
def test_a_run_directory_that_cannot_be_is_bad_input(bad, config_file, text_file, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", str(config_file), "--trainer.run_dir", bad.replace("FILE", str(text_file))]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: trainer.run_dir ") and error.count("\n") == 1


def test_another_platform_is_bad_input(config_file, tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "nosuch"}
    done = subprocess.run(command("--config", config_file), capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nosuch" in done.stderr


def test_auto_refuses_the_directory_of_another_run(config_file, tmp_path, capfd):
    run_dir = tmp_path / "run"
    auto = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--resume", "auto"]
    assert main([*auto, "--trainer.num_train_steps", "3"]) == 0
    assert main([*auto, "--optimizer.rho", "0.3"]) == 2
    assert "its optimizer.rho is 0.5, this one's is 0.3" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "wanted"),
    [
        (["--help"], 0, "--optimizer.rho"),
        (["--config", "CONFIG", "--print_config"], 0, "learning_rate: 0.01"),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["--config", "CONFIG", "--trainer.sed", "1"], 2, "trainer.seed"),
        (["--config", "CONFIG", "--model.embed_dim", "17"], 2, "model.num_heads 2 does not divide"),
        (["--config", "CONFIG", "--data.train", "*.none"], 2, "*.none"),
        (["--resume", "NOWHERE"], 2, "NOWHERE"),
    ],
)
def test_the_real_command(arguments, status, wanted, config_file, tmp_path):
    arguments = [str(config_file) if a == "CONFIG" else a for a in arguments]
    done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    said, silent = (done.stderr, done.stdout) if status else (done.stdout, done.stderr)
    assert wanted in said and not silent
    assert "Traceback" not in said
    assert not status or said.count("\n") == 1


def test_a_closed_pipe_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command("--help"), stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def start(arguments: list, tmp_path: Path, *, console_script: bool = False) -> subprocess.Popen:
    # One device, as a user without accelerators has it.
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    words = command(*arguments)
    if console_script:
        words[1:3] = ["-c", "import sys; from sophia_levanter.cli import main; sys.exit(main())", "train"]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        env={**os.environ, "XLA_FLAGS": flags},
    )  # fmt: skip


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and step in losses_so_far(run_dir):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def losses_so_far(run_dir: Path) -> set[int]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {json.loads(line)["step"] for line in lines if line.endswith("}")}


def test_ctrl_c_saves_says_so_and_exits_130(config_file, tmp_path):
    run_dir = tmp_path / "run"
    long = ["--trainer.num_train_steps", 100_000, "--trainer.evaluate_every", 100_000]
    # So that the only checkpoint is the one of the interruption.
    long += ["--trainer.checkpoint_every", 100_000]
    process = start(["--config", config_file, "--trainer.run_dir", run_dir, *long], tmp_path)
    wait_for_step(run_dir, 5, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    (step,) = checkpoint.steps(run_dir / "checkpoints")
    assert f"SIGINT: stopped after step {step}, which is saved" in out
    assert "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [25, 40, 61])
def test_kill_9_and_resume_continue_bitwise(killed_at, config_file, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = ["--config", config_file, "--trainer.num_train_steps", 80, "--trainer.checkpoint_every", 10]
    process = start([*config, "--trainer.run_dir", whole], tmp_path)
    assert process.wait(300) == 0, process.communicate()[0]
    process = start([*config, "--trainer.run_dir", killed], tmp_path)
    wait_for_step(killed, killed_at, process)
    process.kill()
    process.communicate()
    assert max(losses_so_far(killed)) < 79
    process = start(["--resume", killed], tmp_path)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert losses(killed) == losses(whole)


@pytest.mark.parametrize("stop_at", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_the_batch_size_changes_on_the_way(stop_at, config_file, tmp_path, stop_after, capfd):
    changes = ["--trainer.batch_size_changes", "[{step: 5, batch_size: 24}, {step: 9, batch_size: 8}]"]
    common = ["--config", str(config_file), *changes]
    whole, stopped, without = tmp_path / "whole", tmp_path / "stopped", tmp_path / "without"
    assert main([*common, "--trainer.run_dir", str(whole)]) == 0
    out = capfd.readouterr().out
    for size in (16, 24, 8):
        assert f"for batches of {size}" in out
    assert "microbatch(es), batches of 24 from step 5 on, batches of 8 from step 9 on\n" in out
    assert main(["--config", str(config_file), "--trainer.run_dir", str(without)]) == 0
    before, after = losses(whole), losses(without)
    assert [before[step] == after[step] for step in range(12)] == [True] * 5 + [False] * 7

    stop_after(stop_at)
    assert main([*common, "--trainer.run_dir", str(stopped)]) == 130
    assert main(["--resume", str(stopped)]) == 0
    assert losses(stopped) == losses(whole)


def test_sigterm_before_training_is_not_swallowed(config_file, tmp_path):
    """Wherever it comes: here in a callback of the garbage collector, where an exception is only printed."""
    program = """
import gc, signal, sys
from sophia_levanter.main import main
from sophia_levanter.run import run
def collect(*arguments, **options):
    gc.callbacks.append(lambda *arguments: signal.raise_signal(signal.SIGTERM))
    gc.collect()
    print("went on")
run.train = collect
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 75
    assert result.stdout == ""
    assert result.stderr == "SIGTERM: stopped outside training; run the command again\n"


STORMS = {
    "SIGTERM every 5 ms": (0.005, [signal.SIGTERM], 75),
    "SIGTERM first, every 5 ms": (0.005, [signal.SIGTERM, signal.SIGINT], 75),
    "SIGTERM first, every 50 ms, console script": (0.05, [signal.SIGTERM, signal.SIGINT, signal.SIGINT], 75),
}


@pytest.mark.parametrize("storm", STORMS)
def test_signals_until_the_exit_do_not_change_how_a_run_ends(storm, config_file, tmp_path):
    pause, numbers, status = STORMS[storm]
    run_dir = tmp_path / "run"
    long = ["--optimizer.type", "lion", "--trainer.num_train_steps", 100_000, "--trainer.checkpoint_every", 100_000]
    arguments = ["--config", config_file, "--trainer.run_dir", run_dir, *long]
    process = start(arguments, tmp_path, console_script="console script" in storm)
    wait_for_step(run_dir, 3, process)
    for number in itertools.cycle(numbers):
        if process.poll() is not None:
            break
        process.send_signal(number)
        time.sleep(pause)
    out, _ = process.communicate()
    assert process.returncode == status, out
    (step,) = checkpoint.steps(run_dir / "checkpoints")
    assert f"{numbers[0].name}: stopped after step {step}, which is saved" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
def test_signals_before_training_end_it_with_their_status(numbers, config_file, tmp_path):
    process = start(["--config", config_file, "--trainer.run_dir", tmp_path / "run"], tmp_path)
    process.stdout.readline()
    for number in itertools.cycle(numbers):
        if process.poll() is not None:
            break
        process.send_signal(number)
        time.sleep(0.005)
    out, _ = process.communicate()
    assert process.returncode == (75 if numbers[0] == signal.SIGTERM else 130), out
    assert "Traceback" not in out


def test_a_python_caller_has_its_handlers_back(config_file, tmp_path, stop_after):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_after(2, signal.SIGTERM)
    options = ["--optimizer.type", "lion", "--trainer.run_dir", str(tmp_path / "run")]
    assert main(["--config", str(config_file), *options]) == 75
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def flip_a_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_store_is_found_before_the_run_has_a_directory(config_file, tmp_path, capfd):
    arguments = ["--config", str(config_file), "--data.cache_dir", str(tmp_path / "own")]
    assert main([*arguments, "--trainer.run_dir", str(tmp_path / "first")]) == 0
    (shard,) = (tmp_path / "own").glob("*/validation/tokens/c/0")
    flip_a_byte(shard, 50)
    capfd.readouterr()
    assert main([*arguments, "--trainer.run_dir", str(tmp_path / "second")]) == 2
    assert "damaged" in capfd.readouterr().err
    assert not (tmp_path / "second").exists()


def test_what_was_trained_is_saved_when_the_data_turn_out_damaged(config_file, tmp_path, capfd, monkeypatch):
    # As if the file had been overwritten after it was checked.
    monkeypatch.setattr(NanogptTokens, "check", lambda self, report: None)
    monkeypatch.setattr(corpora, "find_leak", lambda *_: Leak(0, 0))
    tokens = np.random.default_rng(0).integers(0, 257, 16 * 16 * 12 + 1).astype(np.uint16)
    tokens[-20] = 60000  # in the last window, which comes at some step of the first epoch
    tokens.tofile(tmp_path / "train.bin")
    tokens[:500].tofile(tmp_path / "val.bin")
    data = ["--data.train", f"nanogpt:{tmp_path}/train.bin", "--data.validation", f"nanogpt:{tmp_path}/val.bin"]
    run_dir = tmp_path / "run"
    assert main(["--config", str(config_file), *data, "--trainer.run_dir", str(run_dir)]) == 2
    assert "token id 60000" in capfd.readouterr().err
    done = len(losses(run_dir))
    assert 0 < done < 12
    assert checkpoint.steps(run_dir / "checkpoints")[-1] == done


def test_what_was_trained_is_saved_when_the_validation_text_turns_out_damaged(
    config_file, tmp_path, capfd, monkeypatch
):
    # As if the file had been overwritten after it was checked.
    monkeypatch.setattr(NanogptTokens, "check", lambda self, report: None)
    monkeypatch.setattr(corpora, "find_leak", lambda *_: Leak(0, 0))
    tokens = np.random.default_rng(0).integers(0, 257, 16 * 16 * 12 + 1).astype(np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    tokens[-20] = 60000
    tokens.tofile(tmp_path / "val.bin")
    data = ["--data.train", f"nanogpt:{tmp_path}/train.bin", "--data.validation", f"nanogpt:{tmp_path}/val.bin"]
    run_dir, every = tmp_path / "run", ["--trainer.evaluation_windows", "null"]
    assert main(["--config", str(config_file), *data, *every, "--trainer.run_dir", str(run_dir)]) == 2
    assert "token id 60000" in capfd.readouterr().err
    assert checkpoint.steps(run_dir / "checkpoints") == [6]


def test_another_validation_text_and_batch_size_are_said_on_resuming(config_file, tmp_path, capfd):
    (tmp_path / "v.txt").write_text("some text to validate with " * 20)
    run_dir = tmp_path / "run"
    data = ["--data.validation", str(tmp_path / "v.txt")]
    assert main(["--config", str(config_file), *data, "--trainer.run_dir", str(run_dir)]) == 0
    (tmp_path / "v.txt").write_text("another text to validate with " * 20)
    more = ["--trainer.num_train_steps", "13", "--trainer.batch_size", "32"]
    assert main(["--resume", str(run_dir), *more]) == 0
    out = capfd.readouterr().out
    assert "the validation text is another one than the run began with" in out
    assert "trainer.batch_size_changes keeps their order" in out
