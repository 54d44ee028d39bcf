"""Whole runs and where their numbers go."""

import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_wandb import offline_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sophia_levanter import checkpoint
from sophia_levanter.config.command_line import load_config
from sophia_levanter.main import main
from sophia_levanter.run.run import Run
from sophia_levanter.tracking import tensorboard, wandb
from sophia_levanter.tracking.jsonl import JsonLines
from sophia_levanter.training.callbacks import SkippedSteps, TrainingFailed
from tiny_runs import metrics

BOTH = ["--tracking.wandb", "offline", "--tracking.tensorboard", "true"]


def events(run_dir: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_a_run_that_dies_and_goes_on_is_one_run_everywhere(config_file, tmp_path, monkeypatch, capfd):
    run_dir = tmp_path / "run"
    again = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--resume", "auto"]
    log = JsonLines.log

    def log_or_fail(self, step, numbers):
        if step == 9:
            raise OSError(28, "No space left on device")
        log(self, step, numbers)

    monkeypatch.setattr(JsonLines, "log", log_or_fail)
    # metrics.jsonl is not one of the trackers that a run can do without.
    assert main([*again, *BOTH]) == 1
    monkeypatch.setattr(JsonLines, "log", log)
    assert main([*again, *BOTH, "--tracking.wandb_name", "again"]) == 0
    out = capfd.readouterr().out
    assert out.count("wandb: offline; upload it with: wandb sync ") == 2

    saved = checkpoint.read_step(run_dir / "checkpoints", 12)
    runs = offline_runs(run_dir)
    assert [run["id"] for run in runs] == [saved.run_id] * 2
    assert [(run["name"], run["exit"]) for run in runs] == [("run", 1), ("again", 0)]
    steps = [[row["step"] for row in run["history"] if "train/loss" in row] for run in runs]
    assert steps == [list(range(9)), list(range(6, 12))]
    losses = metrics(run_dir)
    assert list(losses) == list(range(12))
    assert [step for step, _ in events(run_dir, "train/loss")] == list(range(12))
    assert dict(events(run_dir, "train/loss")) == pytest.approx(losses)
    assert [step for step, _ in events(run_dir, "val/loss")] == [5, 11]

    # The authors' names, and what the run is of.
    last = runs[1]["history"][3]
    assert last["iter"] == last["step"] == 9
    for theirs, ours in {
        "lr": "train/learning_rate",
        "param_norm": "train/parameter_norm",
        "train/win_rate": "optim/win_rate",
        "momentum_norm": "optim/momentum_norm",
        "hessian_norm2": "optim/curvature_norm",
    }.items():
        assert last[theirs] == last[ours]
    config = runs[1]["config"]
    assert config["optimizer"]["rho"] == 0.5 and config["code"] == saved.metadata["code"]
    assert config["code"]["version"] == "0.2.0"


def test_trackers_that_fail_stop_no_run(config_file, tmp_path, monkeypatch, capfd):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb.Wandb, "__init__", fail)
    monkeypatch.setattr(tensorboard.TensorBoard, "log", fail)
    run_dir = tmp_path / "run"
    arguments = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--optimizer.type", "adamw", *BOTH]
    assert main([*arguments, "--quiet"]) == 0
    assert list(metrics(run_dir)) == list(range(12))
    *warnings, done, validation, saved = capfd.readouterr().out.splitlines()
    assert sorted(warnings) == [
        f"WARNING: {name}: [Errno 28] No space left on device; the run continues without it"
        for name in ("tensorboard", "wandb")
    ]
    # This is all that --quiet leaves.
    assert re.match(r"done: 12 steps, 3,072 tokens, 0:\d\d:\d\d, [\d,]+ tokens/s, ", done)
    assert re.match(r"validation: \d\.\d+ nats per token, ", validation)
    assert saved == f"checkpoint: {run_dir}/checkpoints/step-00000012"


def test_a_process_that_is_not_the_first_tracks_nothing(config_file, tmp_path):
    run = SimpleNamespace(
        processes=SimpleNamespace(is_first=False), config=load_config(config_file, [("tracking.tensorboard", "true")])
    )
    before = threading.active_count()
    others = Run._start_trackers(run, 0)
    others.log(0, {"train/loss": 1.0})
    others.close(failed=False)
    assert threading.active_count() == before and not (tmp_path / "run").exists()


class Recorder:
    def __init__(self):
        self.logged, self.closed = [], []

    def log(self, step, numbers):
        self.logged.append((step, numbers))

    def close(self, *, failed):
        self.closed.append(failed)


def test_trackers_outlive_a_rollback(config_file, tmp_path, monkeypatch):
    recorders = []

    def make(*arguments):
        recorders.append(Recorder())
        return recorders[-1]

    monkeypatch.setattr(tensorboard, "TensorBoard", make)
    arguments = ["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run"), "--optimizer.type", "adamw"]
    arguments += ["--tracking.tensorboard", "true", "--trainer.checkpoint_every", "2"]
    calls = iter([True])

    def fail_once(self, numbers):
        if numbers.step == 7 and next(calls, False):
            raise TrainingFailed("made up", range(6, 8))

    monkeypatch.setattr(SkippedSteps, "on_step", fail_once)
    assert main([*arguments, "--trainer.max_rollbacks", "1"]) == 0
    (recorder,) = recorders
    assert recorder.closed == [False]
    assert [step for step, numbers in recorder.logged if "train/loss" in numbers] == [*range(8), *range(6, 12)]
