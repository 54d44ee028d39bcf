"""What befalls a run: bad numbers, kills, full disks, steps that never end. What it had comes back, bit for bit."""

import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

from fake_gcs import FakeGcs, serving
from sophia_levanter import checkpoint
from sophia_levanter.commands.checkpoints import main as prune
from sophia_levanter.data import token_store
from sophia_levanter.data.nanogpt import NanogptTokens
from sophia_levanter.main import main
from sophia_levanter.tracking.jsonl import JsonLines
from sophia_levanter.training.loop import BatchLoader


def metrics(run_dir: Path, name: str = "train/loss") -> dict[int, float | None]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record[name] for record in map(json.loads, lines) if name in record}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch):
    """Makes the batches of some steps have a weight of another value, by the windows' place in the data."""

    def planted(steps: set[int], weight: float) -> None:
        load = BatchLoader.load

        def load_planted(self: BatchLoader, step: int):
            batch = load(self, step)
            if int(step) + self.skipped_windows // self.config.batch_size not in steps:
                return batch
            # One window of one microbatch.
            weights = jax.tree.map(lambda x: x.at[0, 1, 3].set(weight), batch.weights)
            return eqx.tree_at(lambda b: b.weights, batch, weights)

        monkeypatch.setattr(BatchLoader, "load", load_planted)

    return planted


@pytest.mark.parametrize("options", [[], ["--mesh.fsdp", "embed", "--trainer.compute_dtype", "bfloat16"]])
@pytest.mark.parametrize("bad", [5, 6], ids=["plain", "refreshing"])
def test_a_nan_in_one_batch_changes_nothing_and_the_run_goes_on(bad, options, config_file, tmp_path, plant, capfd):
    plant({bad}, np.nan)
    command = ["--config", str(config_file), *options]
    assert main([*command, "--trainer.run_dir", str(tmp_path / "run")]) == 0
    assert (
        f"step {bad}: the loss or gradient was not finite (loss nan); the step changed nothing"
        in capfd.readouterr().out
    )
    found = metrics(tmp_path / "run")
    assert [step for step, loss in found.items() if loss is None] == [bad]
    assert metrics(tmp_path / "run", "train/skipped_steps") == {step: int(step >= bad) for step in range(12)}

    # The state around it: as after the steps before.
    for last in (bad, bad + 1):
        steps = ["--trainer.num_train_steps", str(last), "--optimizer.schedule", "constant"]
        assert main([*command, *steps, "--trainer.run_dir", str(tmp_path / str(last))]) == 0
    before, after = (state_of(tmp_path / str(last)) for last in (bad, bad + 1))
    assert before.keys() == after.keys()
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert not {path for path in changed if before[path].dtype.kind == "f"}
    assert {"step", "skipped_steps", "skipped_in_a_row"} <= changed


def state_of(run_dir: Path) -> dict[str, np.ndarray]:
    (step, *_) = reversed(checkpoint.steps(run_dir / "checkpoints"))
    return dict(checkpoint.read_arrays(run_dir / "checkpoints", checkpoint.read_step(run_dir / "checkpoints", step)))


@pytest.mark.slow
def test_spikes_of_the_loss_are_skipped_when_asked(config_file, tmp_path, capfd):
    """Where the learning rate grows too high, losses go up."""
    factor, run_dir = 1.01, tmp_path / "run"
    options = ["--optimizer.learning_rate", "0.5", "--optimizer.warmup_steps", "12", "--trainer.num_train_steps", "16"]
    command = ["--config", str(config_file), *options, "--trainer.run_dir"]
    assert main([*command, str(tmp_path / "without")]) == 0
    assert metrics(tmp_path / "without", "train/skipped_steps")[15] == 0
    many = ["--trainer.loss_spike_factor", str(factor), "--trainer.max_skipped_steps", "100"]
    assert main([*command, str(run_dir), *many]) == 0
    recent, skipped = math.inf, []
    for step, loss in metrics(run_dir).items():
        if loss > factor * recent:
            skipped.append(step)
        else:
            recent = loss if math.isinf(recent) else 0.98 * recent + 0.02 * loss
    counts = metrics(run_dir, "train/skipped_steps")
    assert skipped and counts == {step: len([s for s in skipped if s <= step]) for step in range(16)}
    assert f"step {skipped[0]}: the loss was a spike (loss " in capfd.readouterr().out

    few = ["--trainer.loss_spike_factor", "1.000001", "--trainer.max_skipped_steps", "1"]
    assert main([*command, str(tmp_path / "ends"), *few]) == 1
    error = capfd.readouterr().err
    assert "error: the loss was a spike in 1 steps in a row" in error and "--trainer.loss_spike_factor" in error


