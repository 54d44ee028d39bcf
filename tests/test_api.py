"""Training called from Python."""

import importlib
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from sophia_levanter import checkpoint, train
from sophia_levanter.config.command_line import load_config
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.run.run import Run
from tiny_runs import metrics


def test_a_call_trains_as_the_command_does(config_file, finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr("sophia_levanter.run.run.peak_flops", lambda devices: len(devices) * 1e12)
    result = train(config_file, trainer={"run_dir": tmp_path / "run"})
    assert metrics(result.run_dir) == metrics(finished_run.path)
    assert (result.run_dir, result.step, result.stopped_by) == (tmp_path / "run", 12, None)
    assert result.train_loss == metrics(finished_run.path)[11]
    assert result.validation_loss == result.metrics["validation/loss"] < result.train_loss + 0.5
    assert (result.best_step, result.best_validation_loss) == (12, result.validation_loss)
    assert result.checkpoint == str(tmp_path / "run" / "checkpoints" / "step-00000012")
    flops = abstract_model(load_config(config_file).model, 257).flops_per_token
    rate = result.metrics["train/tokens_per_second"]
    assert result.metrics["train/mfu"] == pytest.approx(rate * flops / (8 * 1e12))
    again = train(resume=result.run_dir)
    assert (again.step, again.checkpoint, again.best_validation_loss) == (12, result.checkpoint, result.validation_loss)
    assert again.metrics == pytest.approx(result.metrics)


def test_overrides_are_sections_or_dotted_names(config_file, tmp_path, monkeypatch):
    """The run ends where it would begin to train."""
    monkeypatch.setattr(Run, "start", lambda run: SimpleNamespace(step=0))
    monkeypatch.setattr(Run, "train", lambda run, state: state)
    monkeypatch.setattr(Run, "finish", lambda run, state: SimpleNamespace(stopped_by=None))
    overrides = {"trainer.run_dir": tmp_path / "run", "trainer.evaluate_every": np.int64(4)}
    overrides["trainer.batch_size_changes"] = [{"step": np.int64(2), "batch_size": np.int32(8)}]
    optimizer = {"learning_rate": np.float32(0.5), "rho": np.array(0.25), "warmup": 0, "b1": 0}
    train(load_config(config_file), optimizer=optimizer, trainer={"num_train_steps": 4}, **overrides)
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert (saved.optimizer.learning_rate, saved.optimizer.rho, saved.optimizer.b1) == (0.5, 0.25, 0.0)
    assert (saved.trainer.num_train_steps, saved.trainer.evaluate_every) == (4, 4)
    assert [(change.step, change.batch_size) for change in saved.trainer.batch_size_changes] == [(2, 8)]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {}, "train(): config is missing; pass a YAML file, a TrainConfig or a mapping of sections"),
        (["nowhere.yaml"], {}, "nowhere.yaml: file not found"),
        ([{}], {"optimizer": {"learning_rat": 1}}, "train(): unknown key 'optimizer.learning_rat'; did you mean"),
        ([{}], {"learning_rate": 1.0}, "train(): unknown key 'learning_rate'; did you mean optimizer.learning_rate?"),
        ([{}], {"optimizer": {"rho": "x"}}, "train(): optimizer.rho is 'x'; it must be a finite number"),
        ([{}], {"trainer": 3}, "train(): trainer is 3; it must be a mapping of fields"),
        ([{}], {"resume": "runs/x"}, "train(): config cannot be combined with resume"),
        ([], {"resume": "nowhere"}, "--resume nowhere: the directory does not exist"),
        ([], {"resume": "x", "trainer": {"run_dir": "y"}}, "train(): trainer.run_dir cannot be combined with resume x"),
    ],
)
def test_bad_input_is_one_line(arguments, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        train(*arguments, **options)
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_raised_after_the_save(config_file, finished_run, tmp_path, stop_after):
    run_dir = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop_after(3, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config_file, trainer={"run_dir": run_dir})
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    stopped_at = checkpoint.steps(run_dir / "checkpoints")[-1]
    assert 4 <= stopped_at < 12
    assert train(config_file, trainer={"run_dir": run_dir}, resume="auto").step == 12
    assert metrics(run_dir) == metrics(finished_run.path)


@pytest.mark.slow
def test_the_programs_own_handler_gets_sigterm_after_the_save(config_file, tmp_path, stop_after):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(checkpoint.steps(tmp_path / "run" / "checkpoints")))
    try:
        stop_after(3, signal.SIGTERM)
        result = train(config_file, trainer={"run_dir": tmp_path / "run"})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [[result.step]]
    assert (result.stopped_by, result.step < 12) == (signal.SIGTERM, True)


@pytest.mark.slow
def test_threads_train_one_after_the_other(config_file, finished_run, tmp_path, monkeypatch):
    """In a directory that each gets for itself, although they begin in the same second."""
    monkeypatch.chdir(tmp_path)
    results = []
    threads = [threading.Thread(target=lambda: results.append(train(config_file, quiet=True))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({result.run_dir for result in results}) == 2
    assert [metrics(result.run_dir) for result in results] == [metrics(finished_run.path)] * 2


@pytest.mark.slow
def test_a_run_from_before_a_leaf_was_added_goes_on(finished_run, tmp_path):
    run_dir, new = finished_run.copy(tmp_path / "run"), "optimizer_state.steps_since_refresh"
    checkpoints = run_dir / "checkpoints"
    old = checkpoint.read_step(checkpoints, 6)
    arrays = dict(checkpoint.read_arrays(checkpoints, old))
    assert arrays.pop(new) == 3
    for step in (6, 12):
        checkpoint.remove(checkpoints, step)
    kept = checkpoint.Retention(2)
    checkpoint.save(checkpoints, 6, arrays, run_id=old.run_id, metadata=old.metadata, retention=kept)
    train(resume=run_dir)
    assert metrics(run_dir) == metrics(finished_run.path)
    assert dict(checkpoint.read_arrays(checkpoints, checkpoint.read_step(checkpoints, 12)))[new] == 3


def test_names_that_moved_can_still_be_imported():
    old, new = (importlib.import_module(f"sophia_levanter.{m}") for m in ("models.huggingface", "interop.state_dict"))
    assert all(getattr(old, name) is getattr(new, name) for name in ("gpt2_from_state_dict", "gpt2_to_state_dict"))
