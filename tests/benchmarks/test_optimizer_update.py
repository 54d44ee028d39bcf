import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.benchmarks import optimizer_update
from sophia_levanter.benchmarks.optimizer_update import WORDS, arrays, measure, updates


def test_the_model_has_the_parameters_asked_for():
    assert sum(x.size for x in arrays(1000, 0.0).values()) == 1000
    assert all(x.dtype == jnp.float32 for x in arrays(1000, 0.0).values())


def test_what_is_timed_steps_the_parameters():
    runs = updates(100)
    assert runs.keys() == WORDS.keys()
    copied = runs["copy"]()[0]
    jax.tree.map(np.testing.assert_array_equal, copied, arrays(100, 1e-3))
    for name in ("Sophia-G", "Sophia-G, finite given"):
        for _ in range(2):
            params, state = runs[name]()
        # h is 0, so each step is one of the sign, and decay.
        once = 1 - 1e-4 - 1e-4 * 0.2
        twice = once - 1e-4 - 1e-4 * 0.2 * once
        jax.tree.map(lambda p: np.testing.assert_allclose(p, twice, rtol=1e-6), params)  # noqa: B023
        assert int(state.count) == 2
    params, _ = runs["AdamW (optax)"]()
    jax.tree.map(lambda p: np.testing.assert_allclose(p, 1 - 1e-4 - 1e-5, rtol=1e-6), params)


def test_a_rate_is_bytes_over_seconds(monkeypatch):
    taken = {"copy": 2.0, "AdamW (optax)": 7.0, "Sophia-G": 12.0, "Sophia-G, finite given": 3.0}
    monkeypatch.setattr(
        optimizer_update, "seconds_in_turns", lambda runs, rounds: {k: np.full(rounds, v) for k, v in taken.items()}
    )
    copy, adamw, sophia, given = measure(1000, rounds=3)
    assert [r.gigabytes.median for r in (copy, adamw, sophia, given)] == pytest.approx([4e-6, 4e-6, 2e-6, 8e-6])
    assert (sophia.beside_copy.median, given.beside_adamw.median) == pytest.approx((0.5, 2))


def test_main_prints_a_table(capsys):
    optimizer_update.main(["--millions", "0.001", "0.002", "--rounds", "2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * len(WORDS)
    assert len({line.count("|") for line in lines}) == 1