def test_a_run_goes_back_and_past_the_data_where_it_went_wrong(config_file, tmp_path, plant, capfd):
    plant({7, 8, 9}, np.nan)
    run_dir = tmp_path / "run"
    command = ["--config", str(config_file), "--trainer.max_skipped_steps", "3", "--trainer.checkpoint_every", "4"]
    assert main([*command, "--trainer.run_dir", str(tmp_path / "ends")]) == 1
    capfd.readouterr()
    assert main([*command, "--trainer.run_dir", str(run_dir), "--trainer.max_rollbacks", "1"]) == 0
    out = capfd.readouterr().out
    assert "WARNING: the loss or gradient was not finite in 3 steps in a row, the last of them step 9" in out
    assert "going back to step 4, and on with the data after the 96 sequences since then" in out
    assert all(loss is not None for loss in metrics(run_dir).values())
    state = state_of(run_dir)
    assert (int(state["step"]), int(state["skipped_windows"]), int(state["skipped_steps"])) == (12, 96, 0)

    # It has the losses of a run that never had the bad windows in its order.
    whole = metrics(run_dir)
    assert main(["--resume", str(run_dir), "--trainer.num_train_steps", "14"]) == 0
    more = metrics(run_dir)
    assert {step: more[step] for step in whole} == whole and set(more) == set(range(14))


def test_a_checkpoint_to_go_back_to_is_not_pushed_out(config_file, tmp_path, plant, capfd):
    plant({7, 8, 9}, np.nan)
    often = ["--trainer.checkpoint_every", "1", "--trainer.keep_checkpoints", "1", "--trainer.keep_best", "false"]
    options = [*often, "--trainer.max_skipped_steps", "3", "--trainer.max_rollbacks", "1"]
    assert main(["--config", str(config_file), *options, "--trainer.run_dir", str(tmp_path / "run")]) == 0
    assert "going back to step 7, and on with the data after the 48 sequences" in capfd.readouterr().out


def test_a_run_that_goes_wrong_from_the_start_cannot_go_back(config_file, tmp_path, plant, capfd):
    plant({0, 1, 2}, np.nan)
    options = ["--trainer.max_skipped_steps", "3", "--trainer.max_rollbacks", "2", "--trainer.checkpoint_every", "100"]
    assert main(["--config", str(config_file), *options, "--trainer.run_dir", str(tmp_path / "run")]) == 1
    assert "error: the loss or gradient was not finite in 3 steps in a row" in capfd.readouterr().err


