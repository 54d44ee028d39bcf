"""Registered metrics and callbacks that are not what they should be."""

import json
import math
import shutil
from typing import ClassVar
from unittest.mock import MagicMock

import jax.numpy as jnp
import pytest

from sophia_levanter import checkpoint
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.registries import CALLBACKS, METRICS
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError
from sophia_levanter.main import main
from sophia_levanter.training.callbacks import Callback, Evaluating, Monitor, Pause, RegisteredCallback, build_callbacks
from sophia_levanter.training.evaluation import Evaluation
from sophia_levanter.training.metrics import StepTrees, measure, scalars


@pytest.fixture
def registered(monkeypatch):
    """Registers something for a test."""

    def register(name, value):
        monkeypatch.setitem(CALLBACKS, name, value)
        return TrainConfig(trainer=TrainerConfig(callbacks=(name,)))

    return register


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "s: own returns a NoneType; it must return a dict"),
        ([1.0], "s: own returns a list; it must return a dict"),
        ({"a": "b"}, "s: own returns 'b' for 'a'; it must be a scalar"),
        ({"a": None}, "s: own returns None for 'a'; it must be a scalar"),
        ({"a": 1j}, "s: own returns 1j for 'a'; it must be a scalar"),
        ({"a": jnp.ones(2)}, "s: own returns an array of shape (2,) for 'a'; it must be a scalar"),
    ],
)
def test_what_is_not_a_dict_of_scalars_is_refused(values, message):
    with pytest.raises(InputError) as error:
        scalars("s", "own", values)
    assert str(error.value) == message


def test_scalars_by_name_keep_their_precision():
    assert scalars("s", "own", {"a": 0.1, 0: jnp.ones((), jnp.bfloat16)}) == {"own/a": 0.1, "own/0": 1}


def test_metrics_are_float32():
    own = ("own", lambda step: {"a": 1, "b": jnp.ones((), jnp.bfloat16)})
    found = measure([own], StepTrees(None, None, None, None))
    assert {value.dtype for value in found.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["train", "val", "own", "a name", "a/b"])
def test_names_are_identifiers_that_are_not_taken(name, registered):
    registered("own", Callback)
    with pytest.raises(ValueError, match=f"metric name '{name}' is reserved, already taken or not an identifier"):
        METRICS.register(name)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (dict, "trainer.callbacks: own failed: TypeError: 'TrainConfig' object is not iterable"),
        (lambda config: 7, "trainer.callbacks: own is not a subclass of sophia_levanter.training.callbacks.Callback"),
    ],
)
def test_what_is_not_a_callback_is_refused(value, message, registered):
    config = registered("own", value)
    with pytest.raises(InputError) as error:
        build_callbacks(config)
    assert str(error.value) == message


@pytest.fixture
def words(config_file, tmp_path):
    """The command line of a tiny run with AdamW."""
    return ["--config", str(config_file), "--optimizer.type", "adamw", "--trainer.run_dir", str(tmp_path / "run")]


class Recorder(Callback):
    """Notes what it is called with; fails where a test says so."""

    calls: ClassVar[list] = []
    fails: ClassVar[tuple] = ()

    def __init__(self, config):
        self.calls.clear()

    def note(self, *call):
        self.calls.append(call)
        if call == self.fails:
            raise KeyError("missing")

    def before_step(self, step):
        self.note("before", step)

    def on_step(self, report):
        self.note("step", report.step)

    def is_due(self, done):
        return done == 5

    def on_pause(self, pause):
        self.note("pause", pause.done)
        assert int(pause.state.step) == pause.done

    def on_evaluation(self, pause, evaluation):
        self.note("evaluation", pause.done)
        return {"loss": evaluation.loss}

    def on_end(self):
        self.note("end")


def test_a_callback_is_called_through_a_run(registered, words, tmp_path, capfd, monkeypatch):
    registered("own", Recorder)
    monkeypatch.setattr(Recorder, "fails", ("end",))
    assert main([*words, "--trainer.callbacks", "own"]) == 0
    assert "WARNING: trainer.callbacks: own failed in on_end: KeyError: 'missing'" in capfd.readouterr().out
    steps = list(range(12))
    by_kind = {kind: [call[1] for call in Recorder.calls if call[0] == kind] for kind, *_ in Recorder.calls[:-1]}
    assert by_kind == {"before": steps, "step": steps, "pause": [5], "evaluation": [6, 12]}
    # The numbers of all steps are there before a pause.
    assert Recorder.calls.index(("step", 4)) < Recorder.calls.index(("pause", 5)) < Recorder.calls.index(("before", 5))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {name: [line[name] for line in lines if name in line] for name in ("own/loss", "validation/loss")}
    assert losses["own/loss"] == losses["validation/loss"] and len(losses["own/loss"]) == 2
    # Neither a callback that is left out nor one that is gone makes it another run.
    last = tmp_path / "run" / "checkpoints" / "step-00000012"
    shutil.rmtree(last)
    assert main([*words, "--resume", "auto"]) == 0
    shutil.rmtree(last)
    monkeypatch.delitem(CALLBACKS, "own")
    assert main(["--resume", str(tmp_path / "run"), "--trainer.callbacks", "[]"]) == 0
    assert last.exists()


@pytest.mark.parametrize(("call", "method"), [(("pause", 5), "on_pause"), (("evaluation", 6), "on_evaluation")])
def test_a_state_is_saved_before_a_callback_ends_the_run(call, method, registered, words, tmp_path, capfd, monkeypatch):
    registered("own", Recorder)
    monkeypatch.setattr(Recorder, "fails", call)
    assert main([*words, "--trainer.callbacks", "own"]) == 2
    assert f"error: trainer.callbacks: own failed in {method}: KeyError: 'missing'" in capfd.readouterr().err
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == call[1]
    assert Recorder.calls[-1] == ("end",)


def test_a_slow_callback_is_not_taken_for_a_stuck_step():
    watchdog = MagicMock()
    callback = RegisteredCallback("own", Callback(TrainConfig()), Monitor(MagicMock(), MagicMock(), watchdog))
    calls = [("before_step", [0]), ("on_pause", [None]), ("on_evaluation", [None, None]), ("on_end", [])]
    for method, arguments in calls:
        watchdog.reset_mock()
        getattr(callback, method)(*arguments)
        watchdog.pause.assert_called_once_with()


def test_an_evaluation_that_is_nan_is_logged():
    """Without it, the evaluation before would seem to be the last."""
    monitor = Monitor(MagicMock(), MagicMock(), MagicMock())
    monitor.trackers.last = {}
    evaluation = Evaluation(math.nan, math.nan, 10, 0)
    evaluating = Evaluating(TrainerConfig(), monitor, lambda *_: evaluation, [])
    evaluating.on_pause(Pause(7, MagicMock(average=None), lambda: False))
    ((step, numbers), _) = monitor.trackers.log.call_args
    assert step == 6 and list(numbers) == ["validation/loss"] and math.isnan(numbers["validation/loss"])
    assert evaluating.best is None
