"""Nano runs on meshes of eight devices give the losses of one device."""

import dataclasses
from functools import cache, partial
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

from sophia_levanter.batch import batch_from_sequences
from sophia_levanter.config.command_line import load_config
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.optimizer import SophiaGConfig
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.step import StepSettings, TrainState, curvature_rows, train_step

STEPS, ROWS = 20, 32
CONFIGS = Path(__file__).parents[2] / "config"
TEXT = np.frombuffer((CONFIGS.parent / "LICENSE").read_bytes(), np.uint8).astype(np.int32)


def nano(optimizer, num_microbatches, model="gpt2", scan_unroll=1):
    """Nano with short windows and, by default, layers in a loop, so that the table of meshes ends in minutes.

    Its warm-up matters: at rates of 1e-3 Sophia-H's clipped steps make 2e-4 of a rounding error within 20 steps.
    """
    settings = {
        "model.seq_len": 32,
        "model.loss_block_size": 16,
        "model.scan_unroll": scan_unroll,
        "trainer.batch_size": ROWS,
        "trainer.microbatch_size": ROWS // num_microbatches,
    }
    if model == "llama":
        settings |= {"model.num_kv_heads": 2, "model.qk_norm": "true", "model.tie_embeddings": "false"}
        settings |= {"optimizer.type": "sophia_g" if optimizer == "sophia" else optimizer}
        settings |= {"optimizer.learning_rate": 1e-3}
    if optimizer.startswith("sophia"):
        settings["optimizer.interval"] = 4
        settings["optimizer.curvature_microbatch_size"] = "null"  # the preset's divides over fewer devices
    overrides = [(name, str(value)) for name, value in settings.items()]
    preset = f"gpt2_nano_{optimizer}" if model == "gpt2" else "llama_nano_adamw"
    return load_config(CONFIGS / f"{preset}.yaml", overrides)


def windows(config, step):
    starts = np.random.default_rng(step).integers(0, len(TEXT) - config.model.seq_len - 1, ROWS)
    return np.stack([TEXT[start : start + config.model.seq_len + 1] for start in starts])


def given_labels(config, settings, step):
    """Labels for GNB that are no function of the model: a drawn one may be another for a rounding error's sake."""
    num_microbatches = config.trainer.num_microbatches
    batch = batch_from_sequences(windows(config, STEPS + step), num_microbatches=num_microbatches)
    return curvature_rows(settings, batch)[0].targets


def train(config, num_devices, num_steps=STEPS, drawn=False):
    """The losses of the first steps, and the state after them; with Sophia-G's labels given, or drawn."""
    partition = partition_of(config.mesh, jax.devices()[:num_devices])
    settings = StepSettings.of(config)

    def initial_state():
        model = config.model.build(vocab_size=257, key=jax.random.key(0))
        return TrainState.init(model, settings.optimizer, settings.policy)

    state, losses = partition.init_sharded(initial_state), []
    with partition.active():
        steps = {
            refresh: eqx.filter_jit(partial(train_step, settings, refresh), donate="all-except-first")
            for refresh in (False, True)
        }
        for step in range(num_steps):
            batch = batch_from_sequences(windows(config, step), num_microbatches=config.trainer.num_microbatches)
            refresh = bool(settings.optimizer.refresh_due(step))
            more = {}
            if refresh and isinstance(config.optimizer, SophiaGConfig) and not drawn:
                more["samples"] = partition.place(given_labels(config, settings, step))
            state, output = steps[refresh](partition.place(batch), state, **more)
            losses.append(float(output.metrics["train/loss"]))
    return np.array(losses), state


@cache
def on_one_device(*run):
    losses, _ = train(nano(*run), 1)
    assert losses[-1] < losses[0] - 0.2
    return losses


def check_mesh(mesh, *run, atol=1e-5):
    """The losses of a run, given by the arguments of `nano`."""
    losses, state = train(dataclasses.replace(nano(*run), mesh=mesh), 8)
    np.testing.assert_allclose(losses, on_one_device(*run), rtol=0, atol=atol)
    if mesh.fsdp:
        check_split(state, mesh)


