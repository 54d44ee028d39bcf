import math
from functools import partial

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import Golden, named
from jax.extend.core import jaxprs_in_params

from sophia_levanter.batch import Batch, batch_from_sequences
from sophia_levanter.models.gpt2 import Gpt2, Gpt2Config
from sophia_levanter.models.huggingface import gpt2_from_state_dict, gpt2_to_state_dict
from sophia_levanter.models.language_model import decay_mask, matrix_axes
from sophia_levanter.optim._categorical import sample_categorical
from sophia_levanter.optim._matrices import matrices_tree
from sophia_levanter.optim._trees import decay_mask_tree, trainable

logits_of = eqx.filter_jit(lambda model, tokens: model(tokens).array)


@eqx.filter_jit
def loss_logits_and_grads(model, batch):
    function = eqx.filter_value_and_grad(lambda m: (m.losses(batch)[0], m(batch.tokens).array), has_aux=True)
    (loss, logits), grads = function(model)
    return loss, logits, grads


@eqx.filter_jit
def both_losses_and_grads(model, batch, samples):
    """The true and the sampled labels' loss, each with its gradients."""
    (first, second), pull = eqx.filter_vjp(lambda m: m.losses(batch, samples=samples), model)
    one, zero = jnp.ones_like(first), jnp.zeros_like(first)
    return (first, *pull((one, zero))), (second, *pull((zero, one)))


def assert_close(tree, other, **tolerance):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **tolerance)


@pytest.fixture
def batch() -> Batch:
    """Two windows of eight positions; some targets are left out."""
    rng = np.random.default_rng(0)
    weights = rng.choice([0, 1, 1, 2], (2, 8)).astype(np.float32)
    batch = batch_from_sequences(rng.integers(0, 100, (2, 9)).astype(np.int32), weights)
    return jax.tree.map(lambda x: x["microbatch", 0], batch, is_leaf=lambda x: hasattr(x, "axes"))


UNIFORMS = named(np.linspace(0, 1 - 2**-24, 16, dtype=np.float32).reshape(2, 8))


def bfloat16(model):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model)


def set_weights(model, **arrays):
    """The model with arrays put in by path, as `blocks__stacked__ln_1__weight`."""

    def at(path, tree):
        for name in path.split("__"):
            tree = getattr(tree, name)
        return tree.array

    return eqx.tree_at(lambda m: [at(path, m) for path in arrays], model, list(arrays.values()))


@pytest.mark.parametrize("name", ["gpt2_forward", "gpt2_forward_scaled_attn"])
def test_loss_and_gradients_are_those_of_transformers(name, golden):
    """And the logits. In three blocks of positions; the last is not full."""
    transformers = Golden(golden(name))
    given = transformers.config
    config = Gpt2Config(
        num_layers=given["n_layer"],
        num_heads=given["n_head"],
        embed_dim=given["n_embd"],
        seq_len=given["n_positions"],
        use_bias=True,
        layer_norm_epsilon=given["layer_norm_epsilon"],
        scale_attn_by_inverse_layer_idx=given["scale_attn_by_inverse_layer_idx"],
        loss_block_size=16,
        gradient_checkpointing="none",
    )
    model = gpt2_from_state_dict(config, transformers.weights)
    loss, logits, grads = loss_logits_and_grads(model, transformers.batch)
    np.testing.assert_allclose(logits, transformers.arrays["logits"], rtol=0, atol=1e-5)
    assert not np.asarray(grads.wte.weight.array[101:]).any()
    transformers.check(loss, gpt2_to_state_dict(grads))


def test_more_positions_than_the_context(make_model):
    with pytest.raises(ValueError, match="position"):
        jax.eval_shape(make_model(), hax.named(jnp.zeros(9, jnp.int32), "position"))


def test_recomputing_and_unrolling_change_no_gradient(make_model, batch):
    kept = make_model()
    recomputed = make_model(gradient_checkpointing="full", scan_unroll=2)
    assert_close(loss_logits_and_grads(recomputed, batch), loss_logits_and_grads(kept, batch), atol=1e-4)
    names = [{eqn.primitive.name for eqn in equations(grad_jaxpr(model, batch))} for model in (kept, recomputed)]
    assert ["checkpoint" in found or "remat2" in found for found in names] == [False, True]


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def grad_jaxpr(model, batch, samples=None):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return jax.make_jaxpr(
        lambda params: both_losses_and_grads.__wrapped__(eqx.combine(params, static), batch, samples)
    )(params).jaxpr


