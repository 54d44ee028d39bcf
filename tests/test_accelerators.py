"""The table of accelerators."""

import pytest

from sophia_levanter.accelerators import GIB, GPUS, QR_SIDE, TPUS, published_peak

CHIPS = GPUS | TPUS


def test_rates_of_qr():
    a100 = GPUS["a100-80"]
    # 15.97 ms at a side of 2048, and 2 ** 1.5 times that at twice the side.
    assert 8 / 3 * QR_SIDE**3 / a100.qr_rate(QR_SIDE) == pytest.approx(15.97e-3, rel=0.01)
    assert 8 / 3 * 4096**3 / a100.qr_rate(4096) == pytest.approx(15.97e-3 * 2**1.5, rel=0.01)
    assert {name for name, chip in CHIPS.items() if chip.qr_measured} == {"a100-40", "a100-80"}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_rates_are_in_the_order_of_real_chips(chip):
    assert 16 * GIB <= chip.memory < 144 * GIB
    assert chip.qr_flops < 0.01 * chip.peak_flops < chip.newton_schulz_flops <= 0.5 * chip.peak_flops
    assert 100e9 < chip.bandwidth < chip.memory_bandwidth < 10e12
    assert 3e9 < chip.network < 0.2 * chip.bandwidth


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("TPU v4", "v4"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("TPU v6e", "v6e"),
    ],
)
def test_the_peak_of_a_kind(kind, name):
    assert published_peak(kind) == CHIPS[name].peak_flops


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L4", "TPU v3"])
def test_a_kind_that_is_not_listed(kind):
    assert published_peak(kind) is None
