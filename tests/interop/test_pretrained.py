"""Weights in files of others become the model that they are of; all else is one line."""

import dataclasses
import json
import os

import haliax as hax
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from weight_files import VOCAB, assert_same, read, refused, save_folder

from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.data.bpe import bytes_of_characters
from sophia_levanter.data.tokenizer import ByteTokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.interop.architectures import GPT2
from sophia_levanter.interop.pretrained import check_vocabulary
from sophia_levanter.interop.saved_weights import open_model
from sophia_levanter.interop.state_dict import gpt2_to_state_dict


@pytest.fixture
def model(make_model):
    return make_model(VOCAB, use_bias=True)


@pytest.fixture
def arrays(model):
    return gpt2_to_state_dict(model)


@pytest.fixture
def folder(model, arrays, tmp_path):
    return save_folder(tmp_path / "gpt2", model.config, arrays)


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


def test_an_equal_head_is_the_tied_one(folder, model, arrays):
    save_folder(folder, model.config, arrays | {"lm_head.weight": arrays["transformer.wte.weight"].copy()})
    assert_same(read(folder, model.config), model)


def test_another_head_is_refused(folder, model, arrays):
    save_folder(folder, model.config, arrays | {"lm_head.weight": arrays["transformer.wte.weight"] + 1})
    assert "gpt2: lm_head.weight differs from wte.weight" in refused(folder, model.config)


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
    assert "model-00002-of-00002.safetensors: is missing, damaged" in refused(folder, model.config)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "index.json: has no weight_map" in refused(folder, model.config)
    (folder / "model.safetensors.index.json").write_text("{")
    assert "index.json: is no JSON" in refused(folder, model.config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("saved", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_dtypes(saved, dtype, folder, model, arrays):
    save_folder(folder, model.config, {name: array.astype(saved) for name, array in arrays.items()})
    found = gpt2_to_state_dict(read(folder, model.config, dtype))
    for name, array in arrays.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], array.astype(saved).astype(dtype), err_msg=name)


def test_integers_are_no_weights(folder, model, arrays):
    save_folder(folder, model.config, arrays | {"transformer.ln_f.bias": np.zeros(8, np.int8)})
    assert "transformer.ln_f.bias is I8; it must be one of F16" in refused(folder, model.config)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_named(bad, folder, model, arrays):
    arrays = {name: array.copy() for name, array in arrays.items()}
    arrays["transformer.h.1.mlp.c_fc.bias"][3] = bad
    save_folder(folder, model.config, arrays)
    assert "h.1.mlp.c_fc.bias has numbers that are not finite in float32" in refused(folder, model.config)


