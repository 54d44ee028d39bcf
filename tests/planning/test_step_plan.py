"""Memory and collectives of compiled steps."""

import dataclasses

import jax
import pytest

from sophia_levanter.accelerators import Chip
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig, AdEMAMixConfig, LionConfig, MuonConfig
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import SophiaGConfig, SophiaHConfig
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.planning.run_plan import fsdp_minimum
from sophia_levanter.planning.step_plan import (
    StepPlan,
    StepTime,
    activation_bytes,
    gradient_bytes,
    mean_bytes_sent,
    plan_step,
    step_time,
)
from sophia_levanter.planning.target import Target
from sophia_levanter.training.costs import abstract_state, bytes_by_kind, device_bytes, matrix_flops

VOCAB = 257
MODEL = Gpt2Config(num_layers=3, num_heads=2, embed_dim=32, seq_len=16, loss_block_size=8)
TRAINER = TrainerConfig(batch_size=32, microbatch_size=16, num_train_steps=100)
CONFIG = TrainConfig(model=MODEL, optimizer=SophiaGConfig(warmup=0), trainer=TRAINER, mesh=MeshConfig(fsdp="embed"))
BLOCKS = 3 * (12 * 32 * 32 + 2 * 32)
EMBEDDINGS = 384 * 32 + 16 * 32 + 32
PARAMETERS = BLOCKS + EMBEDDINGS


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_state_is_split(num_devices):
    state = abstract_state(CONFIG, partition_of(CONFIG.mesh, jax.devices()[:num_devices]), VOCAB)
    share = 4 * PARAMETERS // num_devices
    kinds = bytes_by_kind(state)
    assert [kinds[kind] for kind in ("parameters", "momentum", "curvature")] == [share] * 3
    assert gradient_bytes(state) == share
    assert sum(kinds.values()) == device_bytes(state)
    # Counts alone: step, updates, refreshes, those since the last one, skipped ones, and a flag.
    assert kinds["other optimizer state"] < 44


@pytest.mark.parametrize(
    ("optimizer", "momentum", "other"),
    [(AdamWConfig, 1, 1), (LionConfig, 1, 0), (MuonConfig, 1, 0.5), (AdEMAMixConfig, 2, 1)],
)
def test_states_of_other_optimizers(optimizer, momentum, other):
    config = dataclasses.replace(CONFIG, optimizer=optimizer(warmup=0))
    kinds = bytes_by_kind(abstract_state(config, partition_of(config.mesh), VOCAB))
    assert kinds["parameters"] == PARAMETERS // 2
    assert kinds["momentum"] == pytest.approx(momentum * kinds["parameters"], abs=100)
    assert kinds["other optimizer state"] <= other * kinds["parameters"] + 100
    assert "curvature" not in kinds


def test_snapshots_of_the_weights_are_split_as_they_are():
    trainer = dataclasses.replace(TRAINER, lawa_every=10, lawa_snapshots=3)
    config = dataclasses.replace(CONFIG, optimizer=AdamWConfig(warmup=0), trainer=trainer)
    kinds = bytes_by_kind(abstract_state(config, partition_of(config.mesh), VOCAB))
    assert (kinds["snapshots"], kinds["average"]) == (3 * kinds["parameters"], kinds["parameters"])


# Elements. The embedding has a gradient from the lookup and one from the head, and some scalars are reduced too.
SCALARS = 16
REDUCED = range(PARAMETERS + 384 * 32, PARAMETERS + 384 * 32 + SCALARS)
# The forward and the backward pass gather blocks, and one pass all else; the lookup gathers the tokens.
GATHERED = range(2 * BLOCKS + EMBEDDINGS, 2 * BLOCKS + EMBEDDINGS + 32 * 16 + 1)
SCATTERED = range(PARAMETERS, PARAMETERS + SCALARS)


@pytest.mark.parametrize(
    ("fsdp", "elements"),
    [(None, {"all-reduce": REDUCED}), ("embed", {"all-gather": GATHERED, "all-reduce": SCATTERED})],
)
def test_what_a_step_sends_in_a_ring_of_eight(fsdp, elements, monkeypatch):
    monkeypatch.setattr("sophia_levanter.planning.target.GPUS_OF_A_NODE", 4)
    trainer, mesh = dataclasses.replace(TRAINER, microbatch_size=None), MeshConfig(fsdp=fsdp)
    config = dataclasses.replace(CONFIG, optimizer=LionConfig(warmup=0), trainer=trainer, mesh=mesh)
    plan = plan_step(config, partition_of(mesh), VOCAB, refresh=False)
    ring = {"all-gather": 4 * 7 / 8, "all-reduce": 2 * 4 * 7 / 8}
    assert elements.keys() == plan.collectives.keys() & ring.keys()
    for kind, wanted in elements.items():
        assert plan.collectives[kind] / ring[kind] in wanted
    # Two nodes of four: one hop of seven goes to the other node, and an all-to-all sends half of its array there.
    exchanged = plan.collectives.get("all-to-all", 0)
    assert plan.between_nodes == pytest.approx((sum(plan.collectives.values()) - exchanged) / 7 + exchanged * 4 / 7)


