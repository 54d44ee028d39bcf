"""What a study's records say, arm by arm; costs by hand; speed-ups by hand, and against curves of which it is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

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
    draw_luck,
    draw_means,
    finished,
    flops_per_token,
    lengths,
    reach,
    seconds_per_step,
    speed_ups,
    tokens_per_step,
)
from sophia_levanter.studies.study import PlannedRun

QUARTERS = TrainerConfig(num_train_steps=10_000, batch_size=32, microbatch_size=8)
MODEL = Gpt2Config(num_layers=3, num_heads=2, embed_dim=8, seq_len=64)
# Of each of three layers: queries, keys, values and their projection 8 x 8, and the MLP's 8 x 32 and 32 x 8.
PER_TOKEN = 3 / (32 * 64)
LENGTHS = [100, 200, 400, 800]


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


@pytest.mark.parametrize(
    ("wanted", "length", "bound"),
    [
        (3.5, 100 * math.sqrt(2), ""),  # half way in the loss is half way in the logarithm
        (3.25, 100 * 2**0.75, ""),
        (3.0, 200, ""),
        (2.0, 400, ""),
        (4.0, 100, ""),
        (4.5, 100, ">"),
        (1.5, 400, "<"),
    ],
)
def test_the_length_that_reaches_a_loss(wanted, length, bound):
    found = reach(wanted, [100, 200, 400], [4.0, 3.0, 2.0])
    assert found == (pytest.approx(length), bound)


def test_the_first_crossing_counts():
    assert reach(3.0, [100, 200, 400, 800], [4.0, 3.0, 3.5, 2.0]) == (pytest.approx(200), "")
    assert reach(3.2, [100, 200, 400], [3.0, 4.0, 2.0]) == (100, ">")


def test_from_a_length_that_diverged_nothing_is_interpolated():
    assert reach(3.0, [100, 200, 400], [math.inf, 2.5, 2.0]) == (pytest.approx(200), "")
    assert reach(3.0, [100, 200], [4.0, math.inf]) == (200, "<")
    assert reach(2.25, [100, 200, 400], [2.5, math.inf, 2.0]) == (pytest.approx(400), "")


def power_law(tokens: float) -> float:
    return 1.5 + 20 * tokens**-0.5


def arm(make_cell, name, speed, spreads=(0.0,), lengths=LENGTHS):
    """Cells of an arm that needs 1/speed of the tokens, with seeds that are this far off."""
    return [make_cell(name, t, [power_law(speed * t) + d for d in spreads]) for t in lengths]


def test_against_itself_it_is_one(make_cell):
    cells = arm(make_cell, "a", 1.0, (0.0, 0.01, -0.02))
    found = speed_ups(cells, "a", "a")
    assert [s.tokens for s in found] == LENGTHS
    for s in found:
        assert (s.factor, s.bound, s.seeds) == (pytest.approx(1.0), "", 3)
        assert (s.low, s.high) == (pytest.approx(1.0), pytest.approx(1.0))


def test_twice_as_fast_is_two(make_cell):
    cells = arm(make_cell, "slow", 1.0) + arm(make_cell, "fast", 2.0)
    found = speed_ups(cells, "fast", "slow")
    # Lengths a factor of two apart need no interpolation; at the shortest it is only known to be faster.
    assert [s.bound for s in found] == [">", "", "", ""]
    assert [s.factor for s in found] == pytest.approx([1.0, 2.0, 2.0, 2.0])
    assert [s.factor for s in speed_ups(cells, "slow", "fast")] == pytest.approx([0.5, 0.5, 0.5, 1.0])
    assert [s.bound for s in speed_ups(cells, "slow", "fast")] == ["", "", "", "<"]


def test_between_the_lengths_it_is_two_up_to_the_curvature_of_the_law(make_cell):
    slow = arm(make_cell, "slow", 1.0, lengths=[283, 566])
    found = speed_ups(slow + arm(make_cell, "fast", 2.0), "fast", "slow")
    assert [s.factor for s in found] == pytest.approx([2.0, 2.0], rel=0.05)
    assert all(s.factor != pytest.approx(2.0, rel=1e-4) for s in found)


def test_each_length_has_its_own_best_point(make_cell):
    slow = arm(make_cell, "slow", 1.0)
    fast = [
        make_cell("fast", t, [power_law(speed * t)], rate=speed)
        for t in LENGTHS
        for speed in (0.5, 2.0 if t < 300 else 1.0)
    ]
    assert [s.factor for s in speed_ups(slow + fast, "fast", "slow")] == pytest.approx([1.0, 2.0, 2.0, 1.0])


def test_one_seed_has_no_interval(make_cell):
    cells = arm(make_cell, "slow", 1.0, (0.0, 0.1)) + arm(make_cell, "fast", 2.0)
    assert {(s.low, s.high, s.seeds) for s in speed_ups(cells, "fast", "slow")} == {(None, None, 1)}


def test_seeds_are_paired(make_cell):
    """What a seed does to both arms alike is no uncertainty; the same seeds the other way round are."""
    slow = arm(make_cell, "slow", 1.0, (0.1, 0.0, -0.1))
    alike = speed_ups(slow + arm(make_cell, "fast", 2.0, (0.1, 0.0, -0.1)), "fast", "slow")[2]
    assert (alike.low, alike.high) == (pytest.approx(alike.factor), pytest.approx(alike.factor))
    against = speed_ups(slow + arm(make_cell, "fast", 2.0, (-0.1, 0.0, 0.1)), "fast", "slow")[2]
    assert against.factor == pytest.approx(alike.factor)
    assert against.low < 0.9 * alike.factor and against.high > 1.1 * alike.factor


def test_the_interval_holds_the_truth_about_as_often_as_it_says(make_cell):
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(40):
        slow, fast = (
            [make_cell(name, t, [power_law(speed * t) + e for e in rng.normal(0, 0.01, 3)]) for t in lengths]
            for name, speed, lengths in (("slow", 1.0, [400]), ("fast", 2.0, LENGTHS))
        )
        (s,) = speed_ups(slow + fast, "fast", "slow")
        assert s.low < s.factor < s.high
        inside += s.low <= 2.0 <= s.high
    assert inside >= 35


@pytest.mark.parametrize("num_seeds", [2, 3, 8])
def test_means_have_the_quantiles_of_a_t_distribution(num_seeds):
    losses = np.stack([np.arange(num_seeds) * 0.01 + 2, np.arange(num_seeds) * 0.02 + 3])
    slow, fast = draw_means(losses, np.random.default_rng(0))
    error = 0.01 * np.arange(num_seeds).std(ddof=1) / math.sqrt(num_seeds)
    expected = stats.t(num_seeds - 1).interval(0.8)
    for draws, mean, scale in ((slow, losses[0].mean(), error), (fast - slow, 1 + losses[0].mean() - 2, error)):
        found = (np.quantile(draws, (0.1, 0.9)) - mean) / scale
        assert found == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("num_seeds", [4, 16])
def test_the_ends_of_the_interval(make_cell, num_seeds):
    """The baseline's mean over a few seeds has a t distribution, and the other arm has none."""
    slow = arm(make_cell, "slow", 1.0, (0.05, -0.05) * (num_seeds // 2))
    found = speed_ups(slow + arm(make_cell, "fast", 2.0, (0.0,) * num_seeds), "fast", "slow")[2]
    error = 0.05 / math.sqrt(num_seeds - 1)
    losses = [power_law(400) + error * t for t in stats.t(num_seeds - 1).interval(0.95)]
    low, high = (400 / reach(loss, LENGTHS, [power_law(2 * t) for t in LENGTHS])[0] for loss in losses)
    assert math.log(found.low / 2) == pytest.approx(math.log(low / 2), rel=0.15)
    assert math.log(found.high / 2) == pytest.approx(math.log(high / 2), rel=0.15)


def test_the_interval_includes_luck_in_tuning(make_cell):
    """Of four points tried: in (1 / 2)^4 of the searches, the best is 0.1 worse or more."""
    slow = arm(make_cell, "slow", 1.0, (0.0, 0.0))
    fast = [
        make_cell("fast", t, [power_law(2 * t) + worse] * 2, point=i)
        for t in LENGTHS
        for i, worse in enumerate((0.0, 0.0, 0.1, 9.0))
    ]
    alone = [cell for cell in fast if cell.point["point"] == 0]
    (s, t) = (speed_ups(slow + cells, "fast", "slow")[2] for cells in (alone, fast))
    assert (s.factor, s.low, s.high) == pytest.approx((2.0, 2.0, 2.0))
    assert t.factor == pytest.approx(2.0)
    assert t.low < 1.95 and t.high > 2.05
    reverse = speed_ups(slow + fast, "slow", "fast")[1]
    assert reverse.low < 0.49 and reverse.high > 0.51


def test_luck_is_symmetric_and_none_for_one_point():
    random = np.random.default_rng(0)
    luck = draw_luck([2.0, 2.1, math.inf, 2.5], random)
    assert np.mean(luck > 0) == pytest.approx(np.mean(luck < 0), abs=0.03)
    assert {round(abs(x), 6) for x in luck} == {0.0, 0.1, 0.4, 0.5}
    # The best of three points that are drawn is the first, second or third with these probabilities.
    assert np.mean(luck == 0) == pytest.approx(sum(p**2 for p in (19 / 27, 7 / 27, 1 / 27)), abs=0.03)
    assert not draw_luck([2.0, math.inf], random).any() and not draw_luck([math.inf], random).any()


def test_points_of_which_all_diverged_have_no_luck(make_cell):
    bad = [make_cell("bad", t, [None, None], point=i) for t in LENGTHS for i in range(2)]
    found = speed_ups(arm(make_cell, "slow", 1.0, (0.0, 0.0)) + bad, "bad", "slow")
    assert [(s.factor, s.bound, s.high) for s in found] == [(t / 800, "<", t / 800) for t in LENGTHS]


def test_only_seeds_that_both_have_are_drawn(make_cell):
    slow = [make_cell("slow", t, {0: power_law(t), 1: power_law(t), 7: 9.0}) for t in LENGTHS]
    fast = [make_cell("fast", t, {0: power_law(2 * t), 1: power_law(2 * t), 8: 1.0}) for t in LENGTHS]
    s = speed_ups(slow + fast, "fast", "slow")[2]
    assert (s.seeds, s.low, s.high) == (2, pytest.approx(2.0), pytest.approx(2.0))
    assert s.factor == pytest.approx(2.0)


def test_an_arm_that_diverged_throughout_reaches_nothing(make_cell):
    cells = arm(make_cell, "slow", 1.0) + [make_cell("bad", t, [None]) for t in LENGTHS]
    found = speed_ups(cells, "bad", "slow")
    assert [(s.factor, s.bound) for s in found] == [(t / 800, "<") for t in LENGTHS]


def test_a_seed_that_diverged_widens_the_interval(make_cell):
    cells = arm(make_cell, "slow", 1.0, (0.0, 0.0)) + [
        make_cell("fast", t, [power_law(2 * t), None if t == 800 else power_law(2 * t)]) for t in LENGTHS
    ]
    s = speed_ups(cells, "fast", "slow")[3]
    assert (s.factor, s.low, s.high) == (pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0))
    s = speed_ups([c for c in cells if c.arm == "slow" or c.tokens == 800], "fast", "slow")[3]
    assert (s.factor, s.bound, s.low, s.high) == (1.0, "<", 1.0, 1.0)
    assert (s.low_bound, s.high_bound) == ("<", ">")


def test_a_length_at_which_the_baseline_diverged_sets_no_target(make_cell):
    slow = [*arm(make_cell, "slow", 1.0, lengths=LENGTHS[:2]), make_cell("slow", 400, [None])]
    found = speed_ups(slow + arm(make_cell, "fast", 2.0), "fast", "slow")
    assert [s.tokens for s in found] == [100, 200]


def test_without_results_there_is_none(make_cell):
    cells = arm(make_cell, "slow", 1.0)
    assert speed_ups(cells, "fast", "slow") == speed_ups(cells, "slow", "fast") == []
