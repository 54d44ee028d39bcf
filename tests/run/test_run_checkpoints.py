"""Where a run's checkpoints lie: in another place, gone, in the way of another run, and which of them stay."""

import fcntl
import itertools
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from fake_gcs import FakeGcs, serving
from sophia_levanter import checkpoint
from sophia_levanter.commands.checkpoints import main as prune
from sophia_levanter.errors import InputError
from sophia_levanter.main import main
from sophia_levanter.partition.processes import Processes
from sophia_levanter.run.directory import RunDirectory
from sophia_levanter.run.resuming import find_checkpoints
from sophia_levanter.tracking.console import Console
from sophia_levanter.training import checkpoints
from sophia_levanter.training.checkpoints import CheckpointTimer
from sophia_levanter.training.evaluation import Evaluation, Evaluator
from tiny_runs import metrics, run_config

SAME_RATE = ["--optimizer.schedule", "constant"]


def test_a_checkpoint_has_all_that_a_run_goes_on_from(finished_run, tmp_path):
    """The checkpoints alone, in another place: no file of the run's directory is needed."""
    kept, second = tmp_path / "kept", tmp_path / "second"
    (finished_run.copy(tmp_path / "run", steps=[6]) / "checkpoints").rename(kept)
    manifest = checkpoint.read_step(kept, 6)
    assert manifest.metadata["config"]["trainer"]["num_train_steps"] == 12
    assert manifest.metadata["best"] == {"step": 6, "validation/loss": manifest.metadata["metrics"]["validation/loss"]}
    assert {"environment", "data", "validation", "metrics"} <= set(manifest.metadata)
    assert manifest.metadata["verified"] is True
    command = ["--config", str(finished_run.config_file), "--trainer.checkpoint_dir", str(kept)]
    assert main([*command, "--trainer.run_dir", str(second), "--resume", "auto"]) == 0
    assert not (second / "checkpoints").exists()
    whole = metrics(finished_run.path)
    assert metrics(second) == {step: whole[step] for step in range(6, 12)}
    assert checkpoint.read_step(kept, 12).run_id == manifest.run_id


@pytest.mark.slow
def test_a_checkpoint_that_was_copied_from_another_run(config_file, tmp_path, capfd):
    run, copy = tmp_path / "run", tmp_path / "copy"
    options = ["--trainer.num_train_steps", "2", "--trainer.evaluation_windows", "1"]
    assert main(["--config", str(config_file), *options, *SAME_RATE, "--trainer.run_dir", str(run)]) == 0
    theirs = checkpoint.read_step(run / "checkpoints", 2).run_id
    assert (run / ".run_id").read_text() == f"{theirs}\n"
    shutil.copytree(run, copy)
    (copy / ".run_id").write_text("mine")
    before = (copy / "metrics.jsonl").read_bytes()
    longer = ["--resume", str(copy), "--trainer.num_train_steps", "3"]
    assert main(longer) == 2
    assert f"was saved by run {theirs}, but this is run mine; move that step elsewhere" in capfd.readouterr().err
    assert (copy / "metrics.jsonl").read_bytes() == before
    # A run that began elsewhere may be continued.
    (copy / ".run_id").unlink()
    assert main(longer) == 0
    assert (copy / ".run_id").read_text() == f"{theirs}\n"


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(finished_run, tmp_path, capfd):
    run_dir = finished_run.copy(tmp_path / "run")
    # Its metrics are then long enough to show that it had saved.
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("checkpoint_every: 6", "checkpoint_every: 2"))
    command = ["--config", str(finished_run.config_file), "--trainer.run_dir", str(run_dir), "--resume", "auto"]
    (run_dir / "checkpoints").rename(tmp_path / "gone")
    before = (run_dir / "metrics.jsonl").read_bytes()
    for more in ([], ["--trainer.checkpoint_dir", str(tmp_path / "elsewhere")]):
        assert main([*command, *more]) == 2
        assert "contains no checkpoint; restore the checkpoints, or remove the metrics" in capfd.readouterr().err
        assert (run_dir / "metrics.jsonl").read_bytes() == before
    (tmp_path / "gone").rename(run_dir / "checkpoints")
    assert main(command) == 0


@pytest.mark.parametrize(("lines", "is_refused"), [(12, False), (13, True)])
def test_the_lines_of_two_steps_with_evaluations_and_tasks_do_not_show_a_save(lines, is_refused, tmp_path):
    directory = RunDirectory(tmp_path, "if_saved")
    directory.write_config(run_config(trainer={"checkpoint_every": 2}))
    directory.metrics_file.write_text('{"step": 0}\n' * lines)
    with pytest.raises(InputError, match="contains no checkpoint") if is_refused else nullcontext():
        find_checkpoints(directory, Processes(), Console(silent=True))
    directory.unlock()


def test_a_run_that_was_killed_before_its_first_checkpoint_says_that_it_begins_again(
    finished_run, tmp_path, capfd, stop_after
):
    run_dir = finished_run.copy(tmp_path / "run", steps=[])
    stop_after(0)
    command = ["--config", str(finished_run.config_file), "--trainer.run_dir", str(run_dir), "--resume", "auto"]
    assert main(command) == 130
    assert "checkpoints contains no checkpoint; the run starts again from step 0" in capfd.readouterr().out
    assert min(metrics(run_dir)) == 0 and max(metrics(run_dir)) < 3


def test_a_run_directory_that_was_only_locked_is_empty(config_file, tmp_path, capfd, stop_after):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in (".lock", "config.yaml.tmp"):
        (run_dir / name).touch()
    stop_after(0)
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--resume", "auto"]) == 130
    assert "WARNING" not in capfd.readouterr().out