@pytest.mark.parametrize(("compute_dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_the_least_that_fsdp_sends(compute_dtype, item):
    """Each of two microbatches gathers all parameters twice and scatters its gradient; GNB's scatters another one."""
    config = dataclasses.replace(CONFIG, trainer=dataclasses.replace(TRAINER, compute_dtype=compute_dtype))
    partition, once = partition_of(CONFIG.mesh), item * PARAMETERS * 7 / 8
    plain, state = 2 * 3 * once, abstract_state(config, partition, VOCAB)
    assert fsdp_minimum(config, partition, state) == {False: plain, True: plain + once}
    for free in ({"curvature_labels": "data"}, {"curvature_extra_pass": False}):
        config = dataclasses.replace(config, optimizer=SophiaGConfig(warmup=0, **free))
        assert fsdp_minimum(config, partition, state) == {False: plain, True: plain}
    hutchinson = dataclasses.replace(config, optimizer=SophiaHConfig(warmup=0))
    assert fsdp_minimum(hutchinson, partition, state) == {False: plain, True: None}


def test_one_device():
    """It sends nothing, and Hutchinson's refresh needs more than a plain step."""
    optimizer = SophiaHConfig(warmup=0, curvature_batch_fraction=1.0)
    model = dataclasses.replace(MODEL, gradient_checkpointing="none")
    config = dataclasses.replace(CONFIG, optimizer=optimizer, model=model)
    partition = partition_of(config.mesh, jax.devices()[:1])
    plain, plan = (plan_step(config, partition, VOCAB, refresh=refresh) for refresh in (False, True))
    assert plain.collectives == plan.collectives == {}
    assert plan.temporaries > plain.temporaries
    assert plan.arguments == pytest.approx(3 * 4 * PARAMETERS + 3 * 4 * 32 * 16, rel=0.01)
    assert plan.temporaries > 2 * 4 * PARAMETERS
    assert plan.fits(plan.arguments + plan.temporaries)
    assert not plan.fits(plan.arguments + plan.temporaries - 1)


@pytest.mark.parametrize("policy", ["full", pytest.param("dots", marks=pytest.mark.slow), "none"])
def test_activations_grow_with_the_microbatch(policy):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, gradient_checkpointing=policy))
    partition = partition_of(config.mesh, jax.devices()[:1])

    def kept(size):
        trainer = dataclasses.replace(TRAINER, microbatch_size=size)
        return activation_bytes(dataclasses.replace(config, trainer=trainer), partition, VOCAB)

    small, middle, large = kept(8), kept(16), kept(32)
    # A block's input for each layer at least, in float32.
    assert middle - small >= 3 * 8 * 16 * 32 * 4
    assert large - middle == 2 * (middle - small)


# A refresh at every fourth step, which sends more.
KRONECKER = SophiaGConfig(warmup=0, interval=4, basis="kronecker", curvature_batch_fraction=1.0)
PLANS = {
    False: StepPlan(arguments=1, temporaries=1, collectives={"all-gather": 100e9, "all-reduce": 200e9}),
    True: StepPlan(arguments=1, temporaries=1, collectives={"all-gather": 700e9}, between_nodes=80e9),
}
CHIP = Chip(
    kinds=(),
    memory=1,
    memory_bandwidth=4.0,
    peak_flops=1e12,
    bandwidth=200e9,
    network=1e9,
    qr_flops=1e9,
    newton_schulz_flops=1e10,
)
TARGET = Target("test", 8, CHIP)


def timed(optimizer, plans, chip=CHIP):
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    target = dataclasses.replace(TARGET, chip=chip)
    return config, step_time(config, partition_of(CONFIG.mesh), VOCAB, plans, target, mfu=0.5)


def test_what_is_sent_is_averaged_over_the_run():
    config = dataclasses.replace(CONFIG, optimizer=KRONECKER)
    assert mean_bytes_sent(config, PLANS) == pytest.approx((400e9 - 20e9, 20e9))
    assert mean_bytes_sent(CONFIG, {False: PLANS[False]}) == (300e9, 0)


def test_the_time_of_a_step_is_priced_by_kind():
    config, time = timed(KRONECKER, PLANS)
    model = abstract_model(MODEL, VOCAB).flops_per_token * 32 * 16 * (1 + 2 / 3 / 4)
    share = matrix_flops(config, 8)
    assert time.products == pytest.approx((model / 8 + share.products) / (0.5 * 1e12))
    # At a side of 32 the rate is 1/512 of that at 2048, and at 128 1/64.
    rates = {32: 1e9 / 512, 128: 1e9 / 64}
    assert time.qr == pytest.approx(sum(flops / rates[side] for side, flops in share.qr.items()))
    assert share.qr.keys() == rates.keys()
    assert time.newton_schulz == 0
    assert time.memory == 2 * 1 / 4
    assert time.within == pytest.approx(380 / 200)
    assert time.between == pytest.approx(20)


def test_newton_schulz_has_a_rate_of_its_own():
    config, time = timed(MuonConfig(warmup=0), {False: PLANS[False]})
    assert time.newton_schulz == pytest.approx(matrix_flops(config, 8).newton_schulz / 1e10)
    assert time.qr == 0
    assert time.within == pytest.approx(300 / 200)


@pytest.mark.parametrize(
    ("memory", "within", "between", "bound", "overlapped"),
    [
        (1.0, 5.0, 0.0, "compute", 6.0),
        (7.0, 5.0, 0.0, "memory traffic", 7.0),
        (1.0, 7.0, 2.0, "communication within a node", 7.0),
        (1.0, 7.0, 8.0, "communication between nodes", 8.0),
        (1.0, None, 0.0, "compute", 6.0),
    ],
)
def test_what_bounds_a_step(memory, within, between, bound, overlapped):
    time = StepTime(products=3.0, qr=2.0, newton_schulz=1.0, memory=memory, within=within, between=between)
    assert (time.bound, time.overlapped) == (bound, overlapped)
    assert time.serial == 6 + memory + (within or 0) + between


def test_communication_of_a_step_that_does_not_fit_is_unknown():
    _, time = timed(KRONECKER, {**PLANS, True: StepPlan(arguments=1, temporaries=None, collectives={})})
    assert time.within is None
