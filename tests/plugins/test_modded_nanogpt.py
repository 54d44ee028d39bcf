"""The model of docs/evidence/speedrun against its formulas in float64, and the study in which it is trained."""

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis

from pages import ROOT
from sophia_levanter.batch import Batch
from sophia_levanter.config.assembly import check_optimizer
from sophia_levanter.config.transfer import matrix_sides
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import abstract_model, decay_mask, parameter_roles
from sophia_levanter.optim import ParameterGroup, groups_of
from sophia_levanter.optim._baselines import ADAMW_RMS
from sophia_levanter.optim._trees import decay_mask_tree, trainable
from sophia_levanter.studies.study import plan, read_study

STUDY = ROOT / "config/studies/gpt2_small_h100.yaml"
VOCAB, ROWS, LENGTH = 100, 2, 8
RNG = np.random.default_rng(0)
TOKENS, TARGETS = RNG.integers(0, VOCAB, (2, ROWS, LENGTH)).astype(np.int32)
WEIGHTS = RNG.choice([0, 0.25, 1, 3], (ROWS, LENGTH)).astype(np.float32)
UNIFORMS = RNG.random((ROWS, LENGTH), np.float32)
MATRICES = {"q", "k", "v", "attn_proj", "mlp_fc", "mlp_proj"}


def named(array):
    return hax.named(jnp.asarray(array), ("batch", "position"))


BATCH = Batch(named(TOKENS), named(TARGETS), named(WEIGHTS))


@pytest.fixture
def config_class(plugin_folder):
    from modded_nanogpt import ModdedNanogptConfig

    return ModdedNanogptConfig


@pytest.fixture
def model(config_class, make_model):
    """One with logits that reach the cap."""
    drawn = make_model(VOCAB, config_class, embed_dim=16)
    return eqx.tree_at(lambda m: m.proj.weight, drawn, drawn.proj.weight * 40.0)


def array(x, layer=...):
    return np.asarray(x.array, np.float64)[layer]


def unit(x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 2.0**-23)


def rotated(x):
    """[batch, position, heads, head_size], whose pairs are complex numbers."""
    half = x.shape[-1] // 2
    frequencies = np.append(1024.0 ** -np.linspace(0, 1, half // 2), np.zeros(half // 2))
    angles = np.arange(x.shape[1])[:, None, None] * frequencies
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(-1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def logits_by_hand(model):
    """[batch, position, vocab]."""
    x = unit(array(model.embedding.weight)[TOKENS]) * array(model.norm1.weight)
    stack = model.blocks.stacked
    for i in range(model.config.num_layers):
        y = unit(x) * array(stack.norm1.weight, i)
        q, k, v = (
            np.einsum("bte,ehd->bthd", y, array(layer.weight, i)) + array(layer.bias, i)
            for layer in (stack.q, stack.k, stack.v)
        )
        scores = np.exp(0.12 * np.einsum("bqhd,bkhd->bhqk", rotated(unit(q)), rotated(unit(k))))
        scores *= np.tril(np.ones((LENGTH, LENGTH)))
        attended = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v)
        x = x + np.einsum("bqhd,hde->bqe", attended, array(stack.attn_proj.weight, i)) + array(stack.attn_proj.bias, i)
        y = unit(x) * array(stack.norm2.weight, i)
        hidden = np.maximum(y @ array(stack.mlp_fc.weight, i) + array(stack.mlp_fc.bias, i), 0) ** 2
        x = x + hidden @ array(stack.mlp_proj.weight, i) + array(stack.mlp_proj.bias, i)
    z = (unit(x) * array(model.norm2.weight)) @ array(model.proj.weight).T + array(model.proj_bias)
    return (15 * z / np.sqrt(z**2 + 225))[..., :VOCAB]


def mixed(losses):
    return 0.7 * losses[0] - 1.3 * losses[1]


def loss_and_grads(model):
    """Of both losses, with labels drawn from uniforms."""
    loss = eqx.filter_value_and_grad(lambda m: mixed(m.losses(BATCH, samples=named(UNIFORMS))))
    return eqx.filter_jit(loss)(model)


def test_logits_and_losses(model):
    """Labels are drawn from the capped distribution, and the gradients are those of whole logits."""
    by_hand = logits_by_hand(model)
    assert 12 < np.abs(by_hand).max() < 15
    ends = np.cumsum(np.exp(by_hand), -1) / np.exp(by_hand).sum(-1, keepdims=True)
    assert np.abs(ends - UNIFORMS[..., None]).min() > 1e-6
    drawn = np.sum(ends <= UNIFORMS[..., None], -1)

    def whole(model):
        logits = model(BATCH.tokens).rearrange(("batch", "position", "vocab")).array
        log_p = jax.nn.log_softmax(logits)

        def loss(labels, weights):
            return -jnp.sum(jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0] * weights)

        return mixed((loss(TARGETS, WEIGHTS), loss(drawn, np.sqrt(WEIGHTS)))), logits

    loss, grads = loss_and_grads(model)
    (wanted, logits), wanted_grads = eqx.filter_jit(eqx.filter_value_and_grad(whole, has_aux=True))(model)
    np.testing.assert_allclose(logits, by_hand, rtol=0, atol=2e-5)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    shapes = str(jax.make_jaxpr(loss_and_grads)(model))
    assert "f32[2,3,128]" in shapes  # the logits of a block
    assert not any(f"f32[{whole},128]" in shapes for whole in ("2,8", "2,9", "3,2,3"))


def test_the_first_gradient_is_that_of_the_head(model):
    """Its weights are zero, so all classes are equally likely, and nothing reaches the layers below."""
    model = eqx.filter_jit(model.config.build)(vocab_size=VOCAB, key=jax.random.key(0))
    stack = model.blocks.stacked
    assert not any(array(layer.weight).any() for layer in (model.proj, stack.attn_proj, stack.mlp_proj))
    assert array(model.embedding.weight).std() == pytest.approx(1, rel=0.05)
    assert all(array(x.weight).std() == pytest.approx((0.33 / 16) ** 0.5, rel=0.1) for x in (stack.q, stack.mlp_fc))
    loss, grads = loss_and_grads(model)
    weights = mixed((WEIGHTS.sum(), np.sqrt(WEIGHTS).sum()))
    assert float(loss) == pytest.approx(weights * np.log(VOCAB), rel=1e-5)
    assert np.isfinite(array(grads.proj.weight)).all() and array(grads.proj.weight).any()
    assert array(grads.proj_bias).any() and not array(grads.proj_bias)[VOCAB:].any()
    assert not array(grads.embedding.weight).any() and not array(grads.blocks.stacked.q.weight).any()


def test_one_token_at_a_time(model):
    kind, Rows = type(model), Axis("batch", ROWS)
    cache = model.empty_cache(Rows)
    fill, step = jax.jit(kind.prefill), jax.jit(kind.decode_step)
    for row in range(ROWS):
        cache = fill(model, cache, row, hax.named(TOKENS[row, :5], "position"))
    for position in range(5, LENGTH):
        at = hax.named(np.full(ROWS, position), Rows)
        logits, cache = step(model, cache, hax.named(TOKENS[:, position], Rows), at)
        found = logits.rearrange(("batch", "vocab")).array
        np.testing.assert_allclose(found, logits_by_hand(model)[:, position], rtol=0, atol=2e-5)


def test_what_decays_and_what_has_which_role(config_class, model):
    params = trainable(model)
    decays = jax.tree_util.tree_leaves_with_path(decay_mask_tree(decay_mask, params))
    weights = {f"blocks.stacked.{name}.weight" for name in MATRICES}
    assert {path_of(path) for path, decay in decays if decay} == {"embedding.weight", "proj.weight"} | weights
    assert set(groups_of([ParameterGroup(role="matrix")], model, parameter_roles)) == weights
    assert set(groups_of([ParameterGroup(role="head")], model, parameter_roles)) == {"proj.weight"}
    assert set(groups_of([ParameterGroup(role="embedding")], model, parameter_roles)) == {"embedding.weight"}
    leaves = jax.tree.leaves(abstract_model(config_class(), 50257))
    # The script's parameters: embedding and head of 50,304 x 768, a bias of the head, two norms, and twelve blocks.
    assert sum(leaf.size for leaf in leaves) == 2 * 50304 * 768 + 50304 + 2 * 768 + 12 * 7_086_336
    with pytest.raises(InputError, match=r"^the head size is 6, but modded_nanogpt requires a multiple of 4; change"):
        config_class(num_heads=2, embed_dim=12)


def path_of(path):
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".0")


