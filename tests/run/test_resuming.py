"""Runs that go on: bit for bit as if they had never stopped, and only with what they began with."""

import fcntl
import re
import shutil
import signal
from types import SimpleNamespace

import jax
import pytest

from sophia_levanter import checkpoint, train
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdEMAMixConfig
from sophia_levanter.config.build import encode
from sophia_levanter.config.command_line import load_config
from sophia_levanter.main import main
from sophia_levanter.run.directory import RunDirectory
from sophia_levanter.run.resuming import check_resumable
from sophia_levanter.run.run import Run
from sophia_levanter.status import VARIABLE, Failure, read_status
from sophia_levanter.tracking.console import Console
from sophia_levanter.training.evaluation import Evaluation, Evaluator
from tiny_runs import FACTS, finish_run, metrics, run_config, write_text

LLAMA = ["--model.type", "llama", "--model.num_kv_heads", "1", "--model.qk_norm", "true", "--optimizer.type", "adamw"]
MUON, SOAP = (["--optimizer.type", name] for name in ("muon", "soap"))
NORMS = ["--optimizer.type", "ademamix", "--optimizer.hyperball", "true", "--optimizer.cautious_weight_decay", "true"]
NORMS += ["--optimizer.groups", "[{role: vector, learning_rate: 0.5 x}]", "--trainer.lawa_every", "3"]
# On eight devices, in microbatches and with a blocked loss, as all tiny runs.
SWITCHES = {
    "optimizer.denominator": "add",
    "optimizer.refresh_order": "after",
    "optimizer.first_refresh": "2",
    "optimizer.target_win_rate": "0.9",
    "optimizer.curvature_reduce": "average_then_square",
    "optimizer.curvature_max_grad_norm": "1.0",
    "optimizer.curvature_labels": "data",
    "optimizer.basis": "kronecker",
    "trainer.compute_dtype": "bfloat16",
    "model.gradient_checkpointing": "full",
    "model.dropout": "0.1",
    "trainer.sample_tokens": "3",
}
SWITCHED = [word for name, value in SWITCHES.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def switched_run(tmp_path_factory):
    return finish_run(tmp_path_factory.mktemp("switched"), *SWITCHED)


def test_a_run_with_every_switch_learns(switched_run):
    rho = metrics(switched_run.path, "optim/rho")
    assert list(rho) == [2, 5, 8, 11]
    assert 0.5 < rho[2] < rho[5] < rho[8] < rho[11]
    assert metrics(switched_run.path)[11] < metrics(switched_run.path)[0] - 0.1


@pytest.mark.parametrize(
    ("stopped_at", "options"),
    [
        (5, []),
        (7, []),
        (7, SWITCHED),
        (7, LLAMA),
        *(pytest.param(7, options, marks=pytest.mark.slow) for options in (MUON, SOAP, NORMS)),
    ],
    ids=["next_step_refreshes", "next_step_is_plain", "every_switch", "llama", "muon", "soap", "norms"],
)
def test_a_stopped_and_resumed_run_is_bitwise_the_undisturbed_one(
    stopped_at, options, request, config_file, tmp_path, capfd, stop_after
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = ["--config", str(config_file), "--trainer.checkpoint_every", "100", *options]
    if options in ([], SWITCHED):
        whole = request.getfixturevalue("switched_run" if options else "finished_run").path
    else:
        assert main([*config, "--trainer.run_dir", str(whole)]) == 0
    stop_after(stopped_at - 1)
    assert main([*config, "--trainer.run_dir", str(parts)]) == 130
    steps = checkpoint.steps(parts / "checkpoints")
    # The step that runs while the signal comes is finished, not thrown away.
    assert len(steps) == 1 and steps[0] in (stopped_at, stopped_at + 1)
    assert (steps[0] % 3 == 0) == (stopped_at == 5), "the interval is 3"
    assert f"stopped after step {steps[0]}, which was saved; use --resume {parts} to continue" in capfd.readouterr().out
    assert main(["--resume", str(parts)]) == 0
    assert metrics(parts) == metrics(whole)
    last = [run_dir / "checkpoints" / "step-00000012" / "arrays" for run_dir in (whole, parts)]
    files = [sorted(p.relative_to(arrays) for p in arrays.rglob("c*") if p.is_file()) for arrays in last]
    assert files[0] == files[1] and files[0]
    for file in files[0]:
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes(), file


@pytest.mark.parametrize(("stop_at", "optimizer"), [(4, "adamw"), pytest.param(5, "sophia_g", marks=pytest.mark.slow)])
def test_the_batch_size_changes_on_the_way(stop_at, optimizer, config_file, tmp_path, stop_after, capfd):
    """It grows, and shrinks again to a size whose steps are compiled already."""
    changes = ["--trainer.batch_size_changes", "[{step: 5, batch_size: 24}, {step: 9, batch_size: 16}]"]
    plain, whole, stopped = (tmp_path / name for name in ("plain", "whole", "stopped"))
    common = ["--config", str(config_file), "--optimizer.type", optimizer]
    assert main([*common, "--trainer.run_dir", str(plain)]) == 0
    common += changes
    capfd.readouterr()
    assert main([*common, "--trainer.run_dir", str(whole)]) == 0
    out = capfd.readouterr().out
    for size in (16, 24):
        assert f"for batch size {size}" in out
    assert "microbatches, batch size 24 from step 5, batch size 16 from step 9\n" in out
    before, after = metrics(whole), metrics(plain)
    assert [before[step] == after[step] for step in range(12)] == [True] * 5 + [False] * 7

    stop_after(stop_at)
    assert main([*common, "--trainer.run_dir", str(stopped)]) == 130
    assert main(["--resume", str(stopped)]) == 0
    assert metrics(stopped) == metrics(whole)


def test_a_finished_run_can_be_extended_and_what_changes_is_said(config_file, tmp_path, capfd):
    run_dir, validation = tmp_path / "run", tmp_path / "v.txt"
    validation.write_text("some text to validate with " * 20)
    data = ["--data.validation", str(validation), "--optimizer.type", "adamw"]
    assert main(["--config", str(config_file), *data, "--trainer.run_dir", str(run_dir)]) == 0
    validation.write_text("ANOTHER TEXT {WHOSE LOSS} IS ABOVE THAT OF THE FIRST " * 20)
    capfd.readouterr()
    more = ["--trainer.num_train_steps", "13", "--trainer.batch_size", "32"]
    assert main(["--resume", str(run_dir), *more]) == 0
    out = capfd.readouterr().out
    assert "trainer.num_train_steps was 12 and is now 13" in out
    changed = r"the schedule changed: at step 12 the learning rate was 0\.001 and is now 0\.00\d+; .* before step (\d+)"
    assert re.search(changed, out)[1] == "3"  # the warm-up takes 2, and the peak follows
    assert "the validation text has changed since the run began" in out
    assert "trainer.batch_size_changes avoids that" in out
    assert f"done: 13 steps, {12 * 16 * 16 + 32 * 16:,} tokens, " in out  # the last step has the new batch size
    assert list(metrics(run_dir)) == list(range(13))
    first, last = (checkpoint.read_step(run_dir / "checkpoints", step).metadata["best"] for step in (12, 13))
    assert last["step"] == 13 and last["validation/loss"] > first["validation/loss"]


def resuming_says(before: TrainConfig, after: TrainConfig, step: int, run_dir) -> list[str]:
    """What is said where a run goes on from this step with another configuration; nothing is trained."""
    lines: list[str] = []
    run = SimpleNamespace(
        directory=RunDirectory(run_dir, "always"),
        console=SimpleNamespace(line=lines.append, resumed=lambda step, run_dir: None),
        processes=SimpleNamespace(broadcast=lambda name, text, timeout: text),
        config=after,
        provenance=FACTS,
    )
    check_resumable(run, checkpoint.Restored(None, step, FACTS | {"config": encode(before)}, "id"))
    return lines


@pytest.mark.parametrize(
    ("slow_warmup", "step", "grows_over"),
    [(None, 10, [(10, 20)]), (0.5, 10, []), (4, 2, [])],
    ids=["the whole run", "half of it, which is over", "steps"],
)
def test_a_slow_average_that_warms_up_over_the_run_changes_with_it(slow_warmup, step, grows_over, tmp_path):
    optimizer = AdEMAMixConfig(slow_warmup=slow_warmup)
    short, long = (run_config(optimizer=optimizer, trainer={"num_train_steps": steps}) for steps in (10, 20))
    assert [line for line in resuming_says(short, long, step, tmp_path) if "alpha" in line] == [
        f"the schedule changed: alpha and b3 grew over {before} steps and now grow over {after}; "
        f"set optimizer.slow_warmup to {before} to keep the old schedule"
        for before, after in grows_over
    ]


@pytest.mark.parametrize(("windows", "best"), [("20", 6), ("3", 12)], ids=["the same windows", "others"])
def test_other_validation_windows_have_a_best_of_their_own(windows, best, finished_run, tmp_path, monkeypatch):
    run_dir = finished_run.copy(tmp_path / "run", steps=[6])
    assert checkpoint.read_step(run_dir / "checkpoints", 6).metadata["best"]["step"] == 6
    monkeypatch.setattr(Evaluator, "__call__", lambda *arguments: Evaluation(99.0, 99.0, 1, 1))
    assert main(["--resume", str(run_dir), "--trainer.evaluation_windows", windows]) == 0
    found = checkpoint.read_step(run_dir / "checkpoints", 12).metadata
    assert found["metrics"]["validation/loss"] == 99
    assert found["best"]["step"] == best


def test_a_best_evaluation_that_was_not_saved_outlasts_a_stop(config_file, tmp_path, monkeypatch, stop_after):
    run_dir = tmp_path / "run"
    losses = iter([5.0, 3.0, *[4.0] * 4])
    monkeypatch.setattr(Evaluator, "__call__", lambda *arguments: Evaluation(next(losses), 1.0, 1, 1))
    command = ["--config", str(config_file), "--optimizer.type", "adamw", "--trainer.evaluate_every", "2"]
    stop_after(6)
    assert main([*command, "--trainer.run_dir", str(run_dir)]) == 130
    for _ in range(2):  # the second time, the run has nothing left to do
        result = train(resume=run_dir, quiet=True)
        assert (result.step, result.best_step, result.best_validation_loss) == (12, 4, 3.0)
    found = checkpoint.read_step(run_dir / "checkpoints", 12).metadata
    assert (found["best"]["step"], found["best_evaluation"]["step"]) == (6, 4)


def test_a_damaged_newest_checkpoint_falls_back_loudly(finished_run, tmp_path, capfd):
    run_dir = finished_run.copy(tmp_path / "run")
    chunk = next(p for p in (run_dir / "checkpoints/step-00000012").rglob("c*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert main(["--resume", str(run_dir)]) == 0
    assert "step-00000012" in capfd.readouterr().out
    assert metrics(run_dir) == metrics(finished_run.path)
    assert checkpoint.steps(run_dir / "checkpoints") == [6, 12]


def test_no_whole_checkpoint_is_a_failure_and_never_a_new_start(finished_run, tmp_path, capfd):
    run_dir = finished_run.copy(tmp_path / "run")
    for manifest in run_dir.rglob("manifest.json"):
        manifest.write_text("{}")
    assert main(["--resume", str(run_dir)]) == 1
    assert "error: " in capfd.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(finished_run, tmp_path, capfd):
    run_dir = finished_run.copy(tmp_path / "run")
    before = (run_dir / "config.yaml").read_text()
    assert main(["--resume", str(run_dir), "--model.embed_dim", "32"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "wte" in error and "16" in error and "32" in error
    assert (run_dir / "config.yaml").read_text() == before
    # The same shapes do not make the same model.
    assert main(["--resume", str(run_dir), "--model.num_heads", "4"]) == 2
    assert "different model or optimizer: leaf" in capfd.readouterr().err
    # Another optimizer's state does not fit either.
    assert main(["--resume", str(run_dir), "--optimizer.type", "adamw"]) == 2
    assert "optimizer_state" in capfd.readouterr().err
    # Nor does another text, even of the same size, which would not be the same run.
    other = write_text(tmp_path)
    other.write_text(other.read_text().replace("times", "TIMES"))
    cache = ["--data.cache_dir", str(tmp_path / "cache")]
    assert main(["--resume", str(run_dir), "--data.train", str(other), *cache]) == 2
    assert "the training text has changed since the run began" in capfd.readouterr().err
    # A run directory that has lost its checkpoints has nothing to resume from.
    shutil.rmtree(run_dir / "checkpoints")
    assert main(["--resume", str(run_dir)]) == 2
    assert "contains no checkpoint" in capfd.readouterr().err


def test_another_dtype_only_when_asked(finished_run, tmp_path, capfd):
    run_dir = finished_run.copy(tmp_path / "run")
    options = {"optimizer.momentum_dtype": "bfloat16"}
    more = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["--resume", str(run_dir), *more]) == 2
    assert "leaf optimizer_state.momentum" in capfd.readouterr().err
    assert main(["--resume", str(run_dir), *more, "--trainer.cast_checkpoint", "true"]) == 0
    config = load_config(run_dir / "config.yaml", [*options.items(), ("trainer.cast_checkpoint", "true")])
    state = Run(config, RunDirectory(run_dir, "always"), Console(1, silent=True)).resume()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.optimizer_state.momentum)} == {"bfloat16"}


def test_a_run_directory_has_one_process_at_a_time(config_file, tmp_path, capfd, after_step, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    run_dir = tmp_path / "run"

    def lock_and_stop() -> None:
        with (run_dir / ".lock").open("a") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        signal.raise_signal(signal.SIGINT)

    after_step(0, lock_and_stop)
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 130
    capfd.readouterr()
    # The run has released its lock, so this test can take it as another process would.
    with (run_dir / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert main(["--resume", str(run_dir)]) == 2
    out, err = capfd.readouterr()
    assert f"{run_dir} is in use by another process" in err and err.count("\n") == 1
    assert read_status(out.splitlines()[-1]) == Failure("directory_in_use", err.removeprefix("error: ").rstrip())
