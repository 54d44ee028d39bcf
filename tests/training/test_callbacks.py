"""Registered metrics and callbacks that are not what they should be."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import jax.numpy as jnp
import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.registries import CALLBACKS, METRICS
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError
from sophia_levanter.training.callbacks import Callback, Evaluating, Pause, build_callbacks
from sophia_levanter.training.metrics import scalars


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
        ({"a": jnp.ones(2)}, "s: own returns an array of shape (2,) for 'a'; it must be a scalar"),
    ],
)
def test_what_is_not_a_dict_of_scalars_is_refused(values, message):
    with pytest.raises(InputError) as error:
        scalars("s", "own", values)
    assert str(error.value) == message


def test_scalars_are_float32_by_name():
    found = scalars("s", "own", {"a": 1, 0: jnp.ones((), jnp.bfloat16)})
    assert found == {"own/a": 1, "own/0": 1}
    assert {value.dtype for value in found.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["train", "val", "own", "a name", "a/b"])
def test_names_are_identifiers_that_are_not_taken(name, registered):
    registered("own", Callback)
    with pytest.raises(ValueError, match=f"the metric '{name}' needs another name, an identifier that is not taken"):
        METRICS.register(name)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (dict, "trainer.callbacks: own fails: TypeError: 'TrainConfig' object is not iterable"),
        (lambda config: 7, "trainer.callbacks: own is not a subclass of sophia_levanter.training.callbacks.Callback"),
    ],
)
def test_what_is_not_a_callback_is_refused(value, message, registered):
    config = registered("own", value)
    with pytest.raises(InputError) as error:
        build_callbacks(config)
    assert str(error.value) == message


def test_a_state_is_saved_before_a_callback_ends_the_run(registered):
    class Own(Callback):
        def on_evaluation(self, pause, evaluation):
            return [evaluation.loss]

    callbacks = build_callbacks(registered("own", Own))
    saving, pause = MagicMock(), Pause(3, SimpleNamespace(model=None), lambda: False)
    evaluate = MagicMock(return_value=SimpleNamespace(loss=1.0, bits_per_byte=1.0))
    evaluating = Evaluating(TrainerConfig(), MagicMock(), evaluate, saving, callbacks)
    with pytest.raises(InputError, match=r"^trainer\.callbacks: own returns a list; it must return a dict$"):
        evaluating.on_pause(pause)
    saving.save.assert_called_once_with(pause)
    assert not pause.evaluated