def test_a_checkpoint_has_all_that_a_run_goes_on_from(config_file, tmp_path):
    """The checkpoints alone, in another place: no file of the run's directory is needed."""
    first, second, whole = tmp_path / "first", tmp_path / "second", tmp_path / "whole"
    command = ["--config", str(config_file), "--trainer.checkpoint_dir", str(tmp_path / "kept")]
    assert main(["--config", str(config_file), "--trainer.run_dir", str(whole)]) == 0
    assert main([*command, "--trainer.run_dir", str(first), "--trainer.num_train_steps", "6", *SAME_RATE]) == 0
    assert not (first / "checkpoints").exists()
    manifest = checkpoint.read_step(tmp_path / "kept", 6)
    assert manifest.metadata["config"]["trainer"]["num_train_steps"] == 6
    assert manifest.metadata["best"] == {"step": 6, "validation/loss": manifest.metadata["metrics"]["validation/loss"]}
    assert {"environment", "data", "validation", "metrics"} <= set(manifest.metadata)
    assert manifest.metadata["verified"] is True
    auto = [*command, "--trainer.run_dir", str(second), "--resume", "auto", *SAME_RATE]
    assert main([*auto, "--trainer.num_train_steps", "8"]) == 0
    assert list(metrics(second)) == [6, 7]
    assert checkpoint.read_step(tmp_path / "kept", 8).run_id == manifest.run_id


SAME_RATE = ["--optimizer.schedule", "constant"]


@pytest.mark.slow
def test_a_checkpoint_that_was_copied_from_another_run(config_file, tmp_path, capfd):
    run, copy = tmp_path / "run", tmp_path / "copy"
    options = ["--trainer.num_train_steps", "2", "--trainer.evaluation_windows", "1", "--trainer.sample_tokens", "0"]
    assert main(["--config", str(config_file), *options, *SAME_RATE, "--trainer.run_dir", str(run)]) == 0
    theirs = checkpoint.read_step(run / "checkpoints", 2).run_id
    assert (run / ".run_id").read_text() == f"{theirs}\n"
    shutil.copytree(run, copy)
    (copy / ".run_id").write_text("mine")
    before = (copy / "metrics.jsonl").read_bytes()
    longer = ["--resume", str(copy), "--trainer.num_train_steps", "3"]
    assert main(longer) == 2
    assert f"was saved by run {theirs}, but this is run mine; move that step away" in capfd.readouterr().err
    assert (copy / "metrics.jsonl").read_bytes() == before
    # To go on with a run that began elsewhere is no mistake.
    (copy / ".run_id").unlink()
    assert main(longer) == 0
    assert (copy / ".run_id").read_text() == f"{theirs}\n"


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(config_file, tmp_path, capfd):
    command = ["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run"), "--resume", "auto"]
    steady = ["--trainer.num_train_steps", "30", "--trainer.evaluate_every", "30"]
    assert main([*command, *steady]) == 0
    assert "WARNING" not in capfd.readouterr().out
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "gone")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for more in ([], ["--trainer.checkpoint_dir", str(tmp_path / "elsewhere")]):
        assert main([*command, *steady, *more]) == 2
        assert "holds no checkpoint: bring them back, or remove the metrics" in capfd.readouterr().err
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    (tmp_path / "gone").rename(tmp_path / "run" / "checkpoints")
    assert main([*command, "--trainer.num_train_steps", "31", "--trainer.evaluate_every", "30"]) == 0


def test_a_run_that_was_killed_before_its_first_checkpoint_says_that_it_begins_again(config_file, tmp_path, capfd):
    command = ["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run"), "--resume", "auto"]
    assert main(command) == 0
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "gone")
    assert main(command) == 0
    assert "checkpoints holds no checkpoint: the run begins again at step 0" in capfd.readouterr().out


def test_other_validation_windows_have_a_best_of_their_own(config_file, tmp_path):
    run_dir = tmp_path / "run"
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 0
    best = checkpoint.read_step(run_dir / "checkpoints", 12).metadata["best"]
    assert best["step"] == 12
    more = ["--trainer.num_train_steps", "13", "--trainer.evaluation_windows", "3", "--optimizer.learning_rate", "9"]
    assert main(["--resume", str(run_dir), *more]) == 0
    found = checkpoint.read_step(run_dir / "checkpoints", 13).metadata
    assert found["metrics"]["validation/loss"] > best["validation/loss"]
    assert found["best"]["step"] == 13


