"""`export`: what it refuses, and what it makes of other models than runs."""

import jax
import numpy as np
import pytest

from sophia_levanter.commands import export
from sophia_levanter.run.loading import load_model

BAD = {
    "no words": ([], "0 words are given; write MODEL OUT_DIR"),
    "no folder": (["MODEL"], "1 words are given; write MODEL OUT_DIR"),
    "too many": (["MODEL", "out", "more"], "3 words are given"),
    "no model": (["nowhere", "out"], "nowhere does not exist"),
    "an unknown dtype": (["MODEL", "out", "--dtype", "float64"], "--dtype is 'float64'; it must be one of float32, bf"),
    "a step of a folder": (["MODEL", "out", "--step", "3"], "--step 3 does not go with MODEL, which is no run"),
    "no step": (["MODEL", "out", "--step", "-1"], "--step is '-1'; it must be a whole number"),
    "files": (["MODEL", "full"], "full holds files already; name an empty or a new folder"),
    "a file": (["MODEL", "full/notes.txt"], "notes.txt is a file; name an empty or a new folder"),
    "its own folder": (["MODEL", "MODEL"], "MODEL holds files already"),
    "another tokenizer": (["MODEL", "out", "--data.tokenizer", "bites"], "did you mean bytes?"),
    "another model": (["MODEL", "out", "--model.use_bias", "false"], "--model.use_bias does not go with MODEL"),
    "an empty word": (["MODEL", ""], "an argument is empty"),
    "a folder of another kind": (["full", "out"], "holds no model: no config.yaml of a run"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, gpt2_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    words, wanted = BAD[name]
    assert export.main([word.replace("MODEL", str(gpt2_folder)) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert (wanted if name in ("no words", "no folder") else wanted.replace("MODEL", str(gpt2_folder))) in error
    assert {path.name for path in tmp_path.iterdir()} == {"full", "gpt2"}


def test_a_folder_of_transformers_goes_out_with_the_tokenizer_that_is_named(gpt2_folder, tmp_path, capsys):
    assert export.main([str(gpt2_folder), str(tmp_path / "out"), "--data.tokenizer", "bytes"]) == 0
    back = load_model(str(tmp_path / "out"), report=print)
    assert back.tokenizer.name == "bytes" and back.config.model.use_bias
    given = load_model(str(gpt2_folder), overrides=[("data.tokenizer", "bytes")], report=print)
    for a, b in zip(jax.tree.leaves(back.model), jax.tree.leaves(given.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_help(capsys):
    assert export.main(["--help"]) == 0
    assert capsys.readouterr().out == export.USAGE + "\n"


def test_a_link_to_an_empty_folder_stays_one(gpt2_folder, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert export.main([str(gpt2_folder), str(tmp_path / "link"), "--data.tokenizer", "bytes"]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there/config.json").exists()
