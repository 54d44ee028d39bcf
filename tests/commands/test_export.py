"""`export`: the way of a model into a folder and from there on, and what is refused."""

import json

import jax
import numpy as np
import pytest

from sophia_levanter.commands import export
from sophia_levanter.config.command_line import load_config
from sophia_levanter.models.huggingface import gpt2_to_state_dict
from sophia_levanter.run.directory import RunDirectory
from sophia_levanter.run.loading import load_model
from sophia_levanter.run.run import Run
from sophia_levanter.tracking.console import Console


def weights(place, **options):
    return gpt2_to_state_dict(load_model(str(place), report=print, **options).model)


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_run_goes_out_and_another_starts_from_it(trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert export.main([str(trained / "run"), "out"]) == 0
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert capfd.readouterr().out == (
        f"exported step 12 of {trained / 'run'} to {tmp_path / 'out'}: float32, {size:,} bytes, tokenizer bytes\n"
    )
    assert_same(weights("out"), weights(trained / "run"))
    assert export.main([str(trained / "run"), "half", "--step", "6", "--dtype=bfloat16"]) == 0
    assert json.loads((tmp_path / "half/config.json").read_text())["sophia_levanter"]["step"] == 6
    earlier = {name: array.astype("bfloat16") for name, array in weights(trained / "run", step=6).items()}
    assert_same(weights("half"), earlier)

    config = load_config(trained / "tiny.yaml", [("trainer.initial_weights", "out")])
    again = Run(config, RunDirectory(tmp_path / "again", "never"), Console(1, silent=True))
    assert_same(gpt2_to_state_dict(again.start().model), weights("out"))


BAD = {
    "no words": ([], "expected MODEL and OUT_DIR, found 0 arguments"),
    "no folder": (["MODEL"], "expected MODEL and OUT_DIR, found 1 argument"),
    "too many": (["MODEL", "out", "more"], "found 3 arguments"),
    "no model": (["nowhere", "out"], "nowhere does not exist"),
    "an unknown dtype": (["MODEL", "out", "--dtype", "float64"], "--dtype is 'float64'; it must be one of float32, bf"),
    "files": (["MODEL", "full"], "full already contains files; specify an empty or new folder"),
    "a file": (["MODEL", "full/notes.txt"], "notes.txt is a file; specify an empty or new folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    words, wanted = BAD[name]
    assert export.main([word.replace("MODEL", str(trained / "exported")) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert wanted in error
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_a_folder_of_transformers_goes_out_with_the_tokenizer_that_is_named(gpt2_folder, tmp_path, capsys):
    assert export.main([str(gpt2_folder), str(tmp_path / "out"), "--data.tokenizer", "bytes"]) == 0
    back = load_model(str(tmp_path / "out"), report=print)
    assert back.tokenizer.name == "bytes" and back.config.model.use_bias
    given = load_model(str(gpt2_folder), overrides=[("data.tokenizer", "bytes")], report=print)
    for a, b in zip(jax.tree.leaves(back.model), jax.tree.leaves(given.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_link_to_an_empty_folder_stays_one(gpt2_folder, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert export.main([str(gpt2_folder), str(tmp_path / "link"), "--data.tokenizer", "bytes"]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there/config.json").exists()
