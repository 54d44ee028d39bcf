"""What `plan` prints about time, and the chips that it may be for."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import pytest

from sophia_levanter.accelerators import GIB
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.groups import GroupConfig
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import OptimizerConfig, SophiaGConfig
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError
from sophia_levanter.optim import SophiaH
from sophia_levanter.planning import run_plan
from sophia_levanter.planning.run_plan import MIB, _largest_microbatch, _time, describe
from sophia_levanter.planning.step_plan import StepPlan, StepTime
from sophia_levanter.planning.target import Target, node_of, pretended_target, tpu_target
from sophia_levanter.run.summary import describe_layout

CONFIG = TrainConfig(model=Gpt2Config(seq_len=64), trainer=TrainerConfig(batch_size=8, num_train_steps=86_400))
SMALL = Gpt2Config(num_layers=1, num_heads=2, embed_dim=32, seq_len=64)
DAYS = "days for 86,400 steps of 512 tokens"
COMPUTED = "  computed from published rates, not measured on these devices"


def lines(time, target, config=CONFIG):
    return list(_time(config, time, target, mfu=0.4))


def test_an_optimizer_that_does_not_fit_the_model(monkeypatch):
    """Said before anything is compiled."""
    # The process of the tests has started jax, so its number of devices can no longer be set.
    monkeypatch.setattr(Target, "devices", lambda self: jax.devices()[:1])
    optimizer = AdamWConfig(groups=(GroupConfig("wtx"),))
    config = replace(CONFIG, optimizer=optimizer, data=DataConfig(tokenizer="bytes"))
    with pytest.raises(InputError, match=r"^optimizer\.groups\[0\]\.match 'wtx' matches no parameter; choose from \['"):
        next(describe(config, "name", pretended_target(1, "h100"), 0.4))


@dataclass(frozen=True)
class PlugInConfig(OptimizerConfig):
    """Without the settings of Sophia."""

    def build(self, num_train_steps):
        return SophiaH(self.learning_rate)


def test_a_plug_in_with_hutchinsons_estimator(monkeypatch):
    """Its refresh is planned, and no setting is proposed that it does not have."""
    monkeypatch.setattr(Target, "devices", lambda self: jax.devices()[:1])
    monkeypatch.setattr(run_plan, "plan_step", lambda *_, **__: StepPlan(MIB, MIB, {}))
    trainer = replace(CONFIG.trainer, num_train_steps=20)
    config = TrainConfig(model=SMALL, optimizer=PlugInConfig(), data=DataConfig(tokenizer="bytes"), trainer=trainer)
    planned = list(describe(config, "name", pretended_target(1, "h100"), 0.4))
    assert "refresh step" in next(line for line in planned if "plain step" in line)
    assert planned[-1] == "the largest trainer.microbatch_size that fits is 8 (trainer.batch_size 8)"


def test_a_microbatch_must_be_left_for_the_gradient(monkeypatch):
    """All 8 sequences in one would leave none, because there is no extra pass."""
    monkeypatch.setattr(run_plan, "plan_step", lambda *_, **__: StepPlan(MIB, MIB, {}))
    optimizer = SophiaGConfig(curvature_extra_pass=False, curvature_batch_fraction=0.5)
    config = replace(CONFIG, optimizer=optimizer, trainer=replace(CONFIG.trainer, microbatch_size=2))
    found = _largest_microbatch(config, SimpleNamespace(row_shards=1), 257, GIB)
    assert found == "the largest trainer.microbatch_size that fits is 4 (trainer.batch_size 8)"


def step(within=0.0, between=0.0, **others):
    return StepTime(
        **({"products": 2.0, "qr": 0.0, "newton_schulz": 0.0, "memory": 0.25} | others), within=within, between=between
    )


def test_one_device_is_bounded_by_computation():
    assert lines(step(), pretended_target(1, "h100")) == [
        "time              2 s per step if everything overlaps, 2.25 s if nothing does",
        "  bounded by compute: compute 2 s (matrix products 2 s at an MFU of 0.4), memory traffic 0.25 s",
        f"  2 to 2.25 {DAYS}",
        f"{COMPUTED}: memory 3,350 GB/s",
    ]


def test_one_device_with_little_to_compute():
    (time, bound, *_) = lines(step(memory=3.0), pretended_target(1, "h100"))
    assert time == "time              3 s per step if everything overlaps, 5 s if nothing does"
    assert bound.startswith("  bounded by memory traffic: compute 2 s")


@pytest.mark.parametrize(
    ("target", "place", "rates"),
    [
        (
            pretended_target(8, "a100-80"),
            "node",
            "memory 2,039 GB/s, links within a node 300 GB/s, QR 1.43 TFLOP/s for 2048 x 2048 matrices (published)",
        ),
        (
            tpu_target("v5e:2x4"),
            "slice",
            "memory 819 GB/s, links within a slice 200 GB/s, QR 0.36 TFLOP/s for 2048 x 2048 matrices (assumed)",
        ),
    ],
)
def test_a_step_bounded_by_computation(target, place, rates):
    assert lines(step(within=1.0, qr=0.5), target) == [
        "time              2.5 s per step if everything overlaps, 3.75 s if nothing does",
        "  bounded by compute: compute 2.5 s (matrix products 2 s at an MFU of 0.4, QR 0.5 s), memory traffic 0.25 s, "
        f"communication within a {place} 1 s",
        f"  2.5 to 3.75 {DAYS}",
        f"{COMPUTED}: {rates}",
    ]


def test_a_step_bounded_by_communication_between_nodes():
    assert lines(step(within=1.0, between=4.0, newton_schulz=0.5), pretended_target(16, "h100")) == [
        "time              4 s per step if everything overlaps, 7.75 s if nothing does",
        "  bounded by communication between nodes: compute 2.5 s (matrix products 2 s at an MFU of 0.4, "
        "Newton-Schulz 0.5 s), memory traffic 0.25 s, communication within a node 1 s, communication between nodes 4 s",
        "  hint: use a larger trainer.batch_size",
        f"  4 to 7.75 {DAYS}",
        f"{COMPUTED}: memory 3,350 GB/s, links within a node 450 GB/s, network between nodes 50 GB/s, "
        "Newton-Schulz 247 TFLOP/s (assumed)",
    ]


def test_a_step_on_two_slices():
    assert lines(step(within=1.0, between=4.0), tpu_target("2xv5e-16")) == [
        "time              4 s per step if everything overlaps, 7.25 s if nothing does",
        "  bounded by communication between slices: compute 2 s (matrix products 2 s at an MFU of 0.4), "
        "memory traffic 0.25 s, communication within a slice 1 s, communication between slices 4 s",
        "  hint: use a larger trainer.batch_size",
        f"  4 to 7.25 {DAYS}",
        f"{COMPUTED}: memory 819 GB/s, links within a slice 200 GB/s, network between slices 3.125 GB/s",
    ]


@pytest.mark.parametrize(
    ("time", "mesh", "microbatch_size", "hint"),
    [
        (step(within=3.0), {"fsdp": "embed"}, None, "a larger trainer.batch_size"),
        (step(within=3.0), {"fsdp": "embed"}, 4, "a larger trainer.microbatch_size"),
        (step(within=3.0), {"model": 2}, None, "a smaller mesh.model or a larger trainer.batch_size"),
        (
            step(between=3.0),
            {"fsdp": "embed"},
            4,
            "mesh.replica 2 (only gradients are sent between nodes) or a larger trainer.microbatch_size",
        ),
        (step(between=3.0), {"fsdp": "embed", "replica": 2}, 4, "a larger trainer.microbatch_size"),
    ],
)
def test_what_sends_less(time, mesh, microbatch_size, hint):
    trainer = replace(CONFIG.trainer, microbatch_size=microbatch_size)
    config = replace(CONFIG, mesh=MeshConfig(**mesh), trainer=trainer)
    assert lines(time, pretended_target(16, "h100"), config)[2] == f"  hint: use {hint}"


def test_a_step_that_does_not_fit():
    bound = lines(step(within=None), tpu_target("v5e:2x4"))[1]
    assert bound.endswith("memory traffic 0.25 s, communication unknown: the step does not fit")
    assert "bounded" not in bound


def test_the_layout_names_every_split_axis_except_the_batch():
    over = {"batch": ("replica", "data"), "batch_norm": ("data",), "mlp": ("model", "data"), "heads": ("model",)}
    partition = SimpleNamespace(mesh=SimpleNamespace(shape={"replica": 1, "data": 4, "model": 2}), parameters=over)
    assert describe_layout(partition) == ["data 4 x model 2", "batch_norm over data", "mlp over model and data"]


def test_nodes():
    assert [pretended_target(n, "h100").num_nodes for n in (1, 8, 9, 64)] == [1, 1, 2, 8]
    assert [tpu_target(name).num_nodes for name in ("v4-32", "1xv4-32", "3xv4-32")] == [1, 1, 3]
    gpus = [SimpleNamespace(platform="cpu", id=n) for n in (0, 7, 8, 23)]
    assert [node_of(gpu) for gpu in gpus] == [0, 0, 1, 2]
    assert node_of(SimpleNamespace(platform="tpu", id=23, slice_index=1)) == 1


def test_targets():
    pod = tpu_target("v4:2x2x4")
    assert (pod.num_devices, pod.topology, pod.chip.memory) == (16, "v4:2x2x4", 32 * GIB)
    assert tpu_target("v5e:16x16").num_devices == 256
    two = tpu_target("2xv4-32")
    assert (two.name, two.num_devices, two.topology, two.num_slices) == ("2 x v4-32 (2x2x4)", 32, "v4:2x2x4", 2)
    assert tpu_target("2xv5e:4x8").num_devices == 64
    for name, topology in (("v4-32", "v4:2x2x4"), ("v5litepod-16", "v5e:4x4"), ("v6e-8", "v6e:2x4")):
        named = tpu_target(name)
        assert (named.topology, named.num_devices) == (topology, tpu_target(topology).num_devices)
    gpus = pretended_target(8, "a100-40")
    assert (gpus.num_devices, gpus.topology, gpus.chip.peak_flops) == (8, None, 312e12)
    assert 35 * GIB < gpus.chip.memory < 40 * GIB


@pytest.mark.parametrize(
    "text",
    [
        "v4",
        "v4-33",
        "v9:2x2x4",
        "v4:2x2xa",
        "v4:",
        "v4:8",
        "v4:2x2",
        "v5e:2x2x4",
        "v4:2x2x0",
        "v5e:1000x1000",
        "0xv4-32",
        "2x v4-32",
        "2x4",
    ],
)
def test_no_topology(text):
    with pytest.raises(InputError, match=f"^--target is '{text}'; "):
        tpu_target(text)
    with pytest.raises(InputError, match=r"^--target is "):
        tpu_target(f"2x{text}")


def test_no_devices():
    with pytest.raises(InputError, match=r"^--devices is 0; it must be at least 1$"):
        pretended_target(0, "h100")
    with pytest.raises(InputError, match=r"^--gpu is 'a100'; it must be one of a100-40, a100-80, h100, h200$"):
        pretended_target(8, "a100")
