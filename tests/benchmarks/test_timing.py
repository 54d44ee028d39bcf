import numpy as np

from sophia_levanter.benchmarks.timing import markdown_table, seconds_in_turns, spread


def test_things_take_turns_after_one_run_that_is_not_timed():
    order = []
    seconds = seconds_in_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2)
    assert "".join(order) == "ab" * 3
    assert {name: s.shape for name, s in seconds.items()} == {"a": (2,), "b": (2,)}
    assert all((s > 0).all() for s in seconds.values())


def test_spread_is_median_and_quartiles():
    assert spread(np.arange(9)) == (2, 4, 6)
    assert str(spread([1, 2, 4])) == "2.000 (1.500 to 3.000)"


def test_markdown_table():
    assert markdown_table(["a", "b"], [(1, "x"), (2, "y")]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"
