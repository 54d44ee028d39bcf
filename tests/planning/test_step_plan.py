"""Memory and collectives of compiled steps."""

import dataclasses

import jax
import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.models.config import Gpt2Config
from sophia_levanter.partition.config import MeshConfig
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.planning.step_plan import activation_bytes, gradient_bytes, plan_step
from sophia_levanter.training.config import (
    AdamWConfig,
    LionConfig,
    MuonConfig,
    SophiaGConfig,
    SophiaHConfig,
    TrainerConfig,
)
from sophia_levanter.training.lowering import abstract_state
from sophia_levanter.training.memory import bytes_by_kind, device_bytes

VOCAB = 257
MODEL = Gpt2Config(num_layers=3, num_heads=2, embed_dim=32, seq_len=16, loss_block_size=8)
TRAINER = TrainerConfig(batch_size=32, microbatch_size=16, num_train_steps=100)
CONFIG = TrainConfig(
    model=MODEL, optimizer=SophiaGConfig(warmup_steps=0), trainer=TRAINER, mesh=MeshConfig(fsdp="embed")
)
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
    # Counts alone: step, updates, refreshes, skipped ones, and a flag.
    assert kinds["other optimizer state"] < 40


@pytest.mark.parametrize(
    ("optimizer", "momentum", "other"), [(AdamWConfig, 1, 1), (LionConfig, 1, 0), (MuonConfig, 1, 0.5)]
)
def test_states_of_other_optimizers(optimizer, momentum, other):
    config = dataclasses.replace(CONFIG, optimizer=optimizer(warmup_steps=0))
    kinds = bytes_by_kind(abstract_state(config, partition_of(config.mesh), VOCAB))
    assert kinds["parameters"] == PARAMETERS // 2
    assert kinds["momentum"] == pytest.approx(momentum * kinds["parameters"], abs=100)
    assert kinds["other optimizer state"] <= other * kinds["parameters"] + 100
    assert "curvature" not in kinds


def test_collectives_of_a_step():
    """A block's parameters are gathered twice in a microbatch; the gradients are all-reduced on a CPU."""
    plan = plan_step(CONFIG, partition_of(CONFIG.mesh), VOCAB, refresh=False)
    gathered = 2 * 2 * 4 * BLOCKS
    assert gathered <= plan.collectives["all-gather"] <= gathered + 2 * 4 * EMBEDDINGS + 20_000
    reduced = 2 * 2 * 4 * PARAMETERS
    assert reduced * 0.5 <= plan.collectives["all-reduce"] <= reduced * 1.1


def test_no_collectives_on_one_device():
    plan = plan_step(CONFIG, partition_of(CONFIG.mesh, jax.devices()[:1]), VOCAB, refresh=True)
    assert plan.collectives == {}
    assert plan.arguments == pytest.approx(3 * 4 * PARAMETERS + 3 * 4 * 32 * 16, rel=0.01)
    assert plan.temporaries > 2 * 4 * PARAMETERS
    assert plan.fits(plan.arguments + plan.temporaries)
    assert not plan.fits(plan.arguments + plan.temporaries - 1)


@pytest.mark.parametrize("policy", ["full", "dots", "none"])
def test_activations_grow_with_the_microbatch(policy):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, gradient_checkpointing=policy))
    partition = partition_of(config.mesh, jax.devices()[:1])

    def kept(size):
        trainer = dataclasses.replace(TRAINER, microbatch_size=size)
        return activation_bytes(dataclasses.replace(config, trainer=trainer), partition, VOCAB)

    # A block's input for each layer at least, in float32.
    assert kept(16) - kept(8) >= 3 * 8 * 16 * 32 * 4
    assert kept(32) - kept(16) == 2 * (kept(16) - kept(8))


def test_hutchinsons_refresh_needs_more():
    config = dataclasses.replace(CONFIG, optimizer=SophiaHConfig(warmup_steps=0, curvature_batch_fraction=1.0))
    partition = partition_of(config.mesh, jax.devices()[:1])
    plain, refresh = (plan_step(config, partition, VOCAB, refresh=refresh) for refresh in (False, True))
    assert refresh.temporaries > plain.temporaries