def test_numbers_beyond_the_parameters_dtype_are_not_finite(folder, model, arrays):
    save_folder(folder, model.config, arrays | {"transformer.ln_f.bias": np.full(8, 1e300)})
    assert "ln_f.bias has numbers that are not finite in bfloat16" in refused(folder, model.config, dtype="bfloat16")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"n_head": 4}, "model.num_heads is 2, and FOLDER has 4; set --model.num_heads 4"),
        ({"n_inner": 16}, "set --model.mlp_ratio 2"),
        (
            {"n_inner": 12},
            "config.json: n_inner is 12; it must be a multiple of n_embd 8: model.mlp_ratio is an integer",
        ),
        ({"layer_norm_epsilon": 1e-6}, "set --model.layer_norm_epsilon 1e-06"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "model.scale_attn_by_inverse_layer_idx is false, and FOLDER has true; "
            "set --model.scale_attn_by_inverse_layer_idx true",
        ),
        ({"activation_function": "relu"}, "activation_function is 'relu'; this model computes gelu_new"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false"),
        ({"model_type": "opt"}, "config.json: model_type is 'opt'; gpt2, llama, qwen3 are read"),
        ({"n_layer": "2"}, "config.json: n_layer is '2'; it must be an integer above 0"),
        ({"n_embd": 0}, "config.json: n_embd is 0; it must be an integer above 0"),
        ({"n_head": True}, "config.json: n_head is true; it must be an integer"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None; it must be a number above 0"),
        ({"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx is 1; it must be true or false"),
        (
            {"n_layer": 1_000_000},
            "FOLDER: config.json does not describe the weights: n_layer is 1000000, and the weights have 2",
        ),
        (
            {"n_embd": 16, "n_positions": 4},
            "n_embd is 16, and the weights have 8; n_positions is 4, and the weights have 8",
        ),
        ({"vocab_size": 90}, "vocab_size is 90, and the weights have 128"),
    ],
)
def test_another_model_names_the_field_and_the_value(change, wanted, folder, model, arrays):
    save_folder(folder, model.config, arrays, **change)
    assert wanted.replace("FOLDER", str(folder)) in refused(folder, model.config)


@pytest.mark.parametrize(
    ("ours", "wanted"),
    [
        ({"num_layers": 12}, "model.num_layers is 12, and FOLDER has 2; set --model.num_layers 2"),
        (
            {"embed_dim": 16, "mlp_ratio": 1},
            "model.embed_dim is 16, and FOLDER has 8; set --model.embed_dim 8 --model.mlp_ratio 4",
        ),
        ({"seq_len": 16}, "model.seq_len is 16, and FOLDER has 8; set --model.seq_len 8"),
        ({"seq_len": 4}, "model.seq_len is 4, and FOLDER has 8; set --model.seq_len 8"),
    ],
)
def test_a_model_of_another_shape_than_the_weights(ours, wanted, folder, model):
    config = dataclasses.replace(model.config, **ours)
    assert wanted.replace("FOLDER", str(folder)) in refused(folder, config)


def test_what_config_json_leaves_out_has_transformers_defaults(folder, model):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert refused(folder, model.config).endswith(
        "n_layer is 12, and the weights have 2; vocab_size is 50257, and the weights have 128; n_embd is 768, and the "
        "weights have 8; n_positions is 1024, and the weights have 8; both must be of one model"
    )


def test_hugging_face_weights_need_biases(folder, model):
    config = dataclasses.replace(model.config, use_bias=False)
    assert "model.use_bias is false" in refused(folder, config)
    assert refused(folder, config).endswith("; set --model.use_bias true")


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
    assert "has biases that are not 0 (h.1.ln_2.bias); set --model.use_bias true" in refused(folder, model.config)


def test_an_export_tells_its_tokenizer(folder, model, arrays):
    own = {"tokenizer": "bytes", "tokenizer_fingerprint": "of bytes"}
    save_folder(folder, model.config, arrays, sophia_levanter=own)
    assert open_model(folder).tokenizer == "bytes"
    assert f"data.tokenizer words is not the one that {folder} was trained with; set --data.tokenizer bytes" in refused(
        folder, model.config
    )
    read(folder, model.config, fingerprint="of bytes")
    save_folder(folder, model.config, arrays, sophia_levanter={"tokenizer": "tokenizer.tiktoken"})
    assert open_model(folder).tokenizer == str(folder / "tokenizer.tiktoken")
    read(folder, model.config)


@pytest.mark.parametrize(
    "own",
    [3, {"tokenizer": 3}, {"tokenizer": "/etc/other.tiktoken"}, {"use_bias": "false"}, {"tokenizer_fingerprint": None}],
)
def test_an_export_that_somebody_has_edited(own, folder, model, arrays):
    save_folder(folder, model.config, arrays, sophia_levanter=own)
    assert "config.json: sophia_levanter is not what an export writes" in refused(folder, model.config)


def test_a_padded_vocabulary_loses_its_padding(make_model, tmp_path):
    model = make_model(VOCAB, use_bias=True)
    folder = save_folder(tmp_path / "gpt2", model.config, gpt2_to_state_dict(model))
    lines = []
    found = read(folder, model.config, vocab_size=100, lines=lines)
    assert found.vocab_size == 100
    wte = np.asarray(model.wte.weight.array)
    np.testing.assert_array_equal(found.wte.weight.array, np.where(np.arange(128)[:, None] < 100, wte, 0))
    assert lines == [
        "the embedding has 128 rows: 100 for the tokens of data.tokenizer words and padding, which is left out"
    ]
    assert f"data.tokenizer words has 129 tokens, and {folder} has 128 rows, 1 fewer; set --data" in refused(
        folder, model.config, vocab_size=129
    )


@pytest.mark.parametrize("rows", [129, 200, 255])
def test_rows_beyond_the_tokenizers_are_kept_and_never_predicted(rows, make_model, tmp_path):
    """An added padding token, or rows padded to another multiple than ours."""
    model = make_model(rows, use_bias=True)
    arrays = gpt2_to_state_dict(model)
    folder = save_folder(tmp_path / "gpt2", model.config, arrays, vocab_size=rows)
    lines = []
    found = read(folder, model.config, lines=lines)
    assert (found.vocab_size, found.config.vocab_rows) == (VOCAB, rows)
    assert lines == [
        f"the embedding has {rows} rows: 128 for the tokens of data.tokenizer words and {rows - 128} more, which are "
        "kept and never predicted"
    ]
    for name, array in gpt2_to_state_dict(found).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    tokens = hax.named(np.zeros(8, np.int32), "position")
    fewer = {"transformer.wte.weight": arrays["transformer.wte.weight"][:VOCAB]}
    plain = read(save_folder(tmp_path / "plain", model.config, arrays | fewer), model.config)
    logits = [jax.tree.map(jax.numpy.asarray, one)(tokens).array for one in (found, plain)]
    assert logits[0].shape == (8, VOCAB)
    np.testing.assert_array_equal(*logits)
    assert_same(read(folder, found.config), found)
    other = dataclasses.replace(model.config, vocab_rows=300)
    assert refused(folder, other).endswith(
        f"model.vocab_rows is 300, and {folder} has {rows}; set --model.vocab_rows {rows}"
    )


@pytest.mark.parametrize(
    ("rows", "tokens", "wanted"),
    [
        (
            300,
            128,
            "set --data.tokenizer to the one that it was trained with, or --model.vocab_rows 300 to keep 172 rows",
        ),
        (50257, 257, "set --data.tokenizer gpt2, or --model.vocab_rows 50257"),
        (50304, 257, "set --data.tokenizer gpt2, or"),
        (50281, 50257, "set --data.tokenizer p50k_base, or"),
        (50257, 50281, "has 50281 tokens, and FOLDER has 50257 rows, 24 fewer; set --data.tokenizer gpt2"),
    ],
)
def test_rows_that_may_be_another_tokenizers(rows, tokens, wanted, make_model, tmp_path):
    model = make_model(VOCAB, use_bias=True)
    arrays = gpt2_to_state_dict(model) | {"transformer.wte.weight": np.zeros((rows, 8), np.float16)}
    folder = save_folder(tmp_path / "gpt2", model.config, arrays, vocab_size=rows)
    assert wanted.replace("FOLDER", str(folder)) in refused(folder, model.config, vocab_size=tokens)
    if rows > tokens:
        said = dataclasses.replace(model.config, vocab_rows=rows)
        assert read(folder, said, vocab_size=tokens).config == said


def characters(token):
    """A token as vocab.json writes it."""
    byte_of = {byte: character for character, byte in bytes_of_characters().items()}
    return "".join(byte_of[byte] for byte in token)


@pytest.fixture
def vocab():
    """That of bytes, which is the tokenizer's, with an added token."""
    return {characters(bytes([byte])): byte for byte in range(256)} | {"<|endoftext|>": 256, "<pad>": 257}


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_folder_with_the_vocabulary_of_the_tokenizer(name, vocab, tmp_path):
    (tmp_path / name).write_text(json.dumps(vocab if name == "vocab.json" else {"model": {"vocab": vocab}}))
    check_vocabulary(str(tmp_path), ByteTokenizer())


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (
            {"a": 98, "b": 97},
            "token 97 is 'b', and b'a' in data.tokenizer bytes; name the tokenizer that the model was",
        ),
        ({"<s>": 0}, "token 0 is '<s>'"),
        ({"\N{GREEK SMALL LETTER ALPHA}": 255}, "token 255 is "),
        ({"\x1b[2J" * 99: 3}, r"…x1b[2J" + r"\x1b[2J" * 6 + "', and b'"),
        ({"a": "x"}, "has no vocabulary from tokens to ids"),
    ],
)
def test_a_folder_with_the_vocabulary_of_another_tokenizer(change, wanted, vocab, tmp_path):
    vocab = {text: token for text, token in vocab.items() if token not in change.values()} | change
    for name, content in (("tokenizer.json", {"model": {"vocab": vocab}}), ("vocab.json", vocab)):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"{name}: ") as caught:
            check_vocabulary(str(tmp_path), ByteTokenizer())
        assert wanted in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_tokenizer_file_of_another_kind(tmp_path):
    for content, wanted in (
        ({"model": []}, "has no vocabulary"),
        ({"model": {"vocab": [["a", -1]]}}, "has no"),
        (3, "is no"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"tokenizer.json: {wanted}"):
            check_vocabulary(str(tmp_path), ByteTokenizer())
    check_vocabulary(str(tmp_path / "ckpt.pt"), ByteTokenizer())


WRAPPED = [
    "",
    "transformer.",
    "model.",
    "module.",
    "_orig_mod.",
    "_orig_mod.module.",
    "module._orig_mod.transformer.",
    "model.transformer.",
    "_orig_mod.model.transformer.",
]


@pytest.mark.parametrize("prefix", WRAPPED)
def test_wrapped_names(prefix, model, arrays, tmp_path):
    wrapped = {prefix + name.removeprefix("transformer."): array for name, array in arrays.items()}
    wrapped[f"{prefix}h.1.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), bool))
    wrapped[f"{prefix}h.0.attn.masked_bias"] = np.full((), -1e4, np.float32)
    assert_same(read(save_folder(tmp_path / "gpt2", model.config, wrapped), model.config), model)


def test_blocks_that_were_compiled_or_wrapped_one_by_one(model, arrays, tmp_path):
    wrapped = {
        name.replace("h.0.", "h.0._orig_mod.").replace("h.1.", "h.1._checkpoint_wrapped_module."): array
        for name, array in arrays.items()
    }
    assert_same(read(save_folder(tmp_path / "gpt2", model.config, wrapped), model.config), model)


@pytest.mark.parametrize("head", ["lm_head.weight", "_orig_mod.lm_head.weight", "module.lm_head.weight"])
def test_a_tied_head_alone_is_the_embedding(head, model, arrays, tmp_path):
    tied = {name: array for name, array in arrays.items() if not name.endswith("wte.weight")}
    tied[head] = arrays["transformer.wte.weight"]
    assert_same(read(save_folder(tmp_path / "gpt2", model.config, tied), model.config), model)


@pytest.mark.parametrize(
    "twice", ["wte.weight", "transformer.h.0._orig_mod.ln_1.bias", "module.transformer.wpe.weight"]
)
def test_an_array_that_is_there_twice_is_ambiguous(twice, folder, model, arrays):
    plain = twice.removeprefix("module.").replace("_orig_mod.", "").removeprefix("transformer.")
    save_folder(folder, model.config, arrays | {twice: arrays[f"transformer.{plain}"]})
    message = refused(folder, model.config)
    assert f"are both {plain}; remove one of them" in message
    assert twice in message and f"transformer.{plain}" in message


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
    assert "h.0.attn.c_attn.weight has shape (24, 8), this model wants (8, 24); " in message
    assert " too; these matrices are transposed" in message
    assert message.endswith("torch.nn.Linear has [out, in], transformers' Conv1D [in, out]")


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


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors", "a\0b"])
def test_an_index_names_files_of_its_folder_only(name, folder, model, arrays):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, name)}))
    message = refused(folder, model.config)
    assert message.isprintable() and f"{index}: names {name!r}, which is not a file in its folder" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_pipes_and_devices_are_not_read(name, folder, model):
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "first.safetensors"}}')
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert refused(folder, model.config) == f"{folder / name}: it is not a regular file"
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert refused(folder, model.config) == f"{folder / name}: it is not a regular file"
    for path in ("/dev/zero", folder / name):
        assert refused(path, model.config).startswith(f"{path}: it is not a regular file; name a folder saved by ")


