"""What a token costs, by hand."""

import pytest

from sophia_levanter.comparison.costs import flops_per_token, seconds_per_step, tokens_per_step
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import (
    AdamWConfig,
    LionConfig,
    MuonConfig,
    SoapConfig,
    SophiaGConfig,
    SophiaHConfig,
)
from sophia_levanter.config.trainer import TrainerConfig

QUARTERS = TrainerConfig(num_train_steps=10_000, batch_size=32, microbatch_size=8)


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


MODEL = Gpt2Config(num_layers=3, num_heads=2, embed_dim=8, seq_len=64)
# Of each of three layers: queries, keys, values and their projection 8 x 8, and the MLP's 8 x 32 and 32 x 8.
PER_TOKEN = 3 / (32 * 64)


def matrix_flops(optimizer, make_record):
    config = TrainConfig(model=MODEL, optimizer=optimizer, trainer=QUARTERS)
    return flops_per_token(make_record(config, flops_per_token=0.0))


def test_work_on_matrices_of_muon(make_record):
    # Five times X X^T, its square, and their product with X.
    square, oblong = 5 * 2 * (2 * 8**3 + 8**3), 5 * 2 * (2 * 8**2 * 32 + 8**3)
    assert matrix_flops(MuonConfig(), make_record) == pytest.approx((4 * square + 2 * oblong) * PER_TOKEN)


@pytest.mark.parametrize(("max_size", "large"), [(32, 32), (8, 0)])
def test_work_on_matrices_of_soap(max_size, large, make_record):
    change = 4 * 2 * 2 * 8**3 + 2 * 2 * (8 * 8 * 32 + 8 * 32 * large)
    cubes = 4 * 2 * 8**3 + 2 * (8**3 + large**3)
    config = TrainConfig(
        model=MODEL,
        optimizer=SoapConfig(warmup_steps=0, interval=4, basis_max_size=max_size),
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
