"""FLOPs by hand, and the peak they are measured against."""

import jax

from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.training.throughput import peak_flops


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
