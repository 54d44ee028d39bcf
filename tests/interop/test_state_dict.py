import json

import jax
import numpy as np
import pytest

from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.interop.state_dict import gpt2_from_state_dict, gpt2_to_state_dict

MATRIX = "h.0.mlp.c_fc.weight"


def part(arrays, prefix):
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


@pytest.fixture
def linear(golden):
    """A configuration and arrays in torch.nn.Linear's layout, with biases or without."""

    def load(use_bias=False):
        arrays = golden("train_adamw" if use_bias else "train_adamw_scaled_attn_nobias")
        shape = json.loads(str(arrays["hyperparameters"]))
        config = Gpt2Config(
            num_layers=shape["n_layer"],
            num_heads=shape["n_head"],
            embed_dim=shape["n_embd"],
            seq_len=shape["block_size"],
            use_bias=use_bias,
        )
        return config, part(arrays, "init/")

    return load


@pytest.fixture
def conv1d(golden):
    """The same in transformers' layout; the vocabulary of 101 is padded inside."""
    config = Gpt2Config(num_layers=3, num_heads=4, embed_dim=48, seq_len=40, use_bias=True)
    return config, part(golden("gpt2_forward"), "weight/")


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_round_trip(linear, use_bias):
    config, arrays = linear(use_bias)
    model = gpt2_from_state_dict(config, arrays, layout="linear")
    assert model.vocab_size == 128
    assert_same(gpt2_to_state_dict(model, layout="linear"), arrays)
    matrices = {name for name in arrays if ".h." in name and arrays[name].ndim == 2}
    assert len(matrices) == 8
    transposed = {name: a.T if name in matrices else a for name, a in arrays.items()}
    assert_same(gpt2_to_state_dict(model), transposed)
    again = gpt2_from_state_dict(config, transposed)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True))


def test_conv1d_round_trip(conv1d):
    config, arrays = conv1d
    model = gpt2_from_state_dict(config, arrays)
    assert (model.vocab_size, model.wte.weight.axis_size("vocab")) == (101, 128)
    assert not np.asarray(model.wte.weight.array[101:]).any()
    assert_same(gpt2_to_state_dict(model), arrays)


def test_names_without_the_prefix_and_arrays_to_ignore(linear):
    config, arrays = linear()
    other = {name.removeprefix("transformer."): a for name, a in arrays.items()}
    other["lm_head.weight"] = other["wte.weight"]
    other["h.0.attn.bias"] = np.tril(np.ones((1, 1, 32, 32)))
    other["h.1.attn.masked_bias"] = np.asarray(-1e4)
    assert_same(gpt2_to_state_dict(gpt2_from_state_dict(config, other, layout="linear"), layout="linear"), arrays)


def test_names_of_wrappers_and_a_tied_head_alone(linear):
    config, arrays = linear()
    prefix = "module._orig_mod.model.transformer."
    other = {prefix + name.removeprefix("transformer."): a for name, a in arrays.items()}
    other[f"{prefix}lm_head.weight"] = other.pop(f"{prefix}wte.weight")
    assert_same(gpt2_to_state_dict(gpt2_from_state_dict(config, other, layout="linear"), layout="linear"), arrays)


def test_a_head_that_is_not_tied_or_an_array_twice(linear):
    config, arrays = linear()
    for head in (arrays["transformer.wte.weight"] + 1, arrays["transformer.wte.weight"][:3]):
        with pytest.raises(
            ValueError, match=r"^lm_head\.weight differs from wte\.weight.*: the output head is not tied"
        ):
            gpt2_from_state_dict(config, arrays | {"lm_head.weight": head}, layout="linear")
    for name in ("wte.weight", "_orig_mod.transformer.wte.weight"):
        with pytest.raises(ValueError, match=r"^transformer\.wte\.weight and .* both refer to wte\.weight; remove one"):
            gpt2_from_state_dict(config, arrays | {name: arrays["transformer.wte.weight"]}, layout="linear")


def without(arrays, name):
    return {n: a for n, a in arrays.items() if n != f"transformer.{name}"}


def with_array(arrays, name, array):
    return arrays | {f"transformer.{name}": array}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: without(a, "wte.weight"), r"^wte\.weight is missing: this is not a GPT-2 state dict"),
        (lambda a: with_array(a, "wte.weight", np.ones(())), r"^wte\.weight has shape \(\), but this model expects"),
        (lambda a: with_array(a, "wpe.weight", np.ones((64, 32))), r"^wpe\.weight has shape \(64, 32\), .* \(32, 32\)"),
        (lambda a: without(a, MATRIX), r"^h\.0\.mlp\.c_fc\.weight is missing"),
        (lambda a: with_array(a, "h.2.ln_1.weight", np.ones(32)), r"^h\.2\.ln_1\.weight is not in this model"),
        (
            lambda a: with_array(a, MATRIX, a[f"transformer.{MATRIX}"].T),
            r"^h\.0\.mlp\.c_fc\.weight has shape \(32, 128\)",
        ),
        (lambda a: with_array(a, "ln_f.weight", np.ones((32, 1))), r"^ln_f\.weight has shape \(32, 1\), .* \(32,\)"),
    ],
)
def test_errors_name_the_array(linear, change, message):
    config, arrays = linear()
    with pytest.raises(ValueError, match=message):
        gpt2_from_state_dict(config, change(arrays), layout="linear")


def test_unknown_layout(linear):
    config, arrays = linear()
    message = "layout is 'rows'; it must be one of conv1d, linear"
    with pytest.raises(ValueError, match=message):
        gpt2_from_state_dict(config, arrays, layout="rows")
    with pytest.raises(ValueError, match=message):
        gpt2_to_state_dict(gpt2_from_state_dict(config, arrays, layout="linear"), layout="rows")
