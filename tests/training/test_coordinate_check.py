"""Coordinate checks: a few steps change activations by as much at every size (arXiv 2203.03466, appendix D.1)."""

import dataclasses
from functools import cache, lru_cache, partial

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.batch import batch_from_sequences
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig, AdEMAMixConfig, LionConfig, MuonConfig, SoapConfig
from sophia_levanter.config.groups import GroupConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import SophiaGConfig, SophiaHConfig
from sophia_levanter.config.schedule import ConstantSchedule
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.step import StepSettings, first_state, train_step

WIDTH, LAYERS, STEPS = 64, 2, 5  # of the base; the first step has the rate 0, as with any warm-up
LENGTH = 16
RATES = {"learning_rate": 2e-3, "warmup": 1, "schedule": ConstantSchedule()}
SOPHIA = RATES | {"rho": 0.5, "interval": 1}
OPTIMIZERS = {
    "adamw": AdamWConfig(**RATES),
    "ademamix": AdEMAMixConfig(**RATES),
    "lion": LionConfig(**RATES),
    "muon": MuonConfig(**RATES),
    "soap": SoapConfig(**RATES),
    "sophia_g": SophiaGConfig(**SOPHIA),
    "sophia_h": SophiaHConfig(**SOPHIA),
    "kronecker": SophiaGConfig(**SOPHIA, basis="kronecker", basis_b2=0.5),
    "hyperball": AdamWConfig(**RATES | {"learning_rate": 1e-2}, hyperball=True),
    "muon_hyperball": MuonConfig(**RATES | {"learning_rate": 1e-2}, hyperball=True),
}


@cache
def data(name):
    """A vocabulary's size, and a batch with tokens as often as words are, the same at each step.

    A hyperball fixes the norm of an update, which Muon divides equally among the directions of the gradient. Their
    number must therefore grow with the width, so Muon on a hyperball gets more distinct inputs.
    """
    vocab_size, rows = (1000, 64) if name == "muon_hyperball" else (50, 8)
    shares = 1 / np.arange(1, vocab_size + 1)
    drawn = np.random.default_rng(0).choice(vocab_size, (rows, LENGTH + 1), p=shares / shares.sum())
    return vocab_size, batch_from_sequences(drawn.astype(np.int32))


@eqx.filter_jit
def activations(model, tokens):
    """The input of the first block, the results of the blocks, and the logits."""
    found = [model.embed(hax.named(tokens, ("batch", "position")), None)]
    for layer, block in enumerate(model.blocks.unstacked()):
        found.append(block(found[-1], hax.named(jnp.asarray(layer), ()), None))
    return [x.array for x in [*found, model.head(model.head_inputs(found[-1]))]]


