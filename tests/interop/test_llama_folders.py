"""Folders of Llama and Qwen3 as transformers saves them, without transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from weight_files import VOCAB, assert_same, read, refused

from sophia_levanter.config.model import Gpt2Config, LlamaConfig
from sophia_levanter.interop.architectures import Description, LlamaArchitecture
from sophia_levanter.interop.state_dict import to_state_dict


@pytest.fixture
def model(make_model):
    return make_model(VOCAB, config_class=LlamaConfig, num_kv_heads=1)


@pytest.fixture
def save(model, tmp_path):
    def save(arrays=None, **changes):
        values = LlamaArchitecture().describe(model.config) | {"vocab_size": VOCAB} | changes
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
        arrays = to_state_dict(model) if arrays is None else arrays
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, tmp_path / "model.safetensors")
        return tmp_path

    return save


def test_a_folder(model, save):
    lines = []
    assert_same(read(save(), model.config, lines=lines), model)
    assert lines == []


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": "absent", "rope_scaling": None},  # transformers 4
        {"rope_theta": "absent"},  # transformers 5
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 5e5, "rope_parameters": "absent"},
        {"attention_bias": "absent", "hidden_act": "absent", "mlp_bias": False, "use_sliding_window": False},
    ],
)
def test_the_same_model_written_in_other_ways(changes, model, save):
    assert_same(read(save(**changes), model.config), model)


def test_what_qwen3_leaves_out():
    def fields(**values):
        given = {"model_type": "qwen3", "num_attention_heads": 16, "hidden_size": 64} | values
        return LlamaArchitecture().fields(Description(Path("config.json"), given))

    assert (fields()["num_kv_heads"], fields()["head_size"]) == (32, 128)
    found = fields(num_key_value_heads=None, head_dim=None)
    assert (found["num_kv_heads"], found["head_size"]) == (16, 4)


def test_buffers_and_prefixes(model, save):
    arrays = {f"module.{name}": array for name, array in to_state_dict(model).items()}
    arrays |= {"module.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    assert_same(read(save(arrays), model.config), model)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling is {'rope_type': 'llama3', 'factor': 8.0}; this model does not support RoPE scaling",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "this model does not support RoPE scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "this model does not support RoPE scaling"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": -1}},
            "rope_theta is -1.0; it must be a positive number",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "this model uses the same rotary embeddings in all layers",
        ),
        (
            {"attention_bias": True},
            "attention_bias is true; this model does not support it; use weights trained without it",
        ),
        ({"mlp_bias": True}, "mlp_bias is true; this model does not support it"),
        ({"use_sliding_window": True}, "use_sliding_window is true; this model does not support it"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model supports only silu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; this model supports only 1.0"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; it must be one of gpt2, llama, qwen3"),
        ({"num_hidden_layers": 9}, "num_hidden_layers is 9, but the weights have 2"),
        ({"num_key_value_heads": 2}, "model.num_kv_heads is 1, but FOLDER has 2; set --model.num_kv_heads 2"),
        ({"rope_theta": "absent", "rope_parameters": {"rope_theta": 5e5}}, "set --model.rope_theta 500000.0"),
        ({"rms_norm_eps": 1e-6}, "set --model.layer_norm_epsilon 1e-06"),
        ({"tie_word_embeddings": True}, "set --model.tie_embeddings true"),
        ({"model_type": "qwen3"}, "set --model.qk_norm true"),
    ],
)
def test_what_the_model_does_not_have_is_named(changes, wanted, model, save):
    folder = save(**changes)
    assert wanted.replace("FOLDER", str(folder)) in refused(folder, model.config)


def test_another_type_of_model(model, save):
    folder = save()
    assert (
        refused(folder, Gpt2Config())
        == f"{folder}: contains a Llama model, but model.type is gpt2; set --model.type llama"
    )


def test_weights_that_are_missing_or_unknown(model, save):
    arrays = to_state_dict(model)
    without = {name: array for name, array in arrays.items() if name != "lm_head.weight"}
    assert "lm_head.weight is missing" in refused(save(without), model.config)
    biased = arrays | {"model.layers.1.self_attn.q_proj.bias": np.zeros(8, np.float32)}
    assert "layers.1.self_attn.q_proj.bias is not in this model" in refused(save(biased), model.config)


def test_a_longer_context_than_the_weights_were_trained_with(model, save, make_model):
    longer = make_model(VOCAB, config_class=LlamaConfig, num_kv_heads=1, seq_len=16).config
    lines = []
    folder = save()
    read(folder, longer, lines=lines)
    assert lines == [f"model.seq_len 16 exceeds the 8 positions in {folder}"]