def test_a_run_directory_that_was_only_locked_is_empty(config_file, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in (".lock", "config.yaml.tmp"):
        (run_dir / name).touch()
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--resume", "auto"]) == 0


def test_checkpoints_of_another_run_are_in_the_way(config_file, tmp_path, capfd):
    command = ["--config", str(config_file), "--trainer.checkpoint_dir", str(tmp_path / "kept")]
    assert main([*command, "--trainer.run_dir", str(tmp_path / "first")]) == 0
    capfd.readouterr()
    assert main([*command, "--trainer.run_dir", str(tmp_path / "second")]) == 2
    assert (
        f"trainer.checkpoint_dir {tmp_path / 'kept'} holds checkpoints already; --resume auto" in capfd.readouterr().err
    )
    auto = ["--trainer.run_dir", str(tmp_path / "second"), "--resume", "auto", "--trainer.seed", "5"]
    assert main([*command, *auto]) == 2
    assert "holds another run: its trainer.seed is 0, this one's is 5" in capfd.readouterr().err
    assert not (tmp_path / "second" / "config.yaml").exists()
    for location, message in (
        ("ftp://x/y", "checkpoints go to a path, or to gs:// or s3://"),
        ("gs://", "no bucket"),
        ("gs:/bucket/x", "trainer.checkpoint_dir is gs:/bucket/x; write a path, gs:// or s3://"),
    ):
        assert main(["--config", str(config_file), "--trainer.checkpoint_dir", location]) == 2
        assert message in capfd.readouterr().err


def test_two_runs_do_not_write_to_one_place(config_file, tmp_path, capfd):
    kept = tmp_path / "kept"
    arguments = ["--trainer.checkpoint_dir", str(kept), "--resume", "auto", "--config", str(config_file)]
    assert main([*arguments, "--trainer.run_dir", str(tmp_path / "first")]) == 0
    with (kept / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for run, words in (
            (main, [*arguments, "--trainer.run_dir", str(tmp_path / "second")]),
            (prune, ["prune", str(kept), "--keep", "1"]),
        ):
            assert run(words) == 2
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
        assert error == f"error: {place} cannot be written: Not a directory; name another directory\n"
    with serving(FakeGcs(refused="")) as bucket:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.address)
        assert main([*command, "gs://bucket/run"]) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "gs://bucket/run: " in error and "the quota is used up" in error
    assert not run_dir.exists()


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch):
    """Does something once a step's metrics are logged."""

    def plan(step: int, act) -> None:
        log = JsonLines.log

        def log_and_act(self, at, numbers):
            log(self, at, numbers)
            if at == step and "train/loss" in numbers:
                monkeypatch.setattr(JsonLines, "log", log)
                act()

        monkeypatch.setattr(JsonLines, "log", log_and_act)

    return plan


def remove(folder: Path) -> None:
    """At once, since a save may go on meanwhile."""
    shutil.rmtree(folder.rename(folder.with_name("going")))


@pytest.mark.parametrize(
    ("step", "rename"),
    [
        (2, False),
        (7, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, True), (7, False), (11, True)]),
    ],
)
def test_a_run_whose_directory_is_removed_fails_and_does_not_bring_it_back(
    config_file, tmp_path, after_step, capfd, step, rename
):
    run_dir = tmp_path / "run"
    after_step(step, lambda: run_dir.rename(tmp_path / "renamed") if rename else remove(run_dir))
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 1
    out, err = capfd.readouterr()
    (error,) = err.splitlines()
    assert error.startswith(f"error: {run_dir}/") and "removed" in error
    assert "done:" not in out
    assert not run_dir.exists()


@pytest.mark.slow
def test_checkpoints_that_are_removed_fail_the_next_save(config_file, tmp_path, after_step, capfd):
    run_dir = tmp_path / "run"
    after_step(7, lambda: remove(run_dir / "checkpoints"))
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 1
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith(f"error: {run_dir}/checkpoints/step-000000") and " was removed or renamed while " in error
    assert not (run_dir / "checkpoints").exists()


