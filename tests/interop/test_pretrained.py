"""Weights in files of others become the model that they are of; all else is one line."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from weight_files import VOCAB, assert_same, read, refused, save_folder

from sophia_levanter.interop.architectures import GPT2
from sophia_levanter.interop.saved_weights import open_model
from sophia_levanter.interop.state_dict import gpt2_to_state_dict


def test_a_folder_with_the_prefix(folder, model):
    lines = []
    assert_same(read(folder, model.config, lines=lines), model)
    assert lines == []


def test_official_names_without_the_prefix_and_with_masks(model, arrays, tmp_path):
    official = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    for i in range(2):
        official[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), bool))
        official[f"h.{i}.attn.masked_bias"] = np.full((), -np.inf, np.float32)
    assert_same(read(save_folder(tmp_path / "gpt2", model.config, official), model.config), model)


@pytest.mark.parametrize(
    ("saved", "dtype"), [(np.float16, "float32"), (ml_dtypes.bfloat16, "float32"), (np.float64, "bfloat16")]
)
def test_dtypes(saved, dtype, folder, model, arrays):
    save_folder(folder, model.config, {name: array.astype(saved) for name, array in arrays.items()})
    found = gpt2_to_state_dict(read(folder, model.config, dtype))
    for name, array in arrays.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], array.astype(saved).astype(dtype), err_msg=name)


def test_integers_are_no_weights(folder, model, arrays):
    save_folder(folder, model.config, arrays | {"transformer.ln_f.bias": np.zeros(8, np.int8)})
    assert "transformer.ln_f.bias is I8; it must be one of F16" in refused(folder, model.config)


def test_numbers_that_are_not_finite_are_named(folder, model, arrays):
    arrays = {name: array.copy() for name, array in arrays.items()}
    arrays["transformer.h.1.mlp.c_fc.bias"][3] = np.nan
    save_folder(folder, model.config, arrays)
    assert "h.1.mlp.c_fc.bias contains values that are not finite in float32" in refused(folder, model.config)


def test_numbers_beyond_the_parameters_dtype_are_not_finite(folder, model, arrays):
    save_folder(folder, model.config, arrays | {"transformer.ln_f.bias": np.full(8, 1e300)})
    assert "ln_f.bias contains values that are not finite in bfloat16" in refused(
        folder, model.config, dtype="bfloat16"
    )


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"n_head": 4}, "model.num_heads is 2, but FOLDER has 4; set --model.num_heads 4"),
        ({"n_inner": 16}, "set --model.mlp_ratio 2"),
        ({"n_inner": 12}, "config.json: n_inner is 12; it must be a multiple of n_embd (8)"),
        ({"layer_norm_epsilon": 1e-6}, "set --model.layer_norm_epsilon 1e-06"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "model.scale_attn_by_inverse_layer_idx is false, but FOLDER has true; "
            "set --model.scale_attn_by_inverse_layer_idx true",
        ),
        ({"activation_function": "relu"}, "activation_function is 'relu'; this model supports only gelu_new"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false"),
        ({"model_type": "opt"}, "config.json: model_type is 'opt'; it must be one of gpt2, llama, qwen3"),
        ({"n_layer": "2"}, "config.json: n_layer is '2'; it must be a positive integer"),
        ({"n_embd": 0}, "config.json: n_embd is 0; it must be a positive integer"),
        ({"n_head": True}, "config.json: n_head is true; it must be a positive integer"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None; it must be a positive number"),
        ({"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx is 1; it must be true or false"),
        (
            {"n_layer": 1_000_000},
            "FOLDER: config.json does not match the weights: n_layer is 1000000, but the weights have 2",
        ),
        (
            {"n_embd": 16, "n_positions": 4},
            "n_embd is 16, but the weights have 8; n_positions is 4, but the weights have 8",
        ),
    ],
)
def test_another_model_names_the_field_and_the_value(change, wanted, folder, model, arrays):
    save_folder(folder, model.config, arrays, **change)
    assert wanted.replace("FOLDER", str(folder)) in refused(folder, model.config)


@pytest.mark.parametrize(
    ("ours", "wanted"),
    [
        (
            {"embed_dim": 16, "mlp_ratio": 1},
            "model.embed_dim is 16, but FOLDER has 8; set --model.embed_dim 8 --model.mlp_ratio 4",
        ),
        ({"seq_len": 16}, "model.seq_len is 16, but FOLDER has 8; set --model.seq_len 8"),
    ],
)
def test_a_model_of_another_shape_than_the_weights(ours, wanted, folder, model):
    config = dataclasses.replace(model.config, **ours)
    assert wanted.replace("FOLDER", str(folder)) in refused(folder, config)


def test_what_config_json_leaves_out_has_transformers_defaults(folder, model):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert refused(folder, model.config).endswith(
        "n_layer is 12, but the weights have 2; vocab_size is 50257, but the weights have 128; n_embd is 768, but the "
        "weights have 8; n_positions is 1024, but the weights have 8; both must come from the same model"
    )


def test_biases_of_0_go_with_a_model_that_has_none(make_model, tmp_path):
    model = make_model(VOCAB, use_bias=False)
    folder = save_folder(tmp_path / "gpt2", model.config, GPT2.complete(gpt2_to_state_dict(model)))
    assert_same(read(folder, model.config), model)
    biased = gpt2_to_state_dict(read(folder, dataclasses.replace(model.config, use_bias=True)))
    assert not any(array.any() for name, array in biased.items() if name.endswith(".bias"))


def test_what_an_export_says_of_biases_holds_until_they_are_trained(make_model, tmp_path):
    model = make_model(VOCAB, use_bias=False)
    arrays = GPT2.complete(gpt2_to_state_dict(model))
    folder = save_folder(tmp_path / "gpt2", model.config, arrays, sophia_levanter={"use_bias": False})
    assert open_model(folder).fields["use_bias"] is False
    read(folder, dataclasses.replace(model.config, use_bias=True))
    arrays["transformer.h.1.ln_2.bias"] = np.ones(8, np.float32)
    save_folder(folder, model.config, arrays, sophia_levanter={"use_bias": False})
    assert open_model(folder).fields["use_bias"] is True
    assert "has nonzero biases (h.1.ln_2.bias); set --model.use_bias true" in refused(folder, model.config)


@pytest.mark.parametrize("own", [3, {"tokenizer": 3}, {"tokenizer": "/etc/other.tiktoken"}])
def test_an_export_that_somebody_has_edited(own, folder, model, arrays):
    save_folder(folder, model.config, arrays, sophia_levanter=own)
    assert "config.json: the sophia_levanter field is invalid" in refused(folder, model.config)


def test_blocks_that_were_compiled_or_wrapped_one_by_one(model, arrays, tmp_path):
    wrapped = {
        name.replace("h.0.", "h.0._orig_mod.").replace("h.1.", "h.1._checkpoint_wrapped_module."): array
        for name, array in arrays.items()
    }
    assert_same(read(save_folder(tmp_path / "gpt2", model.config, wrapped), model.config), model)


def test_a_tied_head_alone_is_the_embedding(model, arrays, tmp_path):
    tied = {name: array for name, array in arrays.items() if not name.endswith("wte.weight")}
    tied["_orig_mod.lm_head.weight"] = arrays["transformer.wte.weight"]
    assert_same(read(save_folder(tmp_path / "gpt2", model.config, tied), model.config), model)


def test_an_array_that_is_there_twice_is_ambiguous(folder, model, arrays):
    plain, twice = "transformer.h.0.ln_1.bias", "transformer.h.0._orig_mod.ln_1.bias"
    save_folder(folder, model.config, arrays | {twice: arrays[plain]})
    message = refused(folder, model.config)
    assert "both refer to h.0.ln_1.bias; remove one of them" in message
    assert twice in message and plain in message


def test_all_that_is_missing_and_unknown_is_counted(folder, model, arrays):
    others = {name.replace("h.1.", "h.1.other."): array for name, array in arrays.items()}
    save_folder(folder, model.config, others | {"score.weight": np.ones(2, np.float32)})
    message = refused(folder, model.config)
    assert (
        "h.1.ln_1.weight, h.1.ln_1.bias, h.1.attn.c_attn.weight, h.1.attn.c_attn.bias and 8 more are missing" in message
    )
    assert ", h.1.other." in message and " and 9 more are not in this model" in message


def test_matrices_in_the_other_layout(folder, model, arrays):
    save_folder(folder, model.config, gpt2_to_state_dict(model, layout="linear"))
    message = refused(folder, model.config)
    assert "h.0.attn.c_attn.weight has shape (24, 8), but this model expects (8, 24); " in message
    assert "; also wrong: " in message and "; these matrices are transposed" in message
    assert message.endswith("torch.nn.Linear has [out, in], transformers' Conv1D has [in, out]")


def test_names_cannot_write_to_the_terminal(folder, model, arrays):
    odd = {"\x1b[31mred\x07.weight": np.ones(2, np.float32), "x" * 5000: np.ones(2, np.float32)}
    save_folder(folder, model.config, arrays | odd)
    message = refused(folder, model.config)
    assert message.isprintable() and r"\x1b[31mred\x07.weight" in message
    assert "xxx…xxx" in message and len(message) < 600
    save_folder(folder, model.config, arrays | {"\x1b[2Jx": np.ones(2, np.int8)})
    assert r"\x1b[2Jx is I8" in refused(folder, model.config)
    save_folder(folder, model.config, arrays, n_head="\x1b[2J" * 1000)
    assert len(refused(folder, model.config)) < 400


def test_arrays_that_are_not_those_of_config_json(folder, model, arrays):
    fewer = {name: array for name, array in arrays.items() if not name.endswith("h.1.ln_1.bias")}
    save_folder(folder, model.config, fewer)
    assert f"{folder}: h.1.ln_1.bias is missing" in refused(folder, model.config)
    save_folder(folder, model.config, arrays | {"transformer.wte.weight": np.ones((100, 8))})
    assert "vocab_size is 128, but the weights have 100" in refused(folder, model.config)
    save_folder(folder, model.config, {"other": np.ones(2, np.float32)})
    assert "wte.weight is missing: this is not a GPT-2 state dict" in refused(folder, model.config)
