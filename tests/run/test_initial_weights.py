"""Runs that start from weights in a file."""

import json
import shutil

import equinox as eqx
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sophia_levanter.batch import batch_from_sequences
from sophia_levanter.config.command_line import load_config
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.data.batches import TrainBatches
from sophia_levanter.data.corpora import prepare
from sophia_levanter.interop.exporting import export_model
from sophia_levanter.main import main
from sophia_levanter.models.huggingface import gpt2_from_state_dict
from sophia_levanter.run.directory import RunDirectory
from sophia_levanter.run.loading import _digest, load_model
from sophia_levanter.run.run import Run
from sophia_levanter.tracking.console import Console
from tiny_runs import metrics

SPLIT = ["--mesh.data", "4", "--mesh.model", "2", "--mesh.fsdp", "embed"]
BIASES = ["--model.use_bias", "true"]


def saved_model(folder):
    """The model in the folder, not by way of what is tested."""
    config = Gpt2Config(num_layers=2, num_heads=2, embed_dim=16, seq_len=16, loss_block_size=8, use_bias=True)
    return gpt2_from_state_dict(config, load_file(folder / "model.safetensors"))


def first_loss(model, config):
    """The mean loss of a model on a run's first batch, on one device."""
    data = prepare(config.data, print)
    windows = TrainBatches(data.train, seq_len=16, batch_size=16, seed=config.trainer.seed)[0]
    batch = jax.tree.map(
        lambda x: x["microbatch", 0], batch_from_sequences(windows), is_leaf=lambda x: hasattr(x, "axes")
    )
    return float(eqx.filter_jit(lambda model, batch: model.losses(batch)[0])(model, batch)) / windows[:, 1:].size


def test_the_first_loss_is_that_of_the_weights_and_going_on_needs_no_file(
    gpt2_folder, config_file, tmp_path, monkeypatch, stop_after, capfd
):
    folder, model = gpt2_folder, saved_model(gpt2_folder)
    run_dir = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    run = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--trainer.initial_weights", "gpt2"]
    run += [*BIASES, *SPLIT, "--optimizer.type", "adamw"]
    stop_after(0)
    assert main(run) == 130
    assert f"initial weights: {folder}\n" in capfd.readouterr().out
    config = load_config(run_dir / "config.yaml")
    assert config.trainer.initial_weights == str(folder)
    assert metrics(run_dir)[0] == pytest.approx(first_loss(model, config), rel=1e-5)
    assert metrics(run_dir)[0] > 5.6  # log 257 is what small random weights have
    shutil.rmtree(folder)
    stop_after(4)
    assert main([*run, "--resume", "auto"]) == 130
    assert "initial weights" not in capfd.readouterr().out
    monkeypatch.chdir("/")
    assert main(["--resume", str(run_dir)]) == 0
    assert list(metrics(run_dir)) == list(range(12))
    assert load_model(str(run_dir), report=print).step == 12


