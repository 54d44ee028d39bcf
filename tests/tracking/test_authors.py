"""Metrics under the names of the Sophia authors' scripts."""

import pytest

from sophia_levanter.tracking.trackers import AuthorsMetrics

STEP = {"train/loss": 2.0, "train/learning_rate": 1e-3, "train/mfu": 0.25}


def test_names_and_units():
    refreshed = STEP | {
        "train/parameter_norm": 7.0,
        "optim/win_rate": 0.5,
        "optim/curvature_norm": 3.0,
        "optim/momentum_norm": 4.0,
    }
    assert AuthorsMetrics(1.0).of(5, refreshed) == {
        "iter": 5.0,
        "lr": 1e-3,
        "mfu": 25.0,
        "param_norm": 7.0,
        "train/win_rate": 0.5,
        "hessian_norm2": 3.0,
        "momentum_norm": 4.0,
    }
    assert AuthorsMetrics(1.0).of(5, {"validation/loss": 2.5}) == {"iter": 5.0, "val/loss": 2.5}


@pytest.mark.parametrize(("limit", "rates"), [(1.0, [0, 1 / 2, 2 / 3, 2 / 4]), (None, [0, 0, 0, 0])])
def test_the_share_of_clipped_steps(limit, rates):
    metrics = AuthorsMetrics(limit)
    found = [metrics.of(step, {"train/grad_norm": norm})["train/clip_rate"] for step, norm in enumerate([1, 2, 3, 0.5])]
    assert found == pytest.approx(rates)
