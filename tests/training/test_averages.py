"""Averages of the weights: kept, evaluated, saved, and read by the commands on models."""

import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sophia_levanter import checkpoint
from sophia_levanter.batch import batch_from_sequences
from sophia_levanter.commands import evaluate, export, sample
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError
from sophia_levanter.main import main
from sophia_levanter.optim import AdamW
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.averages import averages
from sophia_levanter.training.step import StepSettings, TrainState, first_state, train_step
from tiny_runs import metrics, write_config, write_text

DECAY = 0.15


def floats(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))]


def test_the_average_follows_the_weights_of_good_steps(make_model):
    """In float32, of weights in bfloat16."""
    settings = StepSettings(AdamW(learning_rate=0.1), ema_decay=DECAY)
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_model())
    partition = partition_of(devices=jax.devices()[:1])
    state = TrainState.init(model, settings.optimizer, averaged=True)
    wanted = floats(model)
    weights = np.ones((2, 8), np.float32)
    with partition.active():
        step = eqx.filter_jit(lambda batch, state: train_step(settings, False, batch, state))
        for number in range(4):
            bad = np.full_like(weights, np.nan) if number == 2 else weights
            sequences = np.random.default_rng(number).integers(0, 100, (2, 9)).astype(np.int32)
            state, _ = step(batch_from_sequences(sequences, bad), state)
            decay = min(DECAY, (1 + number) / (10 + number))
            if number != 2:
                wanted = [decay * a + (1 - decay) * p for a, p in zip(wanted, floats(state.model), strict=True)]
    for found, mean in zip(jax.tree.leaves(state.average), wanted, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-6)


def test_the_mean_of_the_latest_snapshots(make_model):
    """Of two, one after every second step; also after a step that is skipped, whose weights are those before."""
    settings = StepSettings(AdamW(learning_rate=0.1), lawa_interval=2, lawa_snapshots=2)
    partition = partition_of(devices=jax.devices()[:2])
    start = make_model()
    state = partition.place(first_state(settings, jax.tree.map(lambda x: x.astype(jnp.float32), start)))
    weights, snapshots = np.ones((2, 8), np.float32), []
    with partition.active():
        step = eqx.filter_jit(lambda batch, state: train_step(settings, False, batch, state))
        for number in range(8):
            bad = np.full_like(weights, np.nan) if number == 3 else weights
            sequences = np.random.default_rng(number).integers(0, 100, (2, 9)).astype(np.int32)
            state, _ = step(partition.place(batch_from_sequences(sequences, bad)), state)
            if number % 2 == 1:
                snapshots.append(floats(state.model))
            latest = snapshots[-2:] or [floats(state.model)]
            for found, *taken in zip(jax.tree.leaves(state.average), *latest, strict=True):
                np.testing.assert_allclose(found, np.mean(taken, axis=0), rtol=1e-5, atol=1e-6)
    assert int(state.skipped_steps) == 1
    held = {tuple(leaf.sum() for leaf in floats(snapshot)) for snapshot in state.snapshots}
    assert held == {tuple(leaf.sum() for leaf in snapshot) for snapshot in snapshots[-2:]}


def test_the_mean_counts_the_snapshots_that_there_are(make_model):
    """After 30 steps of an interval of 10 that is new to the run, one of three is there."""
    model = jax.tree.map(lambda x: x.astype(jnp.float32), make_model())
    settings = StepSettings(AdamW(), lawa_interval=10, lawa_snapshots=3)
    state = first_state(settings, model)
    state = eqx.tree_at(lambda state: state.step, state, jnp.asarray(29))
    average, snapshots = averages(settings, state, model, jnp.asarray(True))
    for found, wanted in zip(floats(average), floats(model), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert sum(bool(np.any(floats(snapshot)[0])) for snapshot in snapshots) == 1


@pytest.fixture(
    scope="module",
    params=[
        ["--trainer.ema_decay", "0.9"],
        pytest.param(["--trainer.lawa_every", "2", "--trainer.lawa_snapshots", "2"], marks=pytest.mark.slow),
    ],
    ids=["ema", "lawa"],
)
def averaging(request, tmp_path_factory):
    """A finished run that keeps an average, resumed after six steps."""
    folder = tmp_path_factory.mktemp("averaging")
    config = write_config(folder, write_text(folder))
    command = ["--config", str(config), "--trainer.run_dir", str(folder / "run"), *request.param]
    command += ["--optimizer.type", "adamw", "--trainer.parameter_dtype", "bfloat16"]
    assert main(command) == 0
    shutil.rmtree(folder / "run/checkpoints/step-00000012")
    assert main([*command, "--resume", "auto"]) == 0
    return folder / "run"


def test_it_is_evaluated_and_saved(averaging):
    raw, mean = (metrics(averaging, f"validation/{name}") for name in ("loss", "average_loss"))
    assert set(raw) == set(mean) == {5, 11}
    assert all(np.isfinite(list(mean.values()))) and mean[11] != raw[11]
    saved = dict(checkpoint.read_arrays(averaging / "checkpoints", checkpoint.read_step(averaging / "checkpoints", 12)))
    names = {path.removeprefix("average.") for path in saved if path.startswith("average.")}
    assert names == {path.removeprefix("model.") for path in saved if path.startswith("model.")}


def test_commands_read_it(averaging, tmp_path, capfd):
    for flags, name in (([], "loss"), (["--averaged"], "average_loss")):
        assert evaluate.main([str(averaging), "--windows", "20", *flags]) == 0
        out = capfd.readouterr().out
        assert f"loss           {metrics(averaging, f'validation/{name}')[11]:.4f} nats per token" in out
        assert ("averaged weights" in out) is bool(flags)
    exported = tmp_path / "exported"
    assert export.main([str(averaging), str(exported), "--averaged", "--dtype", "float32"]) == 0
    assert "averaged weights" in capfd.readouterr().out
    # The average is kept in float32, although the parameters are in bfloat16.
    weights = load_file(exported / "model.safetensors").values()
    assert any((x != np.asarray(x.astype(jnp.bfloat16), np.float32)).any() for x in weights)
    assert sample.main([str(averaging), "--averaged", "--tokens", "3"]) == 0


def test_where_there_is_no_average(finished_run, gpt2_folder, capfd):
    assert evaluate.main([str(finished_run.path), "--averaged"]) == 2
    assert "has no averaged weights; only runs with trainer.ema_decay or trainer.lawa_every" in capfd.readouterr().err
    assert sample.main([str(gpt2_folder), "--averaged"]) == 2
    assert f"--averaged cannot be combined with {gpt2_folder}, which is not a run directory" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"ema_decay": 0.9},
            r"^trainer\.ema_decay 0\.9 and trainer\.lawa_every 8 cannot be combined; specify only one$",
        ),
        ({"num_train_steps": 7}, r"^trainer\.lawa_every 8 exceeds trainer\.num_train_steps 7$"),
    ],
)
def test_settings_that_do_not_go_together(given, message):
    with pytest.raises(InputError, match=message):
        TrainerConfig(lawa_every=8, **given)
    assert TrainerConfig(lawa_every=0.25, num_train_steps=8).lawa_interval == 2
