"""One token at a time gives what the whole context gives."""

from functools import partial

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis

from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.model import LlamaConfig
from sophia_levanter.partition.mesh import partition_of

ROWS, LENGTH = 4, 8
Batch = Axis("batch", ROWS)
TOKENS = np.random.default_rng(1).integers(0, 100, (ROWS, LENGTH)).astype(np.int32)
READ_AT_ONCE = (0, 3, 7, 0)  # tokens of each row
LIKE_GPT2 = {"use_bias": True, "scale_attn_by_inverse_layer_idx": False}
LIKE_LLAMA = {"config_class": LlamaConfig, "num_heads": 4, "num_kv_heads": 2, "qk_norm": True}
LIKE_THE_AUTHORS = {"use_bias": False, "scale_attn_by_inverse_layer_idx": True}
GROWN = {"parametrization": "mup", "base_embed_dim": 4, "base_head_size": 1, "base_num_layers": 1}


def whole(model):
    """Logits of all positions by the model's forward pass, [row, position, vocab]."""
    return np.asarray(jax.jit(type(model).__call__)(model, hax.named(TOKENS, ("batch", "position"))).array)


def decoded(model):
    """The positions of each row that were decoded, and their logits, [step, row] and [step, row, vocab].

    Rows begin at different positions, and a row that is done decodes its last token again.
    """
    kind = type(model)
    cache = jax.jit(partial(kind.empty_cache, Batch=Batch))(model)
    fill = jax.jit(kind.prefill)
    for row, length in enumerate(READ_AT_ONCE):
        if length:
            # What lies behind is to be replaced, or not looked at.
            tokens = np.where(np.arange(LENGTH) < length, TOKENS[row], 99 - TOKENS[row])
            cache = fill(model, cache, row, hax.named(tokens, "position"))
    step = jax.jit(kind.decode_step, donate_argnums=1)
    found, at = [], []
    for n in range(LENGTH):
        positions = np.minimum(np.array(READ_AT_ONCE) + n, LENGTH - 1)
        tokens = TOKENS[np.arange(ROWS), positions]
        logits, cache = step(model, cache, hax.named(tokens, Batch), hax.named(positions, Batch))
        assert logits.array.dtype == np.float32
        found.append(np.asarray(logits.rearrange(("batch", "vocab")).array))
        at.append(positions)
    return np.array(at), np.array(found)


def expected(model, at):
    return whole(model)[np.arange(ROWS), at]


@pytest.mark.parametrize("changes", [LIKE_THE_AUTHORS, LIKE_LLAMA | GROWN], ids=["authors", "mup"])
def test_logits_are_those_of_the_whole_context(make_model, changes):
    model = make_model(**changes)
    at, logits = decoded(model)
    np.testing.assert_allclose(logits, expected(model, at), rtol=0, atol=1e-5)
    assert np.abs(logits).max() > 0.5


def test_bfloat16(make_model):
    exact = make_model(**LIKE_THE_AUTHORS)
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    at, logits = decoded(model)
    full = expected(model, at).astype(np.float32)
    away = np.abs(full - expected(exact, at)).max()
    assert 1e-3 < away < 0.2
    # They are not rounded to bfloat16, as those of the whole context are: by 1 in 256 at most.
    assert np.abs(logits - full).max() <= away + np.abs(full).max() / 256
    assert (logits != logits.astype(jnp.bfloat16)).any()


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        (LIKE_GPT2, MeshConfig(data=2, sequence=4, fsdp="mlp")),
        (LIKE_LLAMA, MeshConfig(data=4, model=2, fsdp="embed")),
    ],
    ids=["gpt2, fsdp and sequence", "llama, fsdp and tensor"],
)
def test_a_model_split_over_devices(make_model, changes, mesh):
    model = make_model(**changes)
    partition = partition_of(mesh)
    split = partition.place(model)
    assert not jax.tree.leaves(split.blocks.stacked.mlp)[0].sharding.is_fully_replicated
    with partition.active():
        at, logits = decoded(split)
        cache = jax.jit(partial(type(split).empty_cache, Batch=Batch))(split)
    assert len({str(shard.index) for shard in cache.keys.array.addressable_shards}) == 8
    np.testing.assert_allclose(logits, expected(model, at), rtol=0, atol=1e-5)


def test_a_row_begun_anew_leaves_the_others_alone(make_model):
    model = make_model()
    kind = type(model)
    old = jax.tree.map(jnp.ones_like, jax.jit(partial(kind.empty_cache, Batch=Batch))(model))
    new = jax.jit(kind.prefill)(model, old, 2, hax.named(TOKENS[0, :5], "position"))
    for x in (new.keys, new.values):
        x = x.rearrange(("batch", "position", ...)).array
        assert (np.asarray(x)[[0, 1, 3]] == 1).all() and (x[2, 5:] == 1).all()
        assert (x[2, :5] != 1).all()
