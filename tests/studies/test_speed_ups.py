"""Speed-ups and their intervals, by hand and for curves whose speed-up is known."""

import math

import numpy as np
import pytest
from scipy import stats

from sophia_levanter.studies.results import draw_luck, draw_means, reach, speed_ups

LENGTHS = [100, 200, 400, 800]


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
