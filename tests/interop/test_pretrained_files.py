"""Files of pretrained weights: several, damaged ones, and what is not a file."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file
from weight_files import assert_same, read, refused


def test_shards(folder, model, arrays):
    names = sorted(arrays)
    files = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    (folder / "model.safetensors").unlink()
    for file, part in files.items():
        save_file({name: np.ascontiguousarray(arrays[name]) for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(read(folder, model.config), model)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: missing, damaged" in refused(folder, model.config)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "index.json: has no weight_map" in refused(folder, model.config)
    (folder / "model.safetensors.index.json").write_text("{")
    assert "index.json: not valid JSON" in refused(folder, model.config)


@pytest.mark.parametrize("name", ["../other.safetensors", "..", "", "a\0b"])
def test_an_index_names_files_of_its_folder_only(name, folder, model, arrays):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, name)}))
    message = refused(folder, model.config)
    assert message.isprintable() and f"{index}: refers to {name!r}, which is not a file in the same folder" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_pipes_and_devices_are_not_read(name, folder, model):
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "first.safetensors"}}')
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert refused(folder, model.config) == f"{folder / name}: not a regular file"
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert refused(folder, model.config) == f"{folder / name}: not a regular file"
    for path in ("/dev/zero", folder / name):
        assert refused(path, model.config).startswith(f"{path}: not a regular file; specify a folder saved by ")


def test_shards_that_are_pipes(folder, model):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "first.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "first.safetensors"}}')
    assert refused(folder, model.config) == f"{folder}/first.safetensors: not a regular file"
    (folder / "first.safetensors").unlink()
    assert "first.safetensors: missing, damaged or incomplete" in refused(folder, model.config)


def test_shards_that_both_have_an_array(folder, model, arrays):
    save_file({"transformer.wte.weight": arrays["transformer.wte.weight"]}, folder / "more.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    index["weight_map"]["a"] = "first.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "transformer.wte.weight is also in first.safetensors" in refused(folder, model.config)


def test_no_such_file(model, tmp_path):
    assert "nowhere: file not found; specify a folder" in refused(tmp_path / "nowhere", model.config)
    assert "the path contains a character that is not allowed in file names; specify a folder" in refused(
        "a\0b", model.config
    )


def test_a_folder_of_something_else(folder, model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json is missing; specify a folder saved by" in refused(tmp_path / "empty", model.config)
    (tmp_path / "empty" / "ckpt.pt").touch()
    assert refused(tmp_path / "empty", model.config).endswith(f"specify {tmp_path}/empty/ckpt.pt")
    assert f"specify its folder, {folder}," in refused(folder / "model.safetensors", model.config)
    (folder / "model.safetensors").unlink()
    assert "contains neither model.safetensors nor" in refused(folder, model.config)
    (folder / "pytorch_model.bin").touch()
    assert "found pytorch_model.bin but no model.safetensors; pickle files are not loaded" in refused(
        folder, model.config
    )


@pytest.mark.parametrize(
    ("text", "wanted"), [(b"{", "not valid JSON"), (b"[" * 100_000, "not valid JSON"), (b"3", "not a JSON object")]
)
def test_a_config_that_is_no_json(text, wanted, folder, model):
    (folder / "config.json").write_bytes(text)
    assert f"config.json: {wanted}" in refused(folder, model.config)


@pytest.mark.parametrize("size", [0, -1])
def test_a_truncated_file(size, folder, model):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    assert len(content) > 4000
    file.write_bytes(content[:size])
    assert "model.safetensors: missing, damaged or incomplete" in refused(folder, model.config)
