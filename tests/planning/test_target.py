"""What a plan may be for."""

import pytest

from sophia_levanter.errors import InputError
from sophia_levanter.planning.target import GIB, GPUS, QR_SIDE, TPUS, pretended_target, tpu_target


def test_targets():
    pod = tpu_target("v4:2x2x4")
    assert (pod.num_devices, pod.topology, pod.chip.memory) == (16, "v4:2x2x4", 32 * GIB)
    assert tpu_target("v5e:16x16").num_devices == 256
    gpus = pretended_target(8, "a100-40")
    assert (gpus.num_devices, gpus.topology, gpus.chip.peak_flops) == (8, None, 312e12)
    assert 35 * GIB < gpus.chip.memory < 40 * GIB


def test_rates_of_the_chips():
    a100 = GPUS["a100-80"]
    # 15.97 ms at a side of 2048, and 2 ** 1.5 times that at twice the side.
    assert 8 / 3 * QR_SIDE**3 / a100.qr_rate(QR_SIDE) == pytest.approx(15.97e-3, rel=0.01)
    assert 8 / 3 * 4096**3 / a100.qr_rate(4096) == pytest.approx(15.97e-3 * 2**1.5, rel=0.01)
    assert {name for name, chip in (GPUS | TPUS).items() if chip.qr_measured} == {"a100-40", "a100-80"}
    for chip in (GPUS | TPUS).values():
        assert chip.qr_flops < 0.01 * chip.peak_flops < chip.newton_schulz_flops <= 0.5 * chip.peak_flops
        assert 100e9 < chip.bandwidth < 1e12


@pytest.mark.parametrize(
    "text", ["v4", "v4-32", "v9:2x2x4", "v4:2x2xa", "v4:", "v4:8", "v4:2x2", "v5e:2x2x4", "v4:2x2x0"]
)
def test_no_topology(text):
    with pytest.raises(InputError, match=f"^--target is '{text}'; "):
        tpu_target(text)


def test_no_devices():
    with pytest.raises(InputError, match=r"^--devices is 0; it must be at least 1$"):
        pretended_target(0, "h100")
    with pytest.raises(InputError, match=r"^--gpu is 'a100'; it must be one of a100-40, a100-80, h100, h200$"):
        pretended_target(8, "a100")