def test_shards_that_are_pipes(folder, model):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "first.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "first.safetensors"}}')
    assert refused(folder, model.config) == f"{folder}/first.safetensors: it is not a regular file"
    (folder / "first.safetensors").unlink()
    assert "first.safetensors: is missing, damaged or not whole" in refused(folder, model.config)


def test_shards_that_both_have_an_array(folder, model, arrays):
    save_file({"transformer.wte.weight": arrays["transformer.wte.weight"]}, folder / "more.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    index["weight_map"]["a"] = "first.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "transformer.wte.weight is in first.safetensors too" in refused(folder, model.config)


def test_arrays_that_are_not_those_of_config_json(folder, model, arrays):
    fewer = {name: array for name, array in arrays.items() if not name.endswith("h.1.ln_1.bias")}
    save_folder(folder, model.config, fewer)
    assert f"{folder}: h.1.ln_1.bias is missing" in refused(folder, model.config)
    save_folder(folder, model.config, arrays | {"transformer.wte.weight": np.ones((100, 8))})
    assert "vocab_size is 128, and the weights have 100" in refused(folder, model.config)
    save_folder(folder, model.config, {"other": np.ones(2, np.float32)})
    assert "wte.weight is missing: this is not a GPT-2 state dict" in refused(folder, model.config)
    save_folder(folder, model.config, arrays | {"transformer.h.0.crossattention.c_attn.weight": np.ones(2)})
    assert "h.0.crossattention.c_attn.weight is not in this model" in refused(folder, model.config)


def test_no_such_file(model, tmp_path):
    assert "nowhere: there is no such file; name a folder" in refused(tmp_path / "nowhere", model.config)
    assert "no file name can hold one of its characters; name a folder" in refused("a\0b", model.config)


def test_a_folder_of_something_else(folder, model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json is missing; name a folder saved by" in refused(tmp_path / "empty", model.config)
    (tmp_path / "empty" / "ckpt.pt").touch()
    assert refused(tmp_path / "empty", model.config).endswith(f"name {tmp_path}/empty/ckpt.pt")
    assert f"name the folder, {folder}," in refused(folder / "model.safetensors", model.config)
    (folder / "model.safetensors").unlink()
    assert "there is neither model.safetensors nor" in refused(folder, model.config)
    (folder / "pytorch_model.bin").touch()
    assert "there is pytorch_model.bin and no model.safetensors, and pickles are not read" in refused(
        folder, model.config
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(b"{", "is no JSON"), (b"\xff", "is no JSON"), (b"[" * 100_000, "is no JSON"), (b"3", "is no JSON object")],
)
def test_a_config_that_is_no_json(text, wanted, folder, model):
    (folder / "config.json").write_bytes(text)
    assert f"config.json: {wanted}" in refused(folder, model.config)


@pytest.mark.parametrize("size", [0, 20, 4000, -1])
def test_a_truncated_file(size, folder, model):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    assert len(content) > 4000
    file.write_bytes(content[:size])
    assert "model.safetensors: is missing, damaged or not whole" in refused(folder, model.config)


def test_transformers_own_model_gives_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from haliax import NamedArray

    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=3, n_head=4, n_embd=48, n_positions=40, vocab_size=101, initializer_range=0.2)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    theirs.eval().save_pretrained(tmp_path / "gpt2")
    config = Gpt2Config(num_layers=3, num_heads=4, embed_dim=48, seq_len=40, use_bias=True)
    ours = jax.tree.map(jax.numpy.asarray, read(tmp_path / "gpt2", config, vocab_size=101))
    tokens = np.random.default_rng(0).integers(0, 101, (2, 40)).astype(np.int32)
    found = ours(NamedArray(jax.numpy.asarray(tokens), (config.Pos.resize(2).alias("batch"), config.Pos))).array
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=1e-4)
