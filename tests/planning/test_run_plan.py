"""What `plan` prints about time, and the chips that it may be for."""

import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError
from sophia_levanter.planning.run_plan import _time
from sophia_levanter.planning.step_plan import StepTime
from sophia_levanter.planning.target import GIB, GPUS, QR_SIDE, TPUS, pretended_target, tpu_target

CONFIG = TrainConfig(model=Gpt2Config(seq_len=64), trainer=TrainerConfig(batch_size=8, num_train_steps=86_400))
ASSUMED = "assumed, not measured on this chip"


def lines(time, target):
    return list(_time(CONFIG, time, target, mfu=0.4))


def test_one_device_that_multiplies_only():
    time = StepTime(products=2.0, qr=0.0, newton_schulz=0.0, communication=0.0)
    assert lines(time, pretended_target(1, "h100")) == [
        "time              2 s a step: 2 products at an MFU of 0.4",
        "  2 days for 86,400 steps of 512 tokens",
    ]


@pytest.mark.parametrize(
    ("target", "source", "gigabytes"),
    [
        (pretended_target(8, "a100-80"), "1.43 TFLOP/s at a side of 2048 (published)", 300),
        (tpu_target("v5e:2x4"), f"0.36 TFLOP/s at a side of 2048 ({ASSUMED})", 200),
    ],
)
def test_a_step_bounded_by_computation(target, source, gigabytes):
    time = StepTime(products=2.0, qr=0.5, newton_schulz=0.0, communication=1.0)
    assert lines(time, target) == [
        f"time              2.5 s a step: 2 products at an MFU of 0.4, 0.5 QR, 1 communication at {gigabytes} GB/s",
        "  bounded by compute if communication overlaps fully; 3.5 s a step if none overlaps",
        "  2.5 to 3.5 days for 86,400 steps of 512 tokens",
        f"  rates: QR {source}",
    ]


def test_a_step_bounded_by_communication_between_nodes():
    time = StepTime(products=2.0, qr=0.0, newton_schulz=0.5, communication=4.0)
    assert lines(time, pretended_target(16, "h100")) == [
        "time              4 s a step: 2 products at an MFU of 0.4, 0.5 Newton-Schulz, 4 communication at 450 GB/s",
        "  bounded by communication if communication overlaps fully; 6.5 s a step if none overlaps",
        "  4 to 6.5 days for 86,400 steps of 512 tokens",
        f"  rates: Newton-Schulz 247 TFLOP/s ({ASSUMED})",
        "  the bandwidth is that of NVLink; the network between nodes of 8 GPUs is slower",
    ]


def test_a_step_that_does_not_fit():
    time = StepTime(products=2.0, qr=0.0, newton_schulz=0.0, communication=None)
    assert lines(time, tpu_target("v5e:2x4"))[0].endswith(", communication unknown: the step does not fit")


def test_targets():
    pod = tpu_target("v4:2x2x4")
    assert (pod.num_devices, pod.topology, pod.chip.memory) == (16, "v4:2x2x4", 32 * GIB)
    assert tpu_target("v5e:16x16").num_devices == 256
    for name, topology in (("v4-32", "v4:2x2x4"), ("v5litepod-16", "v5e:4x4"), ("v6e-8", "v6e:2x4")):
        named = tpu_target(name)
        assert (named.topology, named.num_devices) == (topology, tpu_target(topology).num_devices)
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
    "text", ["v4", "v4-33", "v9:2x2x4", "v4:2x2xa", "v4:", "v4:8", "v4:2x2", "v5e:2x2x4", "v4:2x2x0"]
)
def test_no_topology(text):
    with pytest.raises(InputError, match=f"^--target is '{text}'; "):
        tpu_target(text)


def test_no_devices():
    with pytest.raises(InputError, match=r"^--devices is 0; it must be at least 1$"):
        pretended_target(0, "h100")
    with pytest.raises(InputError, match=r"^--gpu is 'a100'; it must be one of a100-40, a100-80, h100, h200$"):
        pretended_target(8, "a100")
