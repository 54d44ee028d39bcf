"""Bad numbers in a run: a step that is not finite changes nothing, and many of them end the run or send it back."""

import math
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import numpy as np
import pytest

from sophia_levanter import checkpoint
from sophia_levanter.main import main
from sophia_levanter.partition.processes import Processes
from sophia_levanter.run import resuming
from sophia_levanter.status import VARIABLE, Failure, read_status
from sophia_levanter.training.loop import BatchLoader
from tiny_runs import metrics


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


def state_of(run_dir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by default the newest one."""
    directory = run_dir / "checkpoints"
    found = checkpoint.read_step(directory, checkpoint.steps(directory)[-1] if step is None else step)
    return dict(checkpoint.read_arrays(directory, found))


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["--mesh.fsdp", "embed", "--trainer.compute_dtype", "bfloat16"], marks=pytest.mark.slow),
    ],
    ids=["data parallel", "fsdp bfloat16"],
)
def test_a_nan_in_one_batch_changes_nothing_and_the_run_goes_on(
    options, config_file, tmp_path, plant, stop_after, capfd
):
    plain, refreshing = 4, 6
    plant({plain, refreshing}, np.nan)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["--config", str(config_file), *options]
    assert main([*command, "--trainer.run_dir", str(whole)]) == 0
    out = capfd.readouterr().out
    for bad in (plain, refreshing):
        assert f"step {bad}: the loss or gradient was not finite (loss nan); the step was skipped" in out
    assert [step for step, loss in metrics(whole).items() if loss is None] == [plain, refreshing]
    counts = {step: (step >= plain) + (step >= refreshing) for step in range(12)}
    assert metrics(whole, "train/skipped_steps") == counts

    # Compare the states around such a step. The state after it is saved only because the run stops there.
    command += ["--trainer.run_dir", str(parts), "--resume", "auto"]
    command += ["--trainer.checkpoint_every", "1", "--trainer.keep_checkpoints", "20"]
    for bad in (plain, refreshing):
        stop_after(bad)
        assert main(command) == 130
        before, after = (state_of(parts, step) for step in (bad, bad + 1))
        assert before.keys() == after.keys()
        changed = {path for path in before if not np.array_equal(before[path], after[path])}
        assert not {path for path in changed if before[path].dtype.kind == "f"}
        assert {"step", "skipped_steps", "skipped_in_a_row"} <= changed
    assert main(command) == 0
    assert metrics(parts) == metrics(whole)


@pytest.mark.slow
def test_spikes_of_the_loss_are_skipped_when_asked(config_file, tmp_path, capfd):
    """Where the learning rate grows too high, losses go up."""
    factor, run_dir = 1.01, tmp_path / "run"
    options = ["--optimizer.learning_rate", "0.5", "--optimizer.warmup", "12", "--trainer.num_train_steps", "16"]
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
    assert f"step {skipped[0]}: the loss spiked (loss " in capfd.readouterr().out

    few = ["--trainer.loss_spike_factor", "1.000001", "--trainer.max_skipped_steps", "1"]
    assert main([*command, str(tmp_path / "ends"), *few]) == 1
    error = capfd.readouterr().err
    assert "error: the loss spiked in 1 consecutive step" in error and "--trainer.loss_spike_factor" in error


@pytest.mark.parametrize("rollbacks", [0, 2], ids=["none wanted", "nothing saved"])
def test_too_many_bad_steps_end_a_run_that_cannot_go_back(rollbacks, config_file, tmp_path, plant, capfd, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    plant({0, 1, 2}, np.nan)
    run_dir = tmp_path / "run"
    options = ["--trainer.max_skipped_steps", "3", "--trainer.max_rollbacks", str(rollbacks)]
    options += ["--trainer.run_dir", str(run_dir), "--trainer.checkpoint_every", "100"]
    assert main(["--config", str(config_file), *options]) == 1
    out = capfd.readouterr()
    assert "the step was skipped" in out.out
    assert "error: the loss or gradient was not finite in 3 consecutive steps" in out.err
    failure = read_status(out.out.splitlines()[-1])
    assert isinstance(failure, Failure) and failure.reason == "loss_not_finite"
    assert not checkpoint.steps(run_dir / "checkpoints")


def test_a_run_goes_back_and_past_the_data_where_it_went_wrong(config_file, tmp_path, plant, stop_after, capfd):
    plant({6, 7, 8}, np.nan)  # a checkpoint is due after step 7
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["--config", str(config_file), "--trainer.max_skipped_steps", "3", "--trainer.checkpoint_every", "4"]
    command += ["--trainer.max_rollbacks", "1", "--trainer.run_dir"]
    assert main([*command, str(whole)]) == 0
    out = capfd.readouterr().out
    assert "WARNING: the loss or gradient was not finite in 3 consecutive steps, ending at step 8" in out
    assert "rolling back to step 4 and skipping the 80 sequences used since then" in out
    assert all(loss is not None for loss in metrics(whole).values())
    state = state_of(whole)
    assert (int(state["step"]), int(state["skipped_windows"]), int(state["skipped_steps"])) == (12, 80, 0)
    # Step 8 has no validation loss: the last one is that of step 6.
    saved = checkpoint.read_step(whole / "checkpoints", 8).metadata["metrics"]
    assert "train/loss" in saved and "validation/loss" not in saved

    # A run that stops after it has gone back goes on with the same data.
    stop_after(9)
    assert main([*command, str(parts)]) == 130
    assert main(["--resume", str(parts)]) == 0
    assert metrics(parts) == metrics(whole) and set(metrics(whole)) == set(range(12))


def test_a_checkpoint_to_go_back_to_is_not_pushed_out(config_file, tmp_path, plant, capfd):
    """Twice: after the first time step 8 has the data of step 11, and after the second those of step 14."""
    plant({7, 8, 9, 11, 12, 13}, np.nan)
    often = ["--trainer.checkpoint_every", "1", "--trainer.keep_checkpoints", "1", "--trainer.keep_best", "false"]
    options = [*often, "--trainer.max_skipped_steps", "3", "--trainer.max_rollbacks", "2"]
    assert main(["--config", str(config_file), *options, "--trainer.run_dir", str(tmp_path / "run")]) == 0
    out = capfd.readouterr().out
    for step in (7, 8):
        assert f"rolling back to step {step} and skipping the 48 sequences used since then" in out
    assert int(state_of(tmp_path / "run")["skipped_windows"]) == 96


def test_all_processes_go_back_where_the_first_one_finds_a_checkpoint(tmp_path, monkeypatch):
    """The listing on another host may be stale: the process would give up while the others wait for it."""
    said: list[tuple[str, str]] = []
    removed: list[int] = []

    class Talking(Processes):
        def broadcast(self, name, text, timeout):
            if self.is_first:
                said.append((name, text))
            return said[-1][1]

    def roll_back(index, listing):
        monkeypatch.setattr(checkpoint, "steps", lambda directory: listing)
        run = SimpleNamespace(
            directory=SimpleNamespace(checkpoints=tmp_path),
            processes=Talking(index, 2),
            console=SimpleNamespace(line=lambda line: None),
            batches=SimpleNamespace(sequences_between=lambda step, later: 16 * (later - step)),
            partition=SimpleNamespace(place=lambda array: array),
        )
        return resuming.restore_before(run, range(6, 9), 0).tree.skipped_windows

    restored = checkpoint.Restored(SimpleNamespace(skipped_windows=np.int32(0)), 4, {}, "id")
    monkeypatch.setattr(resuming, "restore", lambda run: restored)
    monkeypatch.setattr(resuming.eqx, "tree_at", lambda where, tree, new: SimpleNamespace(skipped_windows=new))
    monkeypatch.setattr(checkpoint, "remove", lambda directory, step: removed.append(step))
    assert roll_back(0, [4, 8]) == roll_back(1, [8]) == 80
    assert removed == [8]
    roll_back(0, [4, 8])
    assert len({name for name, _ in said}) == len(said) == 2
