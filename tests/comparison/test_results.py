"""What a study's records say, arm by arm."""

import math

import pytest

from sophia_levanter.comparison.records import flat_config
from sophia_levanter.comparison.results import best, collect, lengths
from sophia_levanter.comparison.study import PlannedRun
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.optimizer import SophiaGConfig
from sophia_levanter.config.trainer import TrainerConfig


def test_mean_and_spread_over_seeds(make_cell):
    cell = make_cell("a", 100, [2.0, 3.0, 4.0])
    assert (cell.mean, cell.spread, cell.diverged) == (3.0, 1.0, 0)
    assert cell.losses() == [2.0, 3.0, 4.0]
    assert cell.losses([2, 2, 0]) == [4.0, 4.0, 2.0]


def test_one_seed_has_no_spread(make_cell):
    assert make_cell("a", 100, [2.0]).spread is None


def test_a_seed_that_diverged_is_infinite(make_cell):
    cell = make_cell("a", 100, [2.0, None])
    assert (cell.mean, cell.spread, cell.diverged) == (math.inf, None, 1)
    assert cell.losses([1, 0]) == [math.inf, 2.0]


def test_the_best_point_is_of_those_with_the_most_seeds(make_cell):
    lucky = make_cell("a", 100, [1.0], rho=1)
    good, bad = make_cell("a", 100, [2.0, 2.2], rho=2), make_cell("a", 100, [2.0, 2.4], rho=3)
    diverged = make_cell("a", 100, [1.0, None], rho=4)
    others = [make_cell("b", 100, [0.5, 0.5]), make_cell("a", 200, [0.5, 0.5])]
    cells = [lucky, diverged, bad, good, *others]
    assert best(cells, "a", 100) is good
    assert best([lucky, diverged], "a", 100) is diverged
    assert best(cells, "c", 100) is None
    assert lengths(cells, "a") == [100, 200]
    assert lengths(cells, "c") == []


def planned(arm: str, rho: float, seed: int = 0) -> PlannedRun:
    config = TrainConfig(optimizer=SophiaGConfig(rho=rho), trainer=TrainerConfig(seed=seed))
    return PlannedRun(arm, {"optimizer.rho": rho}, 100, seed, config)


def test_cells_are_the_planned_runs_that_are_done(make_record):
    runs = [planned("a", 0.1), planned("a", 0.2), planned("b", 0.1), planned("a", 0.1, seed=1)]
    records = [
        make_record(runs[3].config, loss=3.0),
        make_record(runs[0].config, loss=2.0),
        make_record(planned("a", 0.9).config),
    ]
    cells = collect(runs, records)
    # Two arms share a run; the one that is not asked for is in no cell.
    assert [(cell.arm, cell.point, cell.losses()) for cell in cells] == [
        ("a", {"optimizer.rho": 0.1}, [2.0, 3.0]),
        ("b", {"optimizer.rho": 0.1}, [2.0]),
    ]
    assert list(cells[0].records) == [0, 1]


@pytest.mark.parametrize("value", [1, None])
def test_a_record_of_a_later_version_breaks_nothing(value, make_record):
    run = planned("a", 0.1)
    later = make_record(config=flat_config(run.config) | {"optimizer.of_tomorrow": value}, loss=1.0)
    assert collect([run], [later]) == []
    assert collect([run], [later, make_record(run.config, loss=2.0)])[0].losses() == [2.0]
