"""Run directories become runs: metrics, costs, axes."""

import numpy as np
import pytest

from sophia_levanter.config.baselines import AdamWConfig
from sophia_levanter.config.trainer import BatchSizeChange
from sophia_levanter.errors import InputError
from sophia_levanter.studies.panels import AXES, STEPS
from sophia_levanter.studies.results import flops_per_token
from sophia_levanter.studies.runner import record_of
from sophia_levanter.studies.runs import has_diverged, read_metrics, read_run
from tiny_runs import run_config, step_lines, write_run


def test_metrics_are_series_of_steps_done(tmp_path):
    write_run(tmp_path, lines=[{"step": 0, "train/loss": 5.0}, {"step": 1, "train/loss": None}, {"step": 1, "v": 2}])
    series = read_metrics(tmp_path / "metrics.jsonl")
    assert series["train/loss"].steps.tolist() == [1, 2]
    np.testing.assert_array_equal(series["train/loss"].values, [5.0, np.nan])
    assert (series["v"].steps.tolist(), series["v"].last) == ([2], 2.0)


@pytest.mark.parametrize("rest", ['{"step": 2, "train/lo', '{"step"', "\0\0\0"])
def test_a_line_that_a_kill_cut_short_is_not_there(rest, tmp_path):
    write_run(tmp_path, lines=step_lines(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rest)
    assert read_metrics(tmp_path / "metrics.jsonl")["train/loss"].steps.tolist() == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[1]", "5", '{"train/loss": 1}', '{"step": "1"}', '{"step": 1, "train/loss": "low"}', "\xff", ""),
        *('{"step": 1.5}', '{"step": 1.0}', '{"step": -1}', '{"step": true}', '{"step": null}', '{"step": 2147483648}'),
        '{"step": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"step": 1, "a": 1' + "0" * 400 + "}",
        '{"step": 1, "a": 1' + "0" * 5000 + "}",
        '{"step": 1, "a": 1e200}',
        '{"step": 1, "a": {}}',
        '{"step": 1, "a": "' + "x" * 3_000_000 + '"}',
    ],
    ids=range(20),
)
def test_a_damaged_line_is_named(line, tmp_path):
    write_run(tmp_path, lines=[])
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "train/loss": 5}\n' + line.encode("latin1") + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    write_run(tmp_path, lines=[])
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "a": NaN}\n{"step": 1, "a": -Infinity}\n{"step": 2, "a": 1e999}\n'
    )
    assert np.isnan(read_metrics(tmp_path / "metrics.jsonl")["a"].values).all()


def test_steps_that_go_back_are_no_run(tmp_path):
    write_run(tmp_path, lines=[{"step": 4, "train/loss": 1.0}, {"step": 3, "train/loss": 1.0}])
    with pytest.raises(InputError, match="the steps of train/loss are not ascending"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("content", ["", '{"step": 0, "tr'])
def test_a_run_without_a_step(content, tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match="contains no steps yet"):
        read_run("a", tmp_path)


def test_what_is_no_run_directory(tmp_path):
    with pytest.raises(InputError, match=r"contains no config\.yaml"):
        read_run("a", tmp_path)
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"contains no metrics\.jsonl; specify the directory of a run that has started"
    ):
        read_run("a", tmp_path)


def positions(run) -> dict:
    return {axis.key: axis.positions(run, np.array([0, 3, 10])) for axis in AXES}


def test_axes_count_what_steps_take(tmp_path):
    lines = [line for line in step_lines(10) if "train/loss" in line]
    for line in lines:
        line["train/tokens_per_second"] = 50 / (0.5 if line["step"] < 3 else 0.1)
    run = read_run("a", write_run(tmp_path, lines=[*lines, *step_lines(10)[-1:]]))
    found = positions(run)
    assert found["steps"].tolist() == [0, 3, 10]
    assert found["tokens"].tolist() == [0, 150, 500]
    np.testing.assert_allclose(found["time"], [0, 1.5, 2.2])
    # As a study counts it: a refresh at every second step, two thirds of a gradient each.
    per_token = flops_per_token(record_of(run, diverged=False))
    assert per_token == pytest.approx((6 * (12 * 8**2 + 384 * 8) + 12 * 8 * 10) * (1 + 1 / 3))
    np.testing.assert_allclose(found["flops"], per_token * np.array([0, 150, 500]))


def test_axes_follow_the_batch_size(tmp_path):
    changes = (BatchSizeChange(2, 10), BatchSizeChange(6, 20))
    optimizer = AdamWConfig(warmup=0)
    lines = [line for line in step_lines(10) if "train/loss" in line]
    for line in lines:
        line["train/tokens_per_second"] = 100.0
    config = run_config(trainer={"batch_size_changes": changes}, optimizer=optimizer)
    run = read_run("a", write_run(tmp_path, config, lines))
    tokens = np.array([0, 2 * 50 + 100, 2 * 50 + 4 * 100 + 4 * 200])
    found = positions(run)
    np.testing.assert_allclose(found["tokens"], tokens)
    np.testing.assert_allclose(found["time"], tokens / 100)
    np.testing.assert_allclose(found["flops"], tokens * (6 * (12 * 8**2 + 384 * 8) + 12 * 8 * 10))


def test_steps_whose_lines_are_gone_take_time(tmp_path):
    lines = [line | {"train/tokens_per_second": 100.0} for line in step_lines(10) if "train/loss" in line]
    run = read_run("a", write_run(tmp_path, lines=[line for line in lines if line["step"] > 4 and line["step"] != 7]))
    assert run.seconds_at(np.array(10)) == pytest.approx(500 / 100)


def test_units_suit_the_longest_run(tmp_path):
    runs = [read_run("a", write_run(tmp_path / "a")), read_run("b", write_run(tmp_path / "b", lines=step_lines(1)))]
    by_key = {axis.key: axis.unit(runs) for axis in AXES}
    assert by_key["tokens"] == (1, "training tokens") and by_key["steps"] == (1, "steps")
    assert by_key["time"] == (1, "training time (seconds)")
    slow = [read_run("c", write_run(tmp_path / "c", lines=step_lines(10, seconds=1500)))]
    assert AXES[3].unit(slow) == (3600, "training time (hours)")
    assert STEPS.unit(slow) == (1, "steps")


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([], False),
        ([5.0] * 49 + [9.0] * 49, False),
        ([5.0] * 50 + [9.0] * 49, False),
        ([5.0] * 50 + [9.0] * 50, True),
        ([5.0] * 50 + [5.9] * 50, False),
        ([9.0] * 50 + [5.0] * 50, False),
        ([5.0] * 50 + [9.0] * 50 + [5.5] * 50, False),  # it came back
        ([5.0] * 50 + [5.9] * 50 + [6.1] * 50, True),  # slowly
        ([9.0] * 50 + [2.0] * 50 + [4.0] * 50, True),  # though it is below where it began
        ([5.0] * 50 + [float("inf")] * 50, False),  # ends by itself
        ([5.0] * 50 + [float("inf")] * 50 + [9.0] * 50, True),
        ([*np.linspace(9, 2, 500), *[2.0, 30.0] * 25], True),
        ([*np.linspace(9, 2, 500), 30.0], False),
    ],
)
def test_a_run_has_diverged(losses, diverged):
    assert has_diverged(losses) == diverged
