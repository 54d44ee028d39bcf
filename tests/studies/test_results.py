"""What a study's records say, arm by arm, and costs by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig, LionConfig, SoapConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import SophiaGConfig, SophiaHConfig
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.studies.panels import AXES
from sophia_levanter.studies.results import (
    as_run,
    best,
    collect,
    finished,
    flops_per_token,
    lengths,
    seconds_per_step,
    tokens_per_step,
)
from sophia_levanter.studies.study import PlannedRun

QUARTERS = TrainerConfig(num_train_steps=10_000, batch_size=32, microbatch_size=8)
MODEL = Gpt2Config(num_layers=3, num_heads=2, embed_dim=8, seq_len=64)
# Of each of three layers: queries, keys, values and their projection 8 x 8, and the MLP's 8 x 32 and 32 x 8.
PER_TOKEN = 3 / (32 * 64)


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


def test_seeds_that_selected_a_point_do_not_count_at_it(make_record):
    runs = [replace(planned("a", 0.1), tuning=True), planned("a", 0.1, seed=1), replace(planned("a", 0.2), tuning=True)]
    cells = collect(
        runs, [make_record(run.config, loss=loss) for run, loss in zip(runs, (2.0, 2.5, 2.25), strict=True)]
    )
    assert [(cell.mean, cell.seeds, cell.tuning_loss) for cell in cells] == [(2.5, [1], 2.0), (2.25, [0], 2.25)]
    # The second point has the lower mean, but was not selected.
    assert best(cells, "a", 100) is cells[0]


def test_the_seed_that_tunes_may_be_the_last_in_the_study(make_record):
    runs = [planned("a", 0.1), planned("a", 0.1, seed=1), replace(planned("a", 0.1, seed=3), tuning=True)]
    (cell,) = collect(
        runs, [make_record(run.config, loss=loss) for run, loss in zip(runs, (2.0, 2.5, 1.0), strict=True)]
    )
    assert (cell.seeds, cell.mean, cell.tuning_loss) == ([0, 1], 2.25, 1.0)


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


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        (AdamWConfig(), 0.0),
        (LionConfig(), 0.0),
        (SophiaGConfig(interval=10, curvature_batch_fraction=1.0), 2 / 3 / 10),
        (SophiaGConfig(interval=10, curvature_batch_fraction=0.5), 0.5 * 2 / 3 / 10),
        (SophiaGConfig(interval=1, curvature_batch_fraction=0.25), 0.25 * 2 / 3),
        # 20 steps with a refresh each, and every tenth of the others.
        (SophiaGConfig(interval=10, curvature_batch_fraction=1.0, initial_refreshes=20), 1018 * 2 / 3 / 10_000),
        # Only whole microbatches, and at least one.
        (SophiaGConfig(interval=10, curvature_batch_fraction=0.05), 0.25 * 2 / 3 / 10),
        (SophiaHConfig(interval=10, curvature_batch_fraction=0.5), 0.5 * 2 / 10),
        (SophiaHConfig(interval=5, curvature_batch_fraction=1.0, num_probes=3), 3 * 2 / 5),
        (SophiaHConfig(interval=10, curvature_batch_fraction=0.125, curvature_microbatch_size=4), 0.125 * 2 / 10),
    ],
)
def test_flops_of_a_token(optimizer, more, make_record):
    record = make_record(TrainConfig(optimizer=optimizer, trainer=QUARTERS), flops_per_token=6000.0)
    assert flops_per_token(record) == pytest.approx(6000.0 * (1 + more))


def test_a_batch_in_one_piece_refreshes_on_all_of_it(make_record):
    config = TrainConfig(optimizer=SophiaGConfig(curvature_batch_fraction=0.5), trainer=TrainerConfig(batch_size=32))
    assert flops_per_token(make_record(config, flops_per_token=1.0)) == pytest.approx(1 + 2 / 3 / 10)


def test_refreshes_are_spread_over_the_steps(make_record):
    config = TrainConfig(optimizer=SophiaGConfig(interval=4))
    assert seconds_per_step(make_record(config, seconds=[0.1, 0.3])) == pytest.approx((3 * 0.1 + 0.3) / 4)


def test_time_without_a_curvature_and_with_one_at_every_step(make_record):
    assert seconds_per_step(make_record(TrainConfig(optimizer=AdamWConfig()), seconds=[0.1, None])) == 0.1
    every = TrainConfig(optimizer=SophiaGConfig(interval=1))
    assert seconds_per_step(make_record(every, seconds=[None, 0.3])) == 0.3
    assert seconds_per_step(make_record(every, seconds=[None, None])) == 0.0


def test_tokens_of_a_step(make_record):
    config = TrainConfig(model=Gpt2Config(seq_len=64), trainer=TrainerConfig(batch_size=6))
    assert tokens_per_step(make_record(config)) == 384


def matrix_flops(optimizer, make_record):
    config = TrainConfig(model=MODEL, optimizer=optimizer, trainer=QUARTERS)
    return flops_per_token(make_record(config, flops_per_token=0.0))


@pytest.mark.parametrize(("max_size", "large"), [(32, 32), (8, 0)])
def test_work_on_matrices_of_soap(max_size, large, make_record):
    change = 4 * 2 * 2 * 8**3 + 2 * 2 * (8 * 8 * 32 + 8 * 32 * large)
    cubes = 4 * 2 * 8**3 + 2 * (8**3 + large**3)
    config = TrainConfig(
        model=MODEL,
        optimizer=SoapConfig(warmup=0, interval=4, basis_max_size=max_size),
        trainer=TrainerConfig(batch_size=32, num_train_steps=10),
    )
    # The basis turns at 0, 1, 2, 3, 4 and 8.
    wanted = (4 * change + (change + (4 + 8 / 3) * cubes) * 6 / 10) * PER_TOKEN
    assert flops_per_token(make_record(config, flops_per_token=0.0)) == pytest.approx(wanted)


@pytest.mark.parametrize(("max_size", "large"), [(32, 32), (8, 0)])
def test_work_on_matrices_of_a_kronecker_basis(max_size, large, make_record):
    into = 4 * 2 * 2 * 8**3 + 2 * 2 * (8 * 8 * 32 + 8 * 32 * large)
    cubes = 4 * 2 * 8**3 + 2 * (8**3 + large**3)
    settings = {"interval": 5, "basis": "kronecker", "basis_max_size": max_size}

    def wanted(step, estimate):
        """By how often a step and an estimate change coordinates."""
        return pytest.approx((step * into + ((estimate + 2) * into + (4 + 8 / 3) * cubes) / 5) * PER_TOKEN)

    once = SophiaGConfig(**settings, curvature_reduce="average_then_square")
    assert matrix_flops(once, make_record) == wanted(2, 1)
    apart = SophiaGConfig(**settings, curvature_batch_fraction=0.75, cautious=True)
    assert matrix_flops(apart, make_record) == wanted(3, 3)
    assert matrix_flops(SophiaHConfig(**settings, num_probes=2), make_record) == wanted(2, 4)
    assert matrix_flops(SophiaGConfig(), make_record) == 0


def test_a_record_is_drawn_as_its_run_was(make_record):
    config = TrainConfig(
        model=Gpt2Config(seq_len=64), optimizer=SophiaGConfig(interval=4, warmup=0),
        trainer=TrainerConfig(batch_size=6, num_train_steps=100),
    )  # fmt: skip
    record = make_record(
        config, seconds=[0.1, 0.3], validation=[[50, 2.5], [100, 2.0]], win_rate=[[1, None], [100, 0.5]]
    )
    run = as_run(record, "a")
    assert run.series["validation/loss"].values.tolist() == [2.5, 2.0] and not run.has_diverged
    np.testing.assert_array_equal(run.series["optim/win_rate"].values, [np.nan, 0.5])
    steps = np.array([0, 50, 100])
    tokens = steps * tokens_per_step(record)
    costs = {"steps": steps, "tokens": tokens, "flops": tokens * flops_per_token(record), "time": steps * 0.15}
    for axis in AXES:
        np.testing.assert_allclose(axis.positions(run, steps), costs[axis.key])
    untimed = as_run(make_record(config, seconds=[None, None]), "a")
    assert untimed.seconds_at(steps) is None


def test_the_run_that_is_drawn_of_an_arm(make_cell):
    cells = [make_cell("a", 100, [1.0]), make_cell("a", 200, [None, 2.0]), make_cell("b", 100, [None])]
    assert finished(cells, "a").loss == 2.0
    assert finished(cells, "b") is None and finished(cells, "c") is None