@pytest.mark.parametrize("cast", [lambda model: model, bfloat16], ids=["float32", "bfloat16"])
def test_whole_logits_never_exist(make_model, batch, cast):
    def largest(block_size):
        model = cast(make_model(loss_block_size=block_size))
        jaxpr = grad_jaxpr(model, batch, samples=batch.weights)
        return max(math.prod(out.aval.shape) for eqn in equations(jaxpr) for out in eqn.outvars)

    whole = 2 * 8 * 128
    assert largest(8) >= whole
    # The largest is then the head or one block of logits.
    assert largest(2) == max(128 * 8, 2 * 2 * 128)


def test_sampled_labels_make_the_second_loss(make_model, batch):
    model = make_model()
    _, second = both_losses_and_grads(model, batch, UNIFORMS)
    labels = jax.jit(sample_categorical)(logits_of(model, batch.tokens), UNIFORMS.array)
    assert labels.min() == 0
    assert labels.max() == 99
    relabelled = Batch(batch.tokens, named(labels), named(np.sqrt(np.asarray(batch.weights.array))))
    first, _ = both_losses_and_grads(model, relabelled, UNIFORMS)
    assert_close(second, first, rtol=1e-5, atol=1e-5)


def test_padding_of_the_vocabulary_is_never_seen(make_model, batch):
    model = make_model()
    assert logits_of(model, batch.tokens).shape == (2, 8, 100)
    found = both_losses_and_grads(model, batch, UNIFORMS)
    for _, grads in found:
        rows = np.asarray(grads.wte.weight.array)
        assert not rows[100:].any()
        assert rows[:100].any(-1).sum() > 90
    # Were a padded row predicted or drawn, large weights in it would tell.
    padded = set_weights(model, wte__weight=model.wte.weight.array.at[100:].set(1e4))
    assert_close(both_losses_and_grads(padded, batch, UNIFORMS), found, rtol=0)


def test_bfloat16_is_close_to_float32(make_model, batch):
    logits = np.asarray(logits_of(make_model(), batch.tokens))
    half = np.asarray(logits_of(bfloat16(make_model()), batch.tokens), np.float32)
    assert np.abs(half - logits).max() < 0.05 * np.abs(logits).max()


def sizes(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model) if hasattr(leaf, "shape"))


def test_parameter_counts():
    layers, width, vocab, seq_len = 3, 48, 200, 40

    def count(**changes):
        config = Gpt2Config(num_layers=layers, num_heads=4, embed_dim=width, seq_len=seq_len, **changes)
        return sizes(eqx.filter_eval_shape(Gpt2.init, config, vocab_size=vocab, key=jax.random.key(0)))

    without = (256 + seq_len) * width + layers * (12 * width**2 + 2 * width) + width
    # c_attn 3, c_proj 1, c_fc 4, c_proj 1 widths, and one for each norm.
    assert count(use_bias=False) == without
    assert count(use_bias=True) == without + layers * (9 + 2) * width + width
    assert count(use_bias=False, mlp_ratio=2) == without - layers * 4 * width**2


def test_initial_weights():
    config = Gpt2Config(num_layers=2, num_heads=2, embed_dim=32, seq_len=8, use_bias=True, initializer_range=0.05)
    model = eqx.filter_jit(Gpt2.init)(config, vocab_size=100, key=jax.random.key(3))
    arrays = gpt2_to_state_dict(model)
    for name, array in arrays.items():
        if name.endswith("bias"):
            assert not array.any(), name
        elif ".ln_" in name:
            assert np.all(array == 1), name
        else:
            wanted = 0.05 / 2 if name.endswith("c_proj.weight") else 0.05
            # Of n draws the standard deviation has a relative error of 1 / sqrt(2 n).
            assert abs(array.std() / wanted - 1) < 5 / np.sqrt(2 * array.size), name
            assert abs(array.mean()) < 5 * wanted / np.sqrt(array.size), name
    for name in ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"):
        assert not np.array_equal(arrays[f"transformer.h.0.{name}"], arrays[f"transformer.h.1.{name}"])


def paths(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(key.name for key in path if hasattr(key, "name")): leaf for path, leaf in leaves}


def test_decay_mask_is_by_role(make_model):
    model = make_model(use_bias=True)
    mask = paths(decay_mask_tree(decay_mask(model), trainable(model)))
    assert set(mask) == set(paths(trainable(model)))
    matrices = ("wte", "wpe", "c_attn", "c_proj", "c_fc")
    decayed = {name for name in mask if name.endswith(".weight") and name.split(".")[-2] in matrices}
    assert {name for name, decays in mask.items() if decays} == decayed
    # A stacked norm and a stacked bias have two dimensions or more, as matrices do.
    assert model.blocks.stacked.ln_1.weight.array.ndim == 2
    assert sum(mask.values()) == 6