def check_split(state, mesh):
    """Parameters and optimizer state are where they were at the start: no device has what another has to keep."""
    data, model = (partition_of(mesh).mesh.shape[name] for name in ("data", "model"))
    for tree in (state.model, state.optimizer_state):
        for leaf in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "axes")):
            if hasattr(leaf, "axes") and isinstance(leaf.array, jax.Array):
                names = {axis.name for axis in leaf.axes}
                parts = (data if mesh.fsdp in names else 1) * (
                    model if names & set(mesh.compute_mapping) - {"position"} else 1
                )
                assert {s.data.size for s in leaf.array.addressable_shards} == {leaf.array.size // parts}, names


EVERYTHING = MeshConfig(replica=2, model=2, fsdp="embed"), "sophia", 4
SPLIT_POSITIONS = MeshConfig(data=2, sequence=4), "sophia_h", 1


@pytest.mark.parametrize(("mesh", "optimizer", "num_microbatches"), [EVERYTHING, SPLIT_POSITIONS])
def test_a_mesh_takes_the_steps_of_one_device(mesh, optimizer, num_microbatches):
    """Each refreshes the curvature, so that they are one program."""
    config = nano(optimizer, num_microbatches)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, interval=1, warmup=20))
    wanted, one = train(config, 1, 3)
    losses, split = train(dataclasses.replace(config, mesh=mesh), 8, 3)
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-5)
    for name, limit in (("momentum", 1e-4), ("curvature", 1e-3), ("model", 1e-4)):
        trees = (state.model if name == "model" else getattr(state.optimizer_state, name) for state in (one, split))
        for x, y in zip(*map(jax.device_get, map(jax.tree.leaves, trees)), strict=True):
            assert np.linalg.norm(x - y) < limit * np.linalg.norm(x), name
    if mesh.fsdp:
        check_split(split, mesh)


def test_the_labels_that_are_drawn_are_the_same_on_any_mesh():
    """Rounding decides a few: one of a refresh's 1,024 labels moves the curvature by some thousandths."""
    config = nano("sophia", 4)
    curvatures = []
    for mesh, num_devices in ((MeshConfig(), 1), (MeshConfig(data=2, sequence=2, model=2, fsdp="embed"), 8)):
        _, state = train(dataclasses.replace(config, mesh=mesh), num_devices, num_steps=1, drawn=True)
        curvatures.append(jax.device_get(jax.tree.leaves(state.optimizer_state.curvature)))
    for one, split in zip(*curvatures, strict=True):
        assert np.linalg.norm(one) > 0
        assert np.linalg.norm(split - one) < 0.02 * np.linalg.norm(one)


@pytest.mark.slow
@pytest.mark.parametrize("run", [EVERYTHING, SPLIT_POSITIONS])
def test_more_steps_of_these_meshes(run):
    """With the layers unrolled, as nano is shipped."""
    check_mesh(*run, "gpt2", 4)


@pytest.mark.slow
@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("fsdp", [None, "embed"])
@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("optimizer", ["sophia", "sophia_h", "adamw", "lion"])
def test_table_of_meshes(optimizer, data, model, fsdp, num_microbatches):
    check_mesh(MeshConfig(data=data, model=model, fsdp=fsdp), optimizer, num_microbatches)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [None, "embed"])
@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2)])
@pytest.mark.parametrize("optimizer", ["sophia", "sophia_h", "adamw"])
def test_table_of_meshes_for_llama(optimizer, data, model, fsdp):
    check_mesh(MeshConfig(data=data, model=model, fsdp=fsdp), optimizer, 4, "llama")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp="embed"), MeshConfig(model=2, fsdp="mlp"), MeshConfig(model=4)])
def test_a_kronecker_basis(mesh):
    """Where its moments have no direction yet a basis follows rounding: 1e-7 in the weights becomes 2e-4 in the loss
    within twenty steps, on one device too."""
    check_mesh(mesh, "sophia_kronecker", 1, atol=1e-3)