# Text that changes under a run.


@pytest.fixture
def of_tokens(config_file, tmp_path):
    """The command of a run on token files of 5,000 tokens, of which a second pair is as long."""
    rng = np.random.default_rng(0)
    for name in ("train", "val", "other"):
        rng.integers(0, 257, 5000).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    data = ["--data.train", f"nanogpt:{tmp_path}/train.bin", "--data.validation", f"nanogpt:{tmp_path}/val.bin"]
    return ["--config", str(config_file), *data, "--trainer.run_dir", str(tmp_path / "run")]


@pytest.mark.slow
def test_a_token_file_that_is_cut_short_ends_the_run_in_one_line(of_tokens, tmp_path, after_step, capfd):
    after_step(1, lambda: os.truncate(tmp_path / "train.bin", 3000))
    assert main(of_tokens) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith(f"error: data.train: {tmp_path}/train.bin ")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


def test_a_step_on_an_overwritten_token_file_is_not_saved(of_tokens, tmp_path, after_step, capfd):
    after_step(7, lambda: shutil.copyfile(tmp_path / "other.bin", tmp_path / "train.bin"))
    assert main(of_tokens) == 2
    assert f"error: data.train: {tmp_path}/train.bin changed after it was opened" in capfd.readouterr().err
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [6]
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert "the training text is another one than the run began with" in capfd.readouterr().err
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [6]


@pytest.mark.slow
def test_checkpoints_that_know_less_of_the_text_are_gone_on_from(of_tokens, tmp_path, monkeypatch):
    facts = NanogptTokens.facts.func

    def before(self):
        return {name: value for name, value in facts(self).items() if name != "digest"}

    with monkeypatch.context() as patch:
        patch.setattr(NanogptTokens, "facts", property(before))
        assert main([*of_tokens, *SAME_RATE, "--trainer.num_train_steps", "6"]) == 0
    assert main(["--resume", str(tmp_path / "run"), "--trainer.num_train_steps", "7"]) == 0


