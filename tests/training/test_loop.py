import time
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.batch import batch_from_sequences
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError
from sophia_levanter.optim import AdamW
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training import loop as loop_module
from sophia_levanter.training.callbacks import Callback
from sophia_levanter.training.loop import CompiledSteps, Loop, compile_steps
from sophia_levanter.training.step import StepOutput, StepSettings, TrainState

STEPS, TOKENS, MFU_PER_RATE = 10, 8, 0.25
STEP_SECONDS, STALL_SECONDS = 0.1, 0.5


@jax.jit
def sleep(x):
    """A computation of STEP_SECONDS that runs beside the host."""

    def wait(x):
        time.sleep(STEP_SECONDS)
        return np.asarray(x)

    return jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), x)


def loop_of(**parts):
    """A loop of ten steps of two windows."""
    given = {name: MagicMock() for name in ("settings_of", "partition", "loader", "monitor", "evaluating", "saving")}
    given |= {"callbacks": [], "tokens_per_sequence": TOKENS // 2, "mfu_per_token_rate": MFU_PER_RATE}
    return Loop(config=TrainerConfig(num_train_steps=STEPS, batch_size=2), **given | parts)


@pytest.fixture
def rates_of():
    """The tokens a second that a loop of ten steps logs, where the host stalls before these batches or log lines."""

    def run(*, loading=(), logging=()):
        def load_all(step, total):
            for index in range(total):
                time.sleep(STALL_SECONDS * (index in loading))
                yield index

        class Log(Callback):
            def on_step(self, numbers):
                rates[numbers.step] = numbers.metrics["train/tokens_per_second"]
                assert numbers.metrics["train/mfu"] == MFU_PER_RATE * rates[numbers.step]
                mean_seconds = np.mean([TOKENS / rate for rate in rates.values()])
                assert numbers.seconds_left == pytest.approx((STEPS - 1 - numbers.step) * mean_seconds)
                time.sleep(STALL_SECONDS * (numbers.step in logging))

        def step(batch, state):
            loss = sleep(state.loss)
            output = StepOutput({"train/loss": loss, "train/grad_norm": loss}, np.bool_(False), np.int32(0))
            return SimpleNamespace(step=state.step + 1, refresh_pending=False, loss=loss, model=None), output

        rates = {}
        loop = loop_of(loader=SimpleNamespace(load_all=load_all), callbacks=[Log(None)])
        loop._last_time = time.perf_counter()
        optimizer = SimpleNamespace(refresh_due=lambda step: False)
        first = SimpleNamespace(step=0, refresh_pending=False, loss=jnp.float32(1), model=None)
        loop._steps(first, CompiledSteps(2, optimizer, step, step), SimpleNamespace(signal=None))
        assert loop.tokens_per_second == pytest.approx(STEPS / sum(1 / rate for rate in rates.values()))
        return list(rates.values())

    return run


def test_a_step_takes_as_long_as_its_result(rates_of):
    """Two steps that end while the host is busy are two steps long, and the second is not as fast as its log line."""
    rates = rates_of(loading=(2, 5), logging=(6,))
    assert len(rates) == STEPS
    assert max(rates) < 4 * TOKENS / STEP_SECONDS  # a busy machine sees some ends late


@pytest.mark.parametrize(("seconds", "is_ready", "stalls"), [(0.5, True, 1), (0.5, False, 0), (0.0, True, 0)])
def test_a_step_that_waits_for_its_batch_is_counted(seconds, is_ready, stalls, monkeypatch):
    """Only where the step before has ended: otherwise the devices are busy meanwhile."""
    clock = iter([10.0, 10.0 + seconds])
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    loop, running = loop_of(), {"train/loss": SimpleNamespace(is_ready=lambda: is_ready)}
    assert loop._next(iter(["batch"]), StepOutput(running, np.bool_(False), np.int32(0))) == "batch"
    assert loop.data_stalls == stalls


def test_the_step_that_refreshes_or_measures_or_both():
    measuring = CompiledSteps(2, None, "measured", "refreshing and measured")
    steps = CompiledSteps(2, None, "plain", "refreshing", measuring)
    assert [steps.at(refresh, False) for refresh in (False, True)] == ["plain", "refreshing"]
    assert [steps.at(refresh, True) for refresh in (False, True)] == ["measured", "refreshing and measured"]


def test_a_refresh_that_came_to_nothing_is_tried_again_at_the_next_step():
    refreshes = []

    def step(refresh, batch, state):
        refreshes.append(refresh)
        pending = refresh and sum(refreshes) < 3
        output = StepOutput({"train/loss": jnp.float32(1)}, np.bool_(pending), np.int32(0))
        return SimpleNamespace(step=state.step + 1), output

    loop = loop_of(loader=counting_loader())
    steps = CompiledSteps(
        2, SimpleNamespace(refresh_due=lambda step: step in (1, 6)), partial(step, False), partial(step, True)
    )
    loop._steps(SimpleNamespace(step=0, refresh_pending=False), steps, SimpleNamespace(signal=None))
    assert np.flatnonzero(refreshes).tolist() == [1, 2, 3, 6] and len(refreshes) == STEPS


def run_steps(loop, stop):
    """Run the loop with a step that only counts."""

    def step(batch, state):
        output = StepOutput({"train/loss": jnp.float32(1)}, np.bool_(False), np.int32(0))
        return SimpleNamespace(step=state.step + 1), output

    steps = CompiledSteps(2, SimpleNamespace(refresh_due=lambda step: False), step, step)
    loop._steps(SimpleNamespace(step=0, refresh_pending=False), steps, stop)


def counting_loader():
    return SimpleNamespace(load_all=lambda first, stop: iter(range(first, stop)))


class Failing(Callback):
    def is_due(self, done):
        return done == 3

    def on_pause(self, pause):
        raise InputError("failed")


def damaged(first, stop):
    yield from range(3)
    raise InputError("failed")


@pytest.mark.parametrize(("num_processes", "saved"), [(1, [3]), (2, [])])
@pytest.mark.parametrize(
    "parts",
    [
        {"loader": SimpleNamespace(load_all=damaged)},
        {"loader": counting_loader(), "callbacks": [Failing(None)]},
    ],
    ids=["corpus", "callback"],
)
def test_one_process_alone_does_not_start_a_save_of_all(parts, num_processes, saved, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: num_processes)
    monkeypatch.setattr(loop_module, "all_stop", lambda step, signalled: False)
    loop = loop_of(**parts)
    with pytest.raises(InputError, match="failed"):
        run_steps(loop, SimpleNamespace(signal=None))
    assert [call.args[0].done for call in loop.saving.save.call_args_list] == saved


class Evaluating(Callback):
    def is_due(self, done):
        return done == 3

    def on_pause(self, pause):
        pause.evaluated = True


@pytest.mark.parametrize(("stop_at", "evaluated"), [(0, False), (2, False), (3, True), (4, False)])
def test_a_stop_right_after_an_evaluation_saves_its_losses(stop_at, evaluated, monkeypatch):
    monkeypatch.setattr(loop_module, "all_stop", lambda step, signalled: step == stop_at)
    loop = loop_of(loader=counting_loader(), callbacks=[Evaluating(None)])
    run_steps(loop, SimpleNamespace(signal=None))
    (pause,) = (call.args[0] for call in loop.saving.save.call_args_list)
    assert (pause.done, pause.state.step, pause.evaluated, pause.stopping()) == (stop_at, stop_at, evaluated, True)


def test_all_callbacks_end_even_if_one_of_them_fails(monkeypatch):
    ended = []

    class Ending(Callback):
        def __init__(self, name):
            self.name = name

        def on_end(self):
            ended.append(self.name)
            if self.name == "full":
                raise OSError("No space left on device")

    loop = loop_of(callbacks=[Ending("first"), Ending("full"), Ending("last")])
    monkeypatch.setattr(Loop, "_compile", lambda self, state, step: None)
    monkeypatch.setattr(Loop, "_steps", lambda self, state, compiled, stop: state)
    with pytest.raises(OSError, match="No space left"):
        loop.run(SimpleNamespace(step=0), SimpleNamespace(signal=None))
    assert ended == ["first", "full", "last"]


def test_steps_are_compiled_once_for_runs_with_the_same_settings(make_model):
    traced = []

    def count(trees):
        traced.append(trees)
        return {}

    def compile_with(max_grad_norm):
        settings = StepSettings(optimizer, max_grad_norm=max_grad_norm, metrics=(("count", count),))
        with partition.active():
            compile_steps(settings, partition, batch, state, lambda line: None)

    optimizer, partition = AdamW(learning_rate=1e-3), partition_of(devices=jax.devices()[:1])
    state = partition.place(TrainState.init(make_model(), optimizer))
    batch = partition.place(batch_from_sequences(np.zeros((2, 9), np.int32)))
    numbers = []
    for max_grad_norm in (1.0, 1.0, 2.0, 1.0):
        compile_with(max_grad_norm)
        numbers.append(len(traced))
    assert numbers == [1, 1, 2, 2]