def test_matrix_axes_are_by_role(make_model):
    params = trainable(make_model(use_bias=True))
    found = {}

    def note(path, x, entry):
        name = ".".join(key.name for key in path if hasattr(key, "name")).removeprefix("blocks.stacked.")
        found[name] = entry and tuple(entry)

    jax.tree_util.tree_map_with_path(note, params, matrices_tree(matrix_axes, params))
    assert {name: axes for name, axes in found.items() if axes} == {
        # [layers, embed, qkv, heads, head_size]; the axes of neither side count the matrices
        "attn.c_attn.weight": ((1,), (3, 4)),
        # [layers, heads, head_size, embed]
        "attn.c_proj.weight": ((1, 2), (3,)),
        # [layers, embed, mlp] and [layers, mlp, embed]
        "mlp.c_fc.weight": ((1,), (2,)),
        "mlp.c_proj.weight": ((1,), (2,)),
    }
    assert {"wte.weight", "wpe.weight", "ln_1.weight", "ln_f.weight", "mlp.c_fc.bias"} < set(found)


RATE = 0.5
random_key = partial(jax.random.key, impl="unsafe_rbg")  # compiles in no time, as the default does not
hidden_of = eqx.filter_jit(lambda model, tokens, key: model.hidden(tokens, key=key).array)
block_of = eqx.filter_jit(lambda block, x, key: block(x, hax.named(0, ()), key).array)


def silent(model, attention=0.0, mlp=0.0):
    """A model whose attention and MLP put out a constant each."""
    attn, fc = model.blocks.stacked.attn.c_proj, model.blocks.stacked.mlp.c_proj
    return set_weights(
        model,
        blocks__stacked__attn__c_proj__weight=jnp.zeros_like(attn.weight.array),
        blocks__stacked__attn__c_proj__bias=jnp.full_like(attn.bias.array, attention),
        blocks__stacked__mlp__c_proj__weight=jnp.zeros_like(fc.weight.array),
        blocks__stacked__mlp__c_proj__bias=jnp.full_like(fc.bias.array, mlp),
    )


def first_layer(model):
    return jax.tree.map(lambda x: x["layers", 0], model.blocks.stacked, is_leaf=lambda x: isinstance(x, hax.NamedArray))


def test_no_key_means_no_dropout(make_model, batch):
    np.testing.assert_array_equal(
        logits_of(make_model(dropout=RATE), batch.tokens), logits_of(make_model(), batch.tokens)
    )


def test_dropout_of_embeddings(make_model, batch):
    model = silent(make_model(dropout=RATE, use_bias=True))
    one, again, other = (np.asarray(hidden_of(model, batch.tokens, random_key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.all(np.any(one != other, axis=(1, 2)))
    assert np.any(one != np.asarray(hidden_of(model, batch.tokens, None)))


def test_dropout_differs_from_layer_to_layer(make_model, batch):
    """Both layers add 1 to a stream of zeros, so that sums of 0, 1 and 2 are left if the layers drop apart."""
    model = silent(make_model(dropout=RATE, use_bias=True), mlp=1.0)
    zeros = {f"{name}__weight": jnp.zeros_like(getattr(model, name).weight.array) for name in ("wte", "wpe")}
    norm = {"ln_f__weight": jnp.ones(8), "ln_f__bias": jnp.zeros(8)}
    hidden = hidden_of(set_weights(model, **zeros, **norm), batch.tokens, random_key(0))
    assert max(len(np.unique(row.round(4))) for row in np.asarray(hidden).reshape(16, 8)) == 3


@pytest.mark.parametrize("outputs", [{"attention": 1.0}, {"mlp": 1.0}], ids=lambda x: next(iter(x)))
def test_dropout_of_a_blocks_outputs_keeps_the_mean(make_model, outputs):
    block = first_layer(silent(make_model(dropout=RATE, use_bias=True), **outputs))
    x = hax.zeros(hax.make_axes(batch=400, position=8, embed=8))
    added = np.asarray(block_of(block, x, random_key(0)))
    np.testing.assert_allclose(np.unique(added), [0, 1 / (1 - RATE)], rtol=1e-6)
    error = added.std() / np.sqrt(added.size)
    assert abs(added.mean() - 1) < 5 * error < 0.05


def test_dropout_of_attention_weights(make_model, monkeypatch):
    monkeypatch.setattr("sophia_levanter.models.gpt2.dropout", lambda config, x, key: x)  # of the block's outputs
    block = first_layer(make_model(dropout=RATE))
    result_of = eqx.filter_jit(lambda x, key: block(x, hax.named(0, ()), key).array)
    x = hax.named(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32), ("position", "embed"))
    dropped, whole = (np.asarray(result_of(x, key)) for key in (random_key(0), None))
    assert np.all(np.any(dropped != whole, axis=-1))
