"""A model that is exported comes back the same; what cannot be written leaves nothing."""

import dataclasses
import json
import os

import equinox as eqx
import numpy as np
import pytest
from safetensors import safe_open

from sophia_levanter import __version__
from sophia_levanter.data.bpe import save_bpe, train_bpe
from sophia_levanter.errors import InputError
from sophia_levanter.interop.exporting import export_model
from sophia_levanter.interop.state_dict import gpt2_to_state_dict
from sophia_levanter.run.loading import LoadedModel, load_model

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def again(folder, *overrides):
    return load_model(str(folder), overrides=overrides, report=print)


def assert_same(found, wanted, dtype="float32"):
    found, wanted = gpt2_to_state_dict(found.model), gpt2_to_state_dict(wanted.model)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array.astype(dtype).astype(np.float32), err_msg=name)


@pytest.mark.parametrize("use_bias", [True, False])
def test_weights_come_back_bit_for_bit(use_bias, make_loaded, tmp_path):
    loaded = make_loaded(
        use_bias=use_bias, scale_attn_by_inverse_layer_idx=True, mlp_ratio=3, layer_norm_epsilon=1e-6, dropout=0.25
    )
    export_model(loaded, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert os.listdir(tmp_path) == ["out"]
    back = again(tmp_path / "out")
    assert_same(back, loaded)
    assert back.tokenizer.fingerprint == loaded.tokenizer.fingerprint
    shape = ("num_layers", "num_heads", "embed_dim", "seq_len", "mlp_ratio", "use_bias", "layer_norm_epsilon")
    for name in (*shape, "scale_attn_by_inverse_layer_idx"):
        assert getattr(back.config.model, name) == getattr(loaded.config.model, name), name


def test_what_config_json_says(make_loaded, tmp_path):
    loaded = make_loaded(dropout=0.25, mlp_ratio=3)
    export_model(loaded, tmp_path / "out")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values.pop("sophia_levanter") == {
        "version": __version__,
        "step": 7,
        "tokenizer": "bytes",
        "tokenizer_fingerprint": loaded.tokenizer.fingerprint,
        "use_bias": False,
    }
    assert values == {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.25,
        "embd_pdrop": 0.25,
        "resid_pdrop": 0.25,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_embd": 16,
        "n_head": 2,
        "n_inner": 48,
        "n_layer": 2,
        "n_positions": 32,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": 257,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert file.get_slice("transformer.wte.weight").get_shape() == [257, 16]
        assert not file.get_tensor("transformer.h.1.attn.c_attn.bias").any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smaller_dtypes(dtype, make_loaded, tmp_path):
    loaded = make_loaded(use_bias=True)
    export_model(loaded, tmp_path / "out", dtype)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        stored = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert stored == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}
    assert_same(again(tmp_path / "out"), loaded, dtype)


def test_parameters_keep_their_dtype(make_loaded, tmp_path):
    export_model(make_loaded(), tmp_path / "half", "bfloat16")
    half = again(tmp_path / "half", ("trainer.parameter_dtype", "bfloat16"))
    export_model(half, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "half/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_a_trained_tokenizer_goes_with_the_model(make_loaded, tmp_path):
    file = tmp_path / "words.tiktoken"
    save_bpe(file, train_bpe(["the other anthem " * 9], 270))
    loaded = make_loaded(str(file))
    export_model(loaded, tmp_path / "out")
    file.unlink()
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    back = again(moved)
    assert back.tokenizer.name == str(moved / "tokenizer.tiktoken")
    assert back.tokenizer.fingerprint == loaded.tokenizer.fingerprint
    assert str(tmp_path) not in (moved / "config.json").read_text()


def test_numbers_that_a_dtype_cannot_hold(make_loaded, tmp_path):
    loaded = make_loaded()
    large = eqx.tree_at(lambda loaded: loaded.ln_f.weight.array, loaded.model, replace_fn=lambda x: x + 1e5)
    loaded = LoadedModel(large, loaded.config, loaded.tokenizer, loaded.partition, loaded.source, loaded.step)
    with pytest.raises(
        InputError, match=r"--dtype float16 cannot represent transformer\.ln_f\.weight; use --dtype float32"
    ):
        export_model(loaded, tmp_path / "out", "float16")
    assert os.listdir(tmp_path) == []


def test_nothing_is_written_over(make_loaded, tmp_path):
    loaded = make_loaded()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for name, message in (("full", "full already contains files"), ("full/notes.txt", "notes.txt is a file")):
        with pytest.raises(InputError, match=message):
            export_model(loaded, tmp_path / name)
    with pytest.raises(InputError, match="cannot be created: Not a directory; choose another folder"):
        export_model(loaded, tmp_path / "full/notes.txt/out")
    assert os.listdir(tmp_path / "full") == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    export_model(loaded, tmp_path / "empty")
    export_model(loaded, tmp_path / "new/deep")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES
    assert os.listdir(tmp_path / "new") == ["deep"]


def test_a_write_that_fails_leaves_nothing(make_loaded, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sophia_levanter.interop.exporting.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        export_model(make_loaded(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_numbers_that_are_not_finite_are_refused(make_loaded, tmp_path):
    loaded = make_loaded()
    broken = eqx.tree_at(lambda m: m.wpe.weight.array, loaded.model, loaded.model.wpe.weight.array.at[0, 0].set(np.nan))
    with pytest.raises(InputError, match=r"wpe\.weight contains non-finite values"):
        export_model(dataclasses.replace(loaded, model=broken), tmp_path / "out")
    assert not os.listdir(tmp_path)
