"""A trained model from wherever it lies, on whatever devices there are."""

import shutil

import jax
import numpy as np
import pytest

from sophia_levanter.checkpoint import CheckpointError
from sophia_levanter.errors import InputError
from sophia_levanter.interop.saved_weights import open_model
from sophia_levanter.run.loading import load_model


@pytest.fixture(scope="module")
def run_dir(finished_run, tmp_path_factory):
    """A run of 12 steps with checkpoints after 6 and 12, whose configuration splits parameters over its devices."""
    path = finished_run.copy(tmp_path_factory.mktemp("trained") / "run")
    config = (path / "config.yaml").read_text()
    assert config.count("fsdp: null") == 1
    (path / "config.yaml").write_text(config.replace("fsdp: null", "fsdp: embed"))
    return path


def load(place, **arguments):
    news = []
    return load_model(str(place), report=news.append, **arguments), news


def weights(loaded):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(loaded.model)]


def test_a_run_gives_its_newest_step_or_another(run_dir):
    newest, _ = load(run_dir)
    assert (newest.step, newest.source) == (12, f"step 12 of {run_dir}")
    assert newest.tokenizer.name == "bytes" and newest.config.model.seq_len == 16
    assert newest.model.wte.weight.array.sharding.is_fully_replicated  # the run's mesh is not asked for
    earlier, _ = load(run_dir, step=6)
    assert earlier.step == 6
    assert any((a != b).any() for a, b in zip(weights(newest), weights(earlier), strict=True))


def test_checkpoints_without_their_run_directory_do(run_dir, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(run_dir / "checkpoints")
    for place in (run_dir / "checkpoints", elsewhere):
        for a, b in zip(weights(load(place)[0]), weights(load(run_dir)[0]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_mesh_splits_the_model(run_dir):
    split, _ = load(run_dir, overrides=[("mesh.fsdp", "embed")])
    assert not split.model.wte.weight.array.sharding.is_fully_replicated
    for a, b in zip(weights(split), weights(load(run_dir)[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_dtype(run_dir):
    small, _ = load(run_dir, overrides=[("trainer.parameter_dtype", "bfloat16")])
    assert {leaf.dtype.name for leaf in weights(small)} == {"bfloat16"}


def test_a_folder_of_transformers(gpt2_folder):
    loaded, _ = load(gpt2_folder, overrides=[("data.tokenizer", "bytes")])
    assert (loaded.step, loaded.config.model.num_layers, loaded.config.model.use_bias) == (None, 2, True)
    arrays = dict(open_model(gpt2_folder).arrays)
    np.testing.assert_array_equal(np.asarray(loaded.model.wpe.weight.array), arrays["wpe.weight"])
    assert loaded.source == str(gpt2_folder)


def test_the_newest_whole_one_is_taken(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    (copy / "checkpoints/step-00000012/manifest.json").write_text("{}")
    shutil.copytree(copy / "checkpoints", tmp_path / "bare")
    assert load(tmp_path / "bare")[0].step == 6
    loaded, news = load(copy)
    assert loaded.step == 6 and "damaged checkpoint" in news[0]
    with pytest.raises(CheckpointError, match="digest"):
        load(copy, step=12)


def refused(place, **arguments):
    with pytest.raises(InputError) as error:
        load(place, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input(run_dir, tmp_path, gpt2_folder):
    assert "nowhere does not exist; specify a run directory" in refused(tmp_path / "nowhere")
    assert "contains no model; expected a run's config.yaml" in refused(tmp_path)
    assert "has no checkpoint for step 7; available steps: 6, 12" in refused(run_dir, step=7)
    assert "--step 6 cannot be combined with" in refused(gpt2_folder, step=6)
    assert "data.tokenizer gpt2" in refused(gpt2_folder) or "tiktoken's cache" in refused(gpt2_folder)
    assert "--model.num_layers cannot be combined with" in refused(run_dir, overrides=[("model.num_layers", "3")])
    assert "--model.vocab_rows cannot be combined with" in refused(run_dir, overrides=[("model.vocab_rows", "258")])
    assert "unknown option '--trainer.batchsize'" in refused(run_dir, overrides=[("trainer.batchsize", "3")])
    assert "devices on mesh.data; use a multiple of" in refused(run_dir, overrides=[("mesh.fsdp", "layers")])
    (gpt2_folder / "vocab.json").write_text('{"a": 3}')
    assert "vocab.json: token 3 is 'a', but " in refused(gpt2_folder, overrides=[("data.tokenizer", "bytes")])
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert "the run has not saved a checkpoint" in refused(tmp_path / "begun")


def test_a_tokenizer_of_the_same_size_is_not_taken_for_the_runs(run_dir, monkeypatch):
    from sophia_levanter.data.tokenizer import ByteTokenizer

    class Other(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.fingerprint = "another"

    monkeypatch.setattr("sophia_levanter.run.loading.load_tokenizer", lambda name: Other())
    assert "data.tokenizer bytes differs from the one that" in refused(run_dir)


def test_checkpoints_inside_a_run_directory_are_those_that_are_meant(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    (copy / "backup").mkdir()
    shutil.copytree(copy / "checkpoints/step-00000006", copy / "backup/step-00000006")
    assert load(copy / "backup")[0].step == 6
