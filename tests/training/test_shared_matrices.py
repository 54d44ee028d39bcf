"""With data parallelism each device keeps, decomposes and rotates its share of the matrices."""

import re
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

from sophia_levanter.batch import batch_from_sequences
from sophia_levanter.checkpoint import Retention, restore, save
from sophia_levanter.config.command_line import load_config
from sophia_levanter.models.gpt2 import Gpt2
from sophia_levanter.optim import Sophia
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.planning import collectives
from sophia_levanter.training.costs import abstract_state, device_bytes, lower_step
from sophia_levanter.training.step import StepSettings, TrainState, train_step

CONFIG = Path(__file__).parents[2] / "config" / "gpt2_nano_adamw.yaml"
OPTIMIZERS = {
    "kronecker": {"type": "sophia_g", "basis": "kronecker", "interval": 2, "initial_refreshes": 2},
    "soap": {"type": "soap", "interval": 2},
    "muon": {"type": "muon"},
}
MODEL = {"num_heads": 2, "embed_dim": 16, "seq_len": 16, "loss_block_size": 8, "scan_unroll": 1}
DEVICES, STEPS, ROWS, VOCAB = 8, 4, 8, 257


def setup(kind, num_devices, num_layers=4, **mesh):
    """The configuration of a tiny run, and its devices."""
    sections = {
        "optimizer": OPTIMIZERS[kind],
        "model": MODEL | {"num_layers": num_layers},
        "trainer": {"batch_size": ROWS},
        "mesh": mesh,
    }
    overrides = [(f"{name}.{field}", str(x)) for name, section in sections.items() for field, x in section.items()]
    config = load_config(CONFIG, overrides)
    return config, partition_of(config.mesh, jax.devices()[:num_devices])


def factors_of(state):
    """The arrays of a basis: no other array of these states is a stack of square ones."""
    leaves = jax.tree.leaves(state.optimizer_state)
    return [x for x in leaves if x.ndim == 3 and x.shape[1] == x.shape[2]]


@pytest.mark.parametrize(
    ("kind", "num_layers", "mesh"),
    [
        ("kronecker", 4, {"fsdp": "embed"}),
        ("kronecker", 8, {"model": 2}),
        ("soap", 4, {}),
        ("soap", 8, {"replica": 2}),
    ],
)
def test_each_device_keeps_its_share_of_the_factors(kind, num_layers, mesh):
    """By matrix where the devices divide their number, else by rows."""
    config, partition = setup(kind, DEVICES, num_layers, **mesh)
    factors = factors_of(abstract_state(config, partition, VOCAB))
    # A moment and vectors for each side of query, key, value, the attention's projection and the MLP's two of 16 x 64.
    whole = sum(4 * x.size for x in factors)
    assert whole == 2 * 4 * num_layers * (10 * 16**2 + 2 * 64**2)
    assert device_bytes(factors) <= 1.1 / partition.mesh.shape["data"] * whole


def qr_work(hlo):
    """n^3 of every QR decomposition that a device computes."""
    computations, entry = collectives._parse(hlo)

    def count(name):
        total = 0
        for instruction in computations[name].instructions.values() if name in computations else ():
            if 'custom_call_target="lapack_sgeqrf' in instruction.text:
                shape = [int(n) for n in re.search(r"f32\[([\d,]+)\]", instruction.text)[1].split(",")]
                total += int(np.prod(shape)) * shape[-1]
            elif instruction.opcode == "while":
                inside = count(collectives._attribute(instruction.text, "body"))
                total += inside and inside * collectives._turns(computations, instruction)
            else:
                total += sum(map(count, set(instruction.called)))
        return total

    return count(entry)


@pytest.mark.parametrize("kind", ["kronecker", "muon", pytest.param("soap", marks=pytest.mark.slow)])
def test_each_device_works_on_its_share_of_the_matrices(kind):
    config, partition = setup(kind, DEVICES, fsdp="embed")
    step = lower_step(config, partition, VOCAB, refresh=kind == "kronecker").compile()
    # 4 layers of sides 16, two each of query, key, value and projection and one each of the MLP's, and sides 64.
    whole = 0 if kind == "muon" else 4 * (10 * 16**3 + 2 * 64**3)
    assert whole / DEVICES <= qr_work(step.as_text()) <= 1.3 / DEVICES * whole
    # Parameters are gathered for the forward and the backward pass, and nothing else is.
    parameters = sum(4 * x.size for x in jax.tree.leaves(abstract_state(config, partition, VOCAB).model))
    assert collectives.collective_bytes(step.as_text())["all-gather"] <= 2.1 * parameters * (DEVICES - 1) / DEVICES


class Run:
    """A tiny run on some devices, step by step."""

    def __init__(self, kind, num_devices, **mesh):
        self.config, self.partition = setup(kind, num_devices, **mesh)
        settings = StepSettings.of(self.config)
        self.refresh_due = settings.optimizer.refresh_due
        kinds = (False, True) if isinstance(settings.optimizer, Sophia) else (False,)
        self.steps = [eqx.filter_jit(partial(train_step, settings, refresh)) for refresh in kinds]

        def initial_state():
            model = Gpt2.init(self.config.model, vocab_size=VOCAB, key=jax.random.key(0))
            return TrainState.init(model, settings.optimizer, settings.policy)

        self.state = self.partition.init_sharded(initial_state)
        self.like = self.partition.abstract(initial_state)

    def train(self, first, stop):
        """The losses of these steps."""
        losses = []
        for step in range(first, stop):
            windows = np.random.default_rng(step).integers(0, 64, (ROWS, MODEL["seq_len"] + 1), dtype=np.int32)
            batch = self.partition.place(batch_from_sequences(windows, num_microbatches=1))
            with self.partition.active():
                self.state, output = self.steps[bool(self.refresh_due(step))](batch, self.state)
            losses.append(float(output.metrics["train/loss"]))
        return losses

    def save(self, directory):
        save(directory, 1, self.state, run_id="run", metadata={}, retention=Retention(1))

    def restore(self, directory):
        self.state = restore(directory, self.like, report=pytest.fail).tree


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "soap" else pytest.mark.slow) for kind in OPTIMIZERS]
)
def test_one_device_and_eight_take_the_same_steps_and_each_others_checkpoints(kind, tmp_path):
    """Checkpoints of one device are what they were when every device had all factors."""
    one, eight = Run(kind, 1), Run(kind, DEVICES, fsdp="embed")
    half = STEPS // 2
    losses = one.train(0, half)
    np.testing.assert_allclose(eight.train(0, half), losses, rtol=0, atol=1e-5)
    assert {s.data.size for x in factors_of(eight.state) for s in x.addressable_shards} == {
        x.size // DEVICES for x in factors_of(eight.state)
    }
    one.save(tmp_path / "one")
    eight.save(tmp_path / "eight")
    wanted = one.train(half, STEPS)
    assert wanted[-1] < losses[0]
    for run, directory in ((eight, "one"), (eight, "eight"), (one, "eight")):
        run.restore(tmp_path / directory)
        np.testing.assert_allclose(run.train(half, STEPS), wanted, rtol=0, atol=1e-4)
    for x, y in zip(factors_of(eight.like), factors_of(eight.state), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, 3)