def test_its_baseline_takes_the_steps_of_the_benchmark(plugin_folder):
    """A Muon step of 0.025 sqrt(max(1, out / in)), decay by 0.025 * 0.05, a decay of the rate over the last 70 %."""
    planned = plan(read_study(STUDY), {})
    runs = {(run.arm, run.config.trainer.num_train_steps): run.config for run in planned}
    assert len(planned) == 24
    assert {steps for arm, steps in runs if arm == "muon"} == {2750, 3250, 3750}
    for arm in ("adamw", "sophia_g_kronecker", "fisher_kronecker"):
        config = runs[arm, 3750]
        check_optimizer(config.optimizer, config.model, 50257)
        assert (config.optimizer.warmup, config.optimizer.final_learning_rate) == (250, 0)
    config = runs["muon", 3250]
    assert config.trainer.batch_size * config.model.seq_len == 8 * 64 * 1024
    peak, groups = config.optimizer.learning_rate, config.optimizer.parameter_groups
    found = groups_of(groups, abstract_model(config.model, 50257), parameter_roles)
    others = ParameterGroup(role="matrix", weight_decay=config.optimizer.weight_decay)
    sides = matrix_sides(config.model)
    assert len(sides) == len(MATRICES)
    for path, (inputs, outputs) in sides.items():
        group = groups[found[path]] if path in found else others
        rate = peak * group.learning_rate
        step = rate * ADAMW_RMS * max(inputs, outputs) ** 0.5
        assert step == pytest.approx(0.025 * max(1, outputs / inputs) ** 0.5, rel=1e-4)
        assert rate * group.weight_decay == pytest.approx(0.025 * 0.05, rel=1e-4)
    rates = {group.role: peak * group.learning_rate for group in groups if group.role}
    assert rates == pytest.approx({"embedding": 0.7, "head": 0.004, "vector": 0.015})
    schedule = config.optimizer.build_schedule(3250)
    found_rates = [float(schedule(step)) / peak for step in (0, 974, 1625, 3200)]
    assert found_rates == pytest.approx([1, 1, (1 - 1625 / 3250) / 0.7, (1 - 3200 / 3250) / 0.7], rel=1e-4)