@pytest.mark.parametrize("optimizer", ["sophia_g", "muon"])
def test_the_state_has_the_weights_where_drawn_ones_would_lie(optimizer, gpt2_folder, config_file, tmp_path):
    folder, model = gpt2_folder, saved_model(gpt2_folder)
    options = [*BIASES, *SPLIT, "--optimizer.type", optimizer, "--trainer.parameter_dtype", "bfloat16"]
    options += ["--trainer.initial_weights", str(folder)]
    names = [name.removeprefix("--") for name in options[::2]]
    config = load_config(config_file, list(zip(names, options[1::2], strict=True)))
    console = Console(1, silent=True)
    run = Run(config, RunDirectory(tmp_path / "run", "never"), console)
    weights = run.initial_weights
    before = jax.tree.map(np.copy, weights)
    state = run.start()
    drawn = run.partition.init_sharded(run.initial_state)
    assert jax.tree.structure(state) == jax.tree.structure(drawn)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(drawn), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    for ours, theirs in zip(jax.tree.leaves(state.model), jax.tree.leaves(model), strict=True):
        assert ours.dtype == "bfloat16"
        np.testing.assert_array_equal(ours, np.asarray(theirs).astype("bfloat16"))
    # What a step does to its buffers does not reach the host's copy.
    eqx.filter_jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate="all")(state)
    for ours, theirs in zip(jax.tree.leaves(weights), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rows_beyond_the_tokenizers_stay_until_they_are_exported(gpt2_folder, config_file, tmp_path, stop_after, capfd):
    rows = 258  # with an added padding token
    arrays = load_file(gpt2_folder / "model.safetensors")
    arrays["transformer.wte.weight"] = np.resize(arrays["transformer.wte.weight"], (rows, 16))
    save_file(arrays, gpt2_folder / "model.safetensors")
    shape = json.loads((gpt2_folder / "config.json").read_text())
    (gpt2_folder / "config.json").write_text(json.dumps(shape | {"vocab_size": rows}))
    run = ["--config", str(config_file), "--trainer.initial_weights", str(gpt2_folder), *BIASES, "--resume", "auto"]
    run += ["--trainer.run_dir", str(tmp_path / "run"), "--optimizer.type", "adamw", "--optimizer.warmup", "0"]
    # A learning rate that moves nothing leaves the weights as they were.
    run += ["--optimizer.learning_rate", "1e-30", "--optimizer.final_learning_rate", "0"]
    stop_after(0)
    assert main([*run, "--trainer.num_train_steps", "4"]) == 130
    news = f"the embedding has {rows} rows: 257 for the tokens of data.tokenizer bytes and 1 more, which are kept"
    assert news in capfd.readouterr().out
    shutil.rmtree(gpt2_folder)
    assert main([*run, "--trainer.num_train_steps", "4"]) == 0
    loaded = load_model(str(tmp_path / "run"), report=print)
    assert (loaded.step, loaded.model.vocab_size, loaded.config.model.vocab_rows) == (4, 257, rows)
    export_model(loaded, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == rows
    exported = load_file(tmp_path / "out/model.safetensors")["transformer.wte.weight"]
    np.testing.assert_array_equal(exported, arrays["transformer.wte.weight"])
    assert load_model(str(tmp_path / "out"), report=print).config.model.vocab_rows == rows
    capfd.readouterr()
    assert main(["--resume", str(tmp_path / "run"), "--model.vocab_rows", "259"]) == 2
    assert "model.vocab_rows was 258 and is now 259, which changes the model" in capfd.readouterr().err


BAD = {
    "missing": (["--trainer.initial_weights", "nowhere"], "nowhere: file not found"),
    "empty": (["--trainer.initial_weights", ""], "trainer.initial_weights is empty"),
    "no biases": (["--model.use_bias", "false"], "set --model.use_bias true"),
    "layers": (["--model.num_layers", "3"], "model.num_layers is 3, but "),
    "a file that is no checkpoint": (["--trainer.initial_weights", "text.txt"], "text.txt: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_one_line_and_write_nothing(name, gpt2_folder, config_file, tmp_path, capfd, monkeypatch):
    arguments, wanted = BAD[name]
    monkeypatch.chdir(tmp_path)
    options = {"--trainer.initial_weights": "gpt2", "--model.use_bias": "true"} | {arguments[0]: arguments[1]}
    words = [word for option in options.items() for word in option]
    assert main(["--config", str(config_file), "--trainer.run_dir", "run", *words]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert wanted in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_weights_of_another_vocabulary(gpt2_folder, config_file, tmp_path, capfd):
    (gpt2_folder / "vocab.json").write_text('{"a": 3}')
    command = ["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run"), *BIASES]
    assert main([*command, "--trainer.initial_weights", str(gpt2_folder)]) == 2
    wanted = (
        f"error: trainer.initial_weights {gpt2_folder}/vocab.json: token 3 is 'a', but b'\\x03' in data.tokenizer bytes"
    )
    assert capfd.readouterr().err.startswith(wanted)


def test_a_run_that_has_begun_takes_no_other_weights(gpt2_folder, finished_run, tmp_path, capfd):
    run_dir = finished_run.copy(tmp_path / "run")
    weights = ["--trainer.initial_weights", str(gpt2_folder)]
    assert main(["--resume", str(run_dir), *weights]) == 2
    error = capfd.readouterr().err
    assert f"trainer.initial_weights was None and is now {gpt2_folder}, but the run has already started" in error
    run = ["--config", str(finished_run.config_file), "--trainer.run_dir", str(run_dir), "--resume", "auto"]
    assert main([*run, *weights]) == 2
    assert "contains another run: its trainer.initial_weights is None" in capfd.readouterr().err


def test_other_weights_have_another_digest(gpt2_folder):
    model = jax.tree.map(np.asarray, saved_model(gpt2_folder))
    again, other = jax.tree.map(np.copy, (model, model))
    jax.tree.leaves(other)[-1].flat[-1] += 1
    assert _digest(model) == _digest(again) != _digest(other)