@pytest.mark.parametrize(
    ("large", "side"),
    [
        (True, "train"),
        (False, "validation"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(False, "train"), (True, "validation")]),
    ],
)
def test_a_shard_of_another_text_is_not_trained_on(config_file, tmp_path, monkeypatch, capfd, large, side):
    if large:
        monkeypatch.setattr(token_store, "IN_MEMORY_BYTES", 0)
    run_dir, other = tmp_path / "run", tmp_path / "other"
    command = ["--config", str(config_file), *SAME_RATE, "--trainer.num_train_steps", "6"]
    assert main([*command, "--trainer.run_dir", str(run_dir)]) == 0
    text = tmp_path / "text.txt"
    content = text.read_text()
    text.write_text(content.replace("says", "SAYS"))
    assert main([*command, "--trainer.run_dir", str(other), "--data.cache_dir", str(other)]) == 0
    capfd.readouterr()
    (shard,) = (tmp_path / "cache").glob(f"*/{side}/tokens/c/0")
    (foreign,) = other.glob(f"*/{side}/tokens/c/0")
    assert shard.stat().st_size == foreign.stat().st_size
    shutil.copyfile(foreign, shard)
    store = f"--data.{side}", f"store:{shard.parents[2]}"
    more = ["--trainer.num_train_steps", "30", "--trainer.evaluate_every", "30", "--trainer.checkpoint_every", "10"]
    rest = "train" if side == "validation" else "validation"
    sides = [*store, f"--data.{rest}", f"store:{shard.parents[3]}/{rest}"]
    assert main(["--resume", str(run_dir), *sides, *more]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert f"{shard.parents[2]}: the token store is damaged (the tokens are not those that were written)" in error
    assert checkpoint.steps(run_dir / "checkpoints") == [6]


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_run_that_is_stopped_saves_before_its_text_has_been_compared(
    of_tokens, tmp_path, monkeypatch, after_step, capfd, step
):
    """While it trains, and while it waits to save its sixth step."""
    comparing = threading.Event()
    monkeypatch.setattr(NanogptTokens, "check_whole", lambda self, cache_dir: comparing.wait(20))

    def stop() -> None:
        threading.Timer(1.5 if step == 5 else 0, os.kill, [os.getpid(), signal.SIGTERM]).start()
        if step == 2:
            time.sleep(0.3)

    after_step(step, stop)
    assert main([*of_tokens, "--trainer.num_train_steps", "40", "--trainer.evaluate_every", "40"]) == 75
    comparing.set()
    last = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert step < last < 40
    assert checkpoint.read_step(tmp_path / "run" / "checkpoints", last).metadata["verified"] is False
    line = f"step {last} is saved before its text has been compared with what it should be"
    assert line in capfd.readouterr().out


@pytest.mark.slow
def test_a_cache_that_is_removed_ends_a_run_on_a_large_store_and_what_was_trained_is_saved(
    config_file, tmp_path, monkeypatch, after_step, capfd
):
    for name in ("IN_MEMORY_BYTES", "CACHE_BYTES"):
        monkeypatch.setattr(token_store, name, 0)
    after_step(7, lambda: shutil.rmtree(tmp_path / "cache"))
    run_dir = tmp_path / "run"
    options = ["--trainer.num_train_steps", "30", "--trainer.evaluate_every", "30"]
    assert main(["--config", str(config_file), *options, "--trainer.run_dir", str(run_dir)]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith(f"error: {tmp_path}/cache/") and "the token store is damaged" in error
    done = len(metrics(run_dir))
    assert 8 <= done < 30
    assert checkpoint.steps(run_dir / "checkpoints") == [6, done]


def test_what_stays(config_file, tmp_path):
    """The newest, multiples of keep_every, and the best by validation loss."""
    run_dir = tmp_path / "run"
    # The rate grows and the loss with it: the best is an early one.
    keep = ["--trainer.keep_checkpoints", "2", "--trainer.keep_every", "7", "--trainer.checkpoint_every", "1"]
    command = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), *keep, "--trainer.evaluate_every", "1"]
    assert main([*command, "--optimizer.learning_rate", "0.5", "--optimizer.warmup_steps", "12"]) == 0
    losses = metrics(run_dir, "validation/loss")
    best = min(losses, key=losses.get) + 1
    assert best not in (7, 11, 12)
    assert checkpoint.steps(run_dir / "checkpoints") == sorted({best, 7, 11, 12})


def test_another_dtype_only_when_asked(config_file, tmp_path, capfd):
    run_dir = tmp_path / "run"
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 0
    more = ["--resume", str(run_dir), "--trainer.num_train_steps", "13", "--optimizer.momentum_dtype", "bfloat16"]
    assert main(more) == 2
    assert "leaf optimizer_state.momentum" in capfd.readouterr().err
    assert main([*more, "--trainer.cast_checkpoint", "true"]) == 0
    assert 12 in metrics(run_dir)


# Processes of their own, that end in ways of their own.

KILLED = """
import os, signal, sys
from sophia_levanter.checkpoint import saving
from sophia_levanter.main import main
from sophia_levanter.tracking.jsonl import JsonLines
from sophia_levanter.training.evaluation import Evaluator

when, step, *arguments = sys.argv[1:]
step = int(step)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

log, evaluate, write, run = JsonLines.log, Evaluator.__call__, saving.write_arrays, saving._Save.run
seen = -1

def log_or_die(self, at, numbers):
    global seen
    log(self, at, numbers)
    seen = at
    if when == "step" and at >= step:
        die()

def evaluate_or_die(self, model, on_progress):
    def progress():
        on_progress()
        if when == "evaluation" and seen >= step:
            die()
    return evaluate(self, model, progress)

def write_or_die(folder, arrays, **options):
    if when == "save" and seen >= step:
        write(folder, arrays[::2], **options)
        die()
    return write(folder, arrays, **options)

def run_and_die(self):
    done = run(self)
    if when == "committed" and seen >= step:
        die()
    return done

JsonLines.log, Evaluator.__call__ = log_or_die, evaluate_or_die
saving.write_arrays, saving._Save.run = write_or_die, run_and_die
sys.exit(main(arguments))
"""


