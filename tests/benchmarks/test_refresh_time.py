import jax
import numpy as np
import pytest

from sophia_levanter.benchmarks import refresh_time
from sophia_levanter.benchmarks.refresh_time import VARIANTS, measure, runs
from sophia_levanter.partition.mesh import partition_of

NAMES = {name for variant in VARIANTS for name in variant[1:]} | {"adamw"}


def curvature(state) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.optimizer_state.curvature)])


@pytest.mark.slow
def test_each_step_does_what_its_name_says(tiny):
    with partition_of(devices=jax.devices()[:1]).active():
        steps = runs(tiny, (), batch_size=30)
        assert steps.keys() == NAMES
        before, _ = steps["sophia plain"]()
        assert not curvature(before).any()
        for number, name in enumerate(("sophia_g whole", "sophia_g half", "two passes", "sophia_h"), start=1):
            h = curvature(before)
            state, _ = steps[name]()
            assert int(state.optimizer_state.refresh_count) == number
            assert np.abs(curvature(state) - h).max() > 0
            before = state
        before = nu(steps["optax plain"]()[0])
        assert not before.any()
        for name in ("optax whole", "optax fifteenth"):
            after = nu(steps[name]()[0])
            assert np.abs(after - before).max() > 0
            before = after
            np.testing.assert_array_equal(nu(steps["optax plain"]()[0]), before)


def nu(state) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.optimizer_state[0].nu)])


def test_the_amortised_step_is_a_mean_over_an_interval(tiny, monkeypatch):
    taken = dict.fromkeys(NAMES, 2.0)
    taken |= {"sophia_g whole": 3.0, "optax plain": 4.0, "optax whole": 24.0}
    monkeypatch.setattr(refresh_time, "runs", lambda *_: {})
    monkeypatch.setattr(
        refresh_time, "seconds_in_turns", lambda _, rounds: {k: np.full(rounds, v) for k, v in taken.items()}
    )
    costs = {c.variant: c for c in measure(tiny, (), batch_size=30, rounds=3, interval=5)}
    whole, half = costs["Sophia-G, whole batch"], costs["Sophia-G, half the batch"]
    assert (whole.amortised.median, whole.plain.median, whole.refresh.median) == pytest.approx((1.1, 1, 1.5))
    assert half.amortised.median == pytest.approx(1)
    assert costs["optax.contrib.sophia, whole batch"].amortised.median == pytest.approx((4 * 2 + 12) / 5)


def test_main_prints_a_table(tiny, capsys, monkeypatch):
    monkeypatch.setattr(refresh_time, "runs", lambda *_: dict.fromkeys(NAMES, lambda: None))
    refresh_time.main(["--config", str(tiny), "--models", "nano", "--rounds", "2", "--seq_len", "8"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(VARIANTS)
    assert len({line.count("|") for line in lines}) == 1


def test_a_batch_without_fifteenths_is_refused(capsys):
    with pytest.raises(SystemExit):
        refresh_time.main(["--batch_size", "8"])
    assert "multiple of 30" in capsys.readouterr().err
