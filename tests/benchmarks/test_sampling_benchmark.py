import jax
import numpy as np

from sophia_levanter.benchmarks import sampling
from sophia_levanter.config.command_line import load_config
from sophia_levanter.models.gpt2 import Gpt2


def test_both_draw_the_same_tokens(tiny):
    """Up to where the context is full; there the old way moves it on by one."""
    model = Gpt2.init(load_config(tiny).model, vocab_size=257, key=jax.random.key(0))
    whole = np.asarray(sampling.by_whole_contexts(model, 8)).tolist()
    assert sampling.with_cache(model, 2, 8) == [[token, token] for token in whole]


def test_time_is_per_token(tiny, monkeypatch):
    taken = {"whole contexts": 8.0, "1 row, 8 tokens": 4.0, "1 row, 16 tokens": 4.0, "4 rows, 8 tokens": 16.0}
    monkeypatch.setattr(
        sampling, "seconds_in_turns", lambda runs, rounds: {name: np.full(rounds, taken[name]) for name in runs}
    )
    timings = sampling.measure(load_config(tiny), 257, [8, 16], [4], 2)
    assert [(t.name, t.milliseconds.median, t.beside.median) for t in timings] == [
        ("whole contexts", 1000, 1),
        ("1 row, 8 tokens", 500, 2),
        ("1 row, 16 tokens", 250, 4),
        ("4 rows, 8 tokens", 500, 2),
    ]


def test_main_prints_a_table(tiny, capsys):
    sampling.main(["--config", str(tiny), "--lengths", "4", "20", "--rows", "2", "--rounds", "2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
