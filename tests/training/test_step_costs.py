"""FLOPs by hand, and the peak they are measured against."""

import dataclasses

import jax
import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig, MuonConfig, SoapConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import SophiaGConfig
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.training.costs import MatrixFlops, flops_per_step, matrix_flops, peak_flops

# Of each of three layers: queries, keys, values and their projection 8 x 8, and the MLP's 8 x 32 and 32 x 8.
MODEL = Gpt2Config(num_layers=3, num_heads=2, embed_dim=8, seq_len=64)
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=AdamWConfig(warmup=0),
    trainer=TrainerConfig(batch_size=32, microbatch_size=8, num_train_steps=10),
)
KRONECKER = SophiaGConfig(
    warmup=0, interval=5, basis="kronecker", basis_max_size=32, curvature_reduce="average_then_square"
)
# Products that change the basis of a square and of an oblong matrix; factors with sides of 8 and 32 in a layer.
SQUARE, OBLONG, EIGHTS, THIRTY_TWOS = 2 * 2 * 8**3, 2 * (8 * 8 * 32 + 8 * 32 * 32), 4 * 2 + 2, 2


def costs(optimizer, num_shards=1):
    return matrix_flops(dataclasses.replace(CONFIG, optimizer=optimizer), num_shards)


def test_kinds_of_work_of_a_kronecker_basis():
    found = costs(KRONECKER)
    # Refreshes at 0 and 5. Two changes a step, three a refresh, and two products of each factor.
    cubes = 3 * (EIGHTS * 8**3 + THIRTY_TWOS * 32**3)
    assert found.products == pytest.approx(3 * (2 + 3 / 5) * (4 * SQUARE + 2 * OBLONG) + 4 * cubes / 5)
    assert found.qr == pytest.approx({8: 3 * EIGHTS * 8 / 3 * 8**3 / 5, 32: 3 * THIRTY_TWOS * 8 / 3 * 32**3 / 5})
    assert found.newton_schulz == 0


@pytest.mark.parametrize(
    ("num_shards", "squares", "oblongs", "eights", "thirty_twos"), [(2, 5 + 2, 2 * 2, 15, 3), (8, 2 + 1, 2 * 1, 4, 1)]
)
def test_devices_share_whole_matrices(num_shards, squares, oblongs, eights, thirty_twos):
    """Nine and three matrices are 8 x 8, three 8 x 32 and three 32 x 8, with 30 factors of side 8 and 6 of side 32."""
    found = costs(KRONECKER, num_shards)
    cubes = eights * 8**3 + thirty_twos * 32**3
    assert found.products == pytest.approx((2 + 3 / 5) * (squares * SQUARE + oblongs * OBLONG) + 4 * cubes / 5)
    assert found.qr == pytest.approx({8: eights * 8 / 3 * 8**3 / 5, 32: thirty_twos * 8 / 3 * 32**3 / 5})


@pytest.mark.parametrize(("num_shards", "squares", "oblongs"), [(1, 12, 6), (2, 5 + 2, 2 * 2), (8, 2 + 1, 2 * 1)])
def test_newton_schulz_alone_is_muons(num_shards, squares, oblongs):
    square, oblong = 5 * 2 * (2 * 8**3 + 8**3), 5 * 2 * (2 * 8**2 * 32 + 8**3)
    wanted = MatrixFlops(newton_schulz=squares * square + oblongs * oblong)
    assert costs(MuonConfig(warmup=0), num_shards) == wanted


def test_soap_decomposes_at_each_interval():
    found = costs(SoapConfig(warmup=0, interval=4, basis_max_size=8), 8)
    # The basis is renewed at 0, 1, 2, 3, 4 and 8; the sides of 32 keep their coordinates.
    assert found.qr == pytest.approx({8: 4 * 8 / 3 * 8**3 * 6 / 10})


def test_a_step_counts_all_of_it():
    config = dataclasses.replace(CONFIG, optimizer=KRONECKER)
    whole = matrix_flops(config)
    assert whole.total == whole.products + sum(whole.qr.values())
    assert flops_per_step(config, 0.0) == whole.total
    assert matrix_flops(CONFIG) == MatrixFlops()


def test_flops_of_gpt2_small():
    # 12 blocks of 12 * 768^2 weights and a head of 50304 * 768; attention 12 * layers * width * positions.
    weights = 12 * 12 * 768**2 + 50304 * 768
    assert abstract_model(Gpt2Config(), 50257).flops_per_token == 6 * weights + 12 * 12 * 768 * 1024


class Device:
    platform = "gpu"

    def __init__(self, kind: str):
        self.device_kind = kind


def test_published_peaks_add_up_over_devices():
    assert peak_flops([Device("NVIDIA H100 80GB HBM3")] * 2) == 2 * 989e12


def test_the_measured_peak_of_a_cpu_is_one_for_all_its_devices():
    rates = [peak_flops(jax.devices()[:n]) for n in (1, 8)]
    assert all(1e8 < rate < 1e14 for rate in rates)
    assert rates[1] < 4 * rates[0]