@lru_cache(maxsize=8)
def trained(name, width=WIDTH, num_layers=LAYERS, parametrization="mup", matrices_alone=False):
    """The states before the first step and after each, and the last step's output.

    There are two heads at any width, so that their size grows too. Embeddings change activations more than matrices do
    under some optimizers; with `matrices_alone` they keep their values.
    """
    base = {"base_embed_dim": WIDTH, "base_head_size": WIDTH // 2, "base_num_layers": LAYERS}
    model = Gpt2Config(
        num_layers=num_layers,
        num_heads=2,
        embed_dim=width,
        mlp_ratio=1,
        seq_len=LENGTH,
        loss_block_size=LENGTH,
        gradient_checkpointing="none",
        initializer_range=0.07,
        parametrization=parametrization,
        **base if parametrization == "mup" else {},
    )
    vocab_size, batch = data(name)
    trainer = TrainerConfig(num_train_steps=STEPS, batch_size=batch.tokens.array.shape[1], max_grad_norm=None)
    still = tuple(GroupConfig(role=role, learning_rate="0 x") for role in ("embedding", "vector"))
    optimizer = dataclasses.replace(OPTIMIZERS[name], groups=still if matrices_alone else ())
    settings = StepSettings.of(TrainConfig(model=model, optimizer=optimizer, trainer=trainer))
    partition = partition_of(devices=jax.devices()[:1])
    step = eqx.filter_jit(partial(train_step, settings, settings.optimizer.refresh_due(0)))
    with partition.active():
        built = eqx.filter_jit(model.build)(vocab_size=vocab_size, key=jax.random.key(0))
        states = [first_state(settings, built)]
        for _ in range(STEPS):
            state, output = step(batch, states[-1])
            states.append(state)
    return states, output


def rms(x):
    return float(jnp.sqrt(jnp.mean(x**2)))


def changes(name, *args, **kwargs):
    """The root mean squares of what the steps change in the activations, and the last step's win rate."""
    states, output = trained(name, *args, **kwargs)
    tokens = data(name)[1].tokens.array[0]
    pairs = zip(activations(states[-1].model, tokens), activations(states[0].model, tokens), strict=True)
    found = np.array([rms(after - before) for after, before in pairs])
    return found, float(output.metrics.get("optim/win_rate", np.nan))


@pytest.mark.parametrize("name", ["sophia_g", pytest.param("sophia_h", marks=pytest.mark.slow)])
def test_momentum_and_curvature_do_not_depend_on_the_width(name):
    """After one step they are the scaled gradient and the scaled estimate times constants."""
    base, wide = (trained(name, width)[0][1].optimizer_state for width in (WIDTH, 4 * WIDTH))
    for field in ("momentum", "curvature"):
        leaves = (jax.tree_util.tree_leaves_with_path(getattr(state, field)) for state in (base, wide))
        for (path, small), (_, large) in zip(*leaves, strict=True):
            ratio = float(jnp.mean(jnp.abs(large)) / jnp.mean(jnp.abs(small)))
            print(name, field, jax.tree_util.keystr(path), round(ratio, 2))
            assert 1 / 3 < ratio < 3


@pytest.mark.parametrize("name", ["adamw", "sophia_g"])
def test_a_wider_model(name):
    base, wide = (changes(name, width)[0] for width in (WIDTH, 4 * WIDTH))
    assert np.all(np.abs(np.log2(wide / base)) < 1)


def test_a_wider_model_in_the_standard_parametrization():
    """What blocks compute changes more. Embeddings change by the learning rate at any width."""
    wide, _ = changes("adamw", 4 * WIDTH, parametrization="standard")
    assert np.all(wide[1:] > 2 * changes("adamw", WIDTH)[0][1:])


def spread(found):
    """The largest over the smallest."""
    return np.max(found, axis=0) / np.min(found, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("matrices_alone", [True, False], ids=["matrices", "all"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_widths(name, matrices_alone):
    table = {width: changes(name, width, matrices_alone=matrices_alone) for width in (64, 128, 256, 512)}
    for width, (found, win_rate) in table.items():
        print(name, width, np.round(found, 4), round(win_rate, 3))
    standard = changes(name, 512, parametrization="standard", matrices_alone=matrices_alone)[0]
    print(name, "standard", 512, np.round(standard, 4))
    found, win_rates = zip(*table.values(), strict=True)
    assert np.all(spread([x[1:] for x in found]) < 2)
    assert np.all([x[0] == 0 for x in found]) if matrices_alone else spread([x[0] for x in found]) < 2
    assert standard[-1] > 2 * found[0][-1]
    if name in ("sophia_g", "sophia_h", "kronecker"):
        assert spread(win_rates) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "sophia_g"])
def test_all_depths(name):
    """The last block's result and the logits."""
    table = {depth: changes(name, num_layers=depth)[0][-2:] for depth in (2, 4, 8, 16)}
    for depth, found in table.items():
        print(name, depth, "layers", np.round(found, 4))
    standard = changes(name, num_layers=16, parametrization="standard")[0][-2:] / table[2]
    print(name, "standard, 16 layers over 2", np.round(standard, 2))
    assert np.all(spread(list(table.values())) < 2)
    assert standard[0] > 2  # the final norm hides most of it from the logits