def test_checkpoints_of_another_run_are_in_the_way(finished_run, tmp_path, capfd):
    kept, run_dir = tmp_path / "kept", tmp_path / "second"
    shutil.copytree(finished_run.path / "checkpoints", kept)
    config = ["--config", str(finished_run.config_file)]
    command = [*config, "--trainer.checkpoint_dir", str(kept), "--trainer.run_dir", str(run_dir)]
    assert main(command) == 2
    assert f"trainer.checkpoint_dir {kept} already contains checkpoints; use --resume auto" in capfd.readouterr().err
    assert main([*command, "--resume", "auto", "--trainer.seed", "5"]) == 2
    assert "contains another run: its trainer.seed is 0, not 5" in capfd.readouterr().err
    assert not (run_dir / "config.yaml").exists()
    for location, message in (
        ("ftp://x/y", "has an unsupported scheme; use a path, gs:// or s3://"),
        ("gs://", "does not specify a bucket"),
        ("gs:/bucket/x", "trainer.checkpoint_dir is gs:/bucket/x; use a path or a gs:// or s3:// URL"),
    ):
        assert main([*config, "--trainer.checkpoint_dir", location]) == 2
        assert message in capfd.readouterr().err


def test_two_runs_do_not_write_to_one_place(finished_run, tmp_path, capfd):
    kept = tmp_path / "kept"
    shutil.copytree(finished_run.path / "checkpoints", kept)
    run = ["--config", str(finished_run.config_file), "--trainer.checkpoint_dir", str(kept), "--resume", "auto"]
    with (kept / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for process, words in (
            (main, [*run, "--trainer.run_dir", str(tmp_path / "second")]),
            (prune, ["prune", str(kept), "--keep", "1"]),
        ):
            assert process(words) == 2
            assert f"{kept} is in use by another process" in capfd.readouterr().err
    assert checkpoint.steps(kept) == [6, 12]
    assert prune(["prune", str(kept), "--keep", "1"]) == 0


def test_where_nothing_can_be_written_is_found_before_the_first_step(config_file, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    run_dir = tmp_path / "run"
    command = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--trainer.checkpoint_dir"]
    for place in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert main([*command, str(place)]) == 2
        error = capfd.readouterr().err
        assert error == f"error: {place} is not writable: Not a directory; choose another directory\n"
    with serving(FakeGcs(refused="")) as bucket:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.address)
        assert main([*command, "gs://bucket/run"]) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "gs://bucket/run: " in error and "the quota is used up" in error
    assert not run_dir.exists()


def test_what_stays(config_file, tmp_path, monkeypatch):
    """The newest, multiples of keep_every, and the best by validation loss."""
    run_dir = tmp_path / "run"
    losses = iter([5.0, 5.0, 5.0, 4.0, *[5.0] * 8])
    monkeypatch.setattr(Evaluator, "__call__", lambda *arguments: Evaluation(next(losses), 1.0, 1, 1))
    keep = ["--trainer.keep_checkpoints", "2", "--trainer.keep_every", "7", "--trainer.checkpoint_every", "1"]
    command = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), *keep, "--trainer.evaluate_every", "1"]
    assert main(command) == 0
    assert checkpoint.steps(run_dir / "checkpoints") == [4, 7, 11, 12]


def set_clock(monkeypatch, clock):
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=clock))


def test_a_state_is_saved_when_the_minutes_are_over(finished_run, tmp_path, monkeypatch, capfd):
    """Each look at the clock is 20 s later: after 3 and 9 steps a minute is over, and after 6 and 12 a save is due."""
    set_clock(monkeypatch, itertools.count(0, 20).__next__)
    run_dir = tmp_path / "run"
    options = ["--trainer.checkpoint_minutes", "1", "--trainer.keep_checkpoints", "3"]
    assert main(["--config", str(finished_run.config_file), "--trainer.run_dir", str(run_dir), *options]) == 0
    assert "\ncheckpoints: every 6 steps or 1 min\n" in capfd.readouterr().out
    assert checkpoint.steps(run_dir / "checkpoints") == [6, 9, 12]
    assert metrics(run_dir) == metrics(finished_run.path)


@dataclass(frozen=True)
class Talking(Processes):
    """One of two processes that talk through a dictionary."""

    said: dict[str, str] = field(default_factory=dict)

    def broadcast(self, name, text, timeout):
        return self.said.setdefault(name, text) if self.is_first else self.said[name]

    def forget(self, name):
        if self.is_first:
            del self.said[f"{name}/answer"]


def test_the_clock_of_the_first_process_decides_for_all(monkeypatch):
    said = {}
    clocks, questions = [0.0, 0.0], [itertools.count(), itertools.count()]

    def use(index):
        set_clock(monkeypatch, lambda: clocks[index])
        monkeypatch.setattr(checkpoints, "_questions", questions[index])

    def ask():
        answers = []
        for index, timer in enumerate(timers):
            use(index)
            answers.append(timer.has_expired())
            if answers[-1]:
                timer.restart()
        return answers

    timers = []
    for index in range(2):
        use(index)
        timers.append(CheckpointTimer(0.5, Talking(index, 2, said)))
    found = []
    for clocks[0] in (10.0, 29.0, 30.0, 40.0, 59.0, 60.0):
        clocks[1] += 100  # another machine's
        found.append(ask())
    assert found == [[False] * 2, [False] * 2, [True] * 2, [False] * 2, [False] * 2, [True] * 2]
    assert len(said) == 3  # the answers that not all may have read


def test_without_minutes_nothing_is_said():
    said = {}
    assert not CheckpointTimer(None, Talking(0, 2, said)).has_expired()
    assert said == {}
