import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.config.optimizer import OptimizerConfig
from sophia_levanter.config.schedule import ScheduleConfig


def at(schedule, steps):
    return [float(schedule(jnp.asarray(step, jnp.int32))) for step in steps]


def make(kind, **changes):
    given = {"learning_rate": 2.0, "final_learning_rate": 0.4, "warmup_steps": 4} | changes
    schedule = ScheduleConfig.get_known_choices()[kind]()
    return OptimizerConfig(**given, schedule=schedule).build_schedule(12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warmup_starts_at_zero_and_reaches_the_peak(kind):
    assert at(make(kind), range(5)) == pytest.approx([0, 0.5, 1, 1.5, 2], abs=1e-7)


def test_cosine():
    # Two, four and six eighths of the way: final + (peak - final) (1 + cos(pi share)) / 2.
    wanted = [1.2 + 0.8 * np.sqrt(0.5), 1.2, 1.2 - 0.8 * np.sqrt(0.5), 0.4]
    assert at(make("cosine"), [6, 8, 10, 12]) == pytest.approx(wanted, abs=1e-6)


def test_linear():
    assert at(make("linear"), [6, 8, 10, 12]) == pytest.approx([1.6, 1.2, 0.8, 0.4], abs=1e-6)


@pytest.mark.parametrize(("kind", "end"), [("cosine", 0.4), ("linear", 0.4), ("constant", 2.0)])
def test_stays_at_the_end_value(kind, end):
    assert at(make(kind), [12, 13, 1000]) == pytest.approx([end] * 3, abs=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_no_warmup_starts_at_the_peak(kind):
    assert at(make(kind, warmup_steps=0), [0]) == [2.0]


def test_decay_to_zero():
    assert at(make("cosine", final_learning_rate=0.0), [8, 12]) == pytest.approx([1, 0], abs=1e-7)


def test_warmup_over_the_whole_run():
    assert at(make("cosine", warmup_steps=12), [0, 6, 11, 12]) == pytest.approx([0, 1, 11 / 6, 2], abs=1e-6)


def test_compiles():
    schedule = make("cosine")
    assert jax.jit(schedule)(jnp.int32(8)) == pytest.approx(1.2, abs=1e-6)