def start(*command: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_20_steps_and_resumed_the_losses_are_those_of_an_undisturbed_run(config_file, tmp_path):
    steps, rng = 200, random.Random(7)
    command = ["--config", config_file, "--trainer.num_train_steps", steps, "--trainer.evaluate_every", 6]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start("-m", "sophia_levanter.main", *command, "--trainer.run_dir", whole)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    wanted, wanted_losses = metrics(whole), metrics(whole, "validation/loss")

    at = sorted(rng.sample(range(1, steps - 8), 20))
    assert {step % 3 for step in at} == {0, 1, 2}, "on refreshing steps and others"
    for number, step in enumerate(at):
        when = ("step", "evaluation", "save", "committed")[number % 4]
        process = start("-c", KILLED, when, step, *command, "--trainer.run_dir", killed, "--resume", "auto")
        out, _ = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, (when, step, out)
        found = metrics(killed)
        assert max(found) >= step - 1
        assert found == {done: wanted[done] for done in found}
    process = start("-m", "sophia_levanter.main", "--resume", killed)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert metrics(killed) == wanted
    assert metrics(killed, "validation/loss") == wanted_losses


def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(config_file, tmp_path):
    """A real one, in a namespace where this process may mount it."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run([*namespace, f"mount -t tmpfs none {disk}"], capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a tmpfs")
    script = f"""
mount -t tmpfs -o size=3m none {disk} || exit 99
head -c 1900k /dev/zero > {disk}/ballast
train="{sys.executable} -m sophia_levanter.main"
dir="--trainer.run_dir {tmp_path}/run --trainer.checkpoint_dir {disk}/checkpoints"
$train --config {config_file} $dir --trainer.checkpoint_every 2 --trainer.keep_checkpoints 9; echo "exit $?"
{sys.executable} -m sophia_levanter.commands.checkpoints verify {disk}/checkpoints; echo "exit $?"
rm {disk}/ballast
$train --resume {tmp_path}/run; echo "exit $?"
"""
    finished = subprocess.run([*namespace, script], capture_output=True, text=True, timeout=300)
    lines = finished.stdout.splitlines()
    exits = [line for line in lines if line.startswith("exit ")]
    assert exits == ["exit 1", "exit 0", "exit 0"], finished.stdout + finished.stderr
    (error,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert "could not be written: leaf " in error and "No space left on device" in error
    assert any("resuming after step " in line for line in lines)
    assert "Traceback" not in finished.stderr
    assert list(metrics(tmp_path / "run")) == list(range(12))


STUCK = """
import sys, time
from sophia_levanter.main import main
from sophia_levanter.tracking.jsonl import JsonLines
log = JsonLines.log
def never_ending(self, step, numbers):
    log(self, step, numbers)
    if step == 8:
        time.sleep(1000)
JsonLines.log = never_ending
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_is_stuck_is_ended_and_goes_on_when_started_again(config_file, tmp_path):
    command = ["--config", config_file, "--trainer.run_dir", tmp_path / "run", "--resume", "auto"]
    started = time.monotonic()
    process = start("-c", STUCK, *command, "--trainer.step_timeout", 3)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "has taken more than 3 s (trainer.step_timeout); the run goes on from its last checkpoint" in out
    assert "never_ending" in out and "most recent call first" in out, "every thread's stack is shown"
    assert time.monotonic() - started < 100
    process = start("-m", "sophia_levanter.main", "--resume", tmp_path / "run")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "resuming after step 6" in out
    assert list(metrics(tmp_path / "run")) == list(range(12))
