"""Files of weights as others write them, and what becomes of them."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sophia_levanter.errors import InputError
from sophia_levanter.interop.pretrained import read_pretrained

VOCAB = 128  # of its own padded size, since padding is not in the files


def hf_config(config, **changes):
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.embed_dim,
        "n_inner": None,
        "n_positions": config.seq_len,
        "vocab_size": VOCAB,
        "layer_norm_epsilon": 1e-05,
    } | changes


def nanogpt_args(config, **changes):
    return {
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.embed_dim,
        "block_size": config.seq_len,
        "bias": config.use_bias,
        "vocab_size": VOCAB,
        "dropout": 0.0,
    } | changes


def save_folder(folder, config, arrays, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config, **changes)))
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    return folder


def read(path, config, dtype="float32", vocab_size=VOCAB, lines=None, fingerprint="of words"):
    return read_pretrained(
        str(path),
        config,
        SimpleNamespace(name="words", fingerprint=fingerprint, vocab_size=vocab_size),
        dtype=dtype,
        report=(lines if lines is not None else []).append,
    )


def refused(path, config, **options):
    with pytest.raises(InputError) as caught:
        read(path, config, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert isinstance(a, np.ndarray)
        np.testing.assert_array_equal(a, np.asarray(b))
