"""Estimators' means against exact diagonals, on a model of 24 parameters.

A mean over draws must be within five standard errors of the exact value in every coordinate, with the standard error
taken from the draws themselves; `test_a_broken_estimator_is_noticed` shows that this bound rejects the usual mistakes.
"""

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sophia_levanter.optim import SophiaG, SophiaH, gauss_newton_bartlett
from sophia_levanter.optim.curvature import (
    REDUCTIONS,
    draw_probe,
    gnb_estimate,
    gnb_total,
    hessian_vector_product,
)
from sophia_levanter.optim.likelihood import categorical_loss, sample_categorical
from sophia_levanter.optim.protocol import differentiable

DRAWS = 20_000
POSITIONS = 8
RAGGED = (1, 2, 5)  # positions in each microbatch
INPUTS = np.random.default_rng(0).normal(size=(POSITIONS, 3)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, POSITIONS)
WEIGHTS = {
    "equal": None,
    "some left out": np.asarray([1, 0, 1, 1, 0, 0, 1, 1], np.float32),
    "any": np.asarray([0.25, 3, 0, 1, 0.5, 2, 0, 6], np.float32),
}


class Classifier(eqx.Module):
    """A network whose matrices have one shape, so that a probe repeated from leaf to leaf biases the estimate."""

    inner: jax.Array
    inner_bias: jax.Array
    outer: jax.Array
    outer_bias: jax.Array
    steps: jax.Array
    name: str = eqx.field(static=True)

    @staticmethod
    def init():
        rng = np.random.default_rng(3)

        def normal(*shape):
            return jnp.asarray(rng.normal(size=shape), jnp.float32)

        return Classifier(normal(3, 3), normal(3), normal(3, 3), normal(3), jnp.int32(5), "classifier")

    def __call__(self, x):
        return jnp.tanh(x @ self.inner + self.inner_bias) @ self.outer + self.outer_bias


MODEL = Classifier.init()
FLAT, FROM_FLAT = ravel_pytree(differentiable(MODEL))


def model_from(flat):
    return eqx.combine(FROM_FLAT(flat), MODEL)


def flatten(tree):
    return ravel_pytree(differentiable(tree))[0]


def loss(model):
    return jnp.mean(categorical_loss(model(INPUTS), LABELS))


@pytest.fixture(scope="module")
def hessian():
    return np.asarray(jax.jit(jax.hessian(lambda flat: loss(model_from(flat))))(FLAT))


def gauss_newton_diagonal(weights):
    """The diagonal of sum_t w_t J_t^T S_t J_t / sum_t w_t, with S the Hessian of the loss in the logits."""
    weights = np.ones(POSITIONS) if weights is None else weights
    jacobian = np.asarray(jax.jit(jax.jacobian(lambda flat: model_from(flat)(INPUTS)))(FLAT), np.float64)
    p = np.asarray(jax.nn.softmax(MODEL(INPUTS)), np.float64)
    inner = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
    return np.einsum("t,tci,tcd,tdi->i", weights, jacobian, inner, jacobian) / np.sum(weights)


@pytest.fixture(scope="module")
def exact_diagonals():
    return {name: gauss_newton_diagonal(weights) for name, weights in WEIGHTS.items()}


def draws_of(estimate, *args):
    """float64 [draw, coordinate] of estimate(key, *args)."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    draws = jax.jit(jax.vmap(lambda key, *args: flatten(estimate(key, *args)), (0, *(None,) * len(args))))(keys, *args)
    return np.asarray(draws, np.float64)


def assert_mean(draws, exact):
    errors = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert np.median(errors / np.abs(exact)) < 0.04, "the bound is too wide to tell anything"
    assert np.all(np.abs(draws.mean(0) - exact) < 5 * errors + 1e-6), "the mean is off"


@jax.jit
def sampled_grads(uniforms):
    """[draw, position, coordinate]: gradients of each position's loss on a label drawn from the model."""

    def one(flat, x, uniform):
        logits = model_from(flat)(x)
        return categorical_loss(logits, sample_categorical(jax.lax.stop_gradient(logits), uniform))

    over_positions = jax.vmap(jax.grad(one), (None, 0, 0))
    return jax.vmap(over_positions, (None, None, 0))(FLAT, INPUTS, uniforms)


@pytest.fixture(scope="module")
def grads():
    return np.asarray(sampled_grads(jax.random.uniform(jax.random.key(4), (DRAWS, POSITIONS))), np.float64)


def microbatch_sums(grads, sizes):
    return [np.sum(part, axis=1) for part in np.split(grads, np.cumsum(sizes)[:-1], axis=1)]


def microbatched(grads, sizes, reduction):
    totals = [gnb_total(jnp.asarray(part), reduction) for part in microbatch_sums(grads, sizes)]
    return np.asarray(gnb_estimate(sum(totals), jnp.float32(sum(sizes)), reduction), np.float64)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_mean(probe, hessian):
    exact = np.diag(hessian)
    assert exact.min() < 0 < exact.max()
    assert_mean(draws_of(lambda key: SophiaH(probe=probe).estimate(loss, MODEL, key=key)), exact)


@pytest.mark.parametrize(("optimizer", "exact"), [(SophiaH(), True), (SophiaH(probe="gaussian"), False)])
def test_rademacher_is_exact_for_a_diagonal_hessian(optimizer, exact):
    model = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([[3.0]])}
    estimate = optimizer.estimate(
        lambda m: jnp.sum(m["a"] ** 2) - 3 * jnp.sum(m["b"] ** 2), model, key=jax.random.key(0)
    )
    assert (flatten(estimate).tolist() == [2, 2, -6]) == exact


def test_hessian_vector_product(hessian):
    vector = jax.random.normal(jax.random.key(2), FLAT.shape)
    product = jax.jit(lambda v: flatten(hessian_vector_product(loss, MODEL, FROM_FLAT(v))))(vector)
    np.testing.assert_allclose(product, hessian @ vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gnb_mean(weights, exact_diagonals):
    def estimate(key, weights=None):
        return SophiaG().estimate(lambda model: model(INPUTS), MODEL, key=key, weights=weights)

    draws = draws_of(estimate) if WEIGHTS[weights] is None else draws_of(estimate, WEIGHTS[weights])
    assert_mean(draws, exact_diagonals[weights])
    assert draws.min() >= 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_microbatched_gnb_mean(reduction, grads, exact_diagonals):
    assert_mean(microbatched(grads, RAGGED, reduction), exact_diagonals["equal"])


def without_the_factor(grads):
    return np.mean(grads, axis=1) ** 2


def unweighted_mean(grads):
    return np.mean([g**2 / n for g, n in zip(microbatch_sums(grads, RAGGED), RAGGED, strict=True)], axis=0)


def likely_labels(grads):
    uniforms = 0.05 + 0.9 * jax.random.uniform(jax.random.key(5), (DRAWS, POSITIONS))
    return microbatched(np.asarray(sampled_grads(uniforms), np.float64), RAGGED, "square_then_average")


def weights_without_the_root(grads):
    w = WEIGHTS["any"]
    return np.sum(grads * w[:, None], axis=1) ** 2 / np.sum(w)


def shared_labels(grads):
    same = jnp.broadcast_to(jax.random.uniform(jax.random.key(6), (DRAWS, 1)), (DRAWS, POSITIONS))
    return microbatched(np.asarray(sampled_grads(same), np.float64), (POSITIONS,), "square_then_average")


@pytest.mark.parametrize(
    ("broken", "weights"),
    [
        (without_the_factor, "equal"),
        (unweighted_mean, "equal"),
        (likely_labels, "equal"),
        (shared_labels, "equal"),
        (weights_without_the_root, "any"),
    ],
)
def test_a_broken_estimator_is_noticed(broken, weights, grads, exact_diagonals):
    with pytest.raises(AssertionError, match="the mean is off"):
        assert_mean(broken(grads), exact_diagonals[weights])


def test_a_probe_repeated_from_leaf_to_leaf_is_noticed(hessian):
    u = np.random.default_rng(0).choice([-1.0, 1.0], (DRAWS, 12))
    u = np.concatenate([u, u], axis=1)
    with pytest.raises(AssertionError, match="the mean is off"):
        assert_mean(u * (u @ hessian), np.diag(hessian))


def test_squaring_first_has_less_variance(grads):
    first, last = (microbatched(grads, (1,) * POSITIONS, reduction).var(0).sum() for reduction in REDUCTIONS)
    assert REDUCTIONS[0] == "square_then_average"
    assert first < 0.5 * last


@pytest.mark.parametrize(("reduction", "wanted"), [("square_then_average", 25 / 4), ("average_then_square", 49 / 4)])
def test_microbatches_by_hand(reduction, wanted):
    totals = [gnb_total({"w": jnp.asarray([g])}, reduction)["w"] for g in (3.0, 4.0)]
    assert gnb_estimate({"w": sum(totals)}, jnp.float32(4), reduction)["w"].tolist() == [wanted]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_totals_are_at_least_float32(reduction):
    total = gnb_total({"half": jnp.full(2, 1e-5, jnp.float16), "single": jnp.ones(2)}, reduction)
    assert {leaf.dtype for leaf in jax.tree.leaves(total)} == {jnp.dtype("float32")}
    assert gnb_estimate(total, jnp.float32(1), reduction)["half"].min() > 0


def test_squares_of_half_precision_gradients_do_not_underflow():
    model = jnp.ones(2, jnp.float16)
    estimate = gauss_newton_bartlett(
        lambda m, key: (jnp.sum(m) * jnp.float16(1e-5), jnp.float32(4)), model, key=jax.random.key(0)
    )
    np.testing.assert_allclose(estimate, 4e-10, rtol=0.02)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_probe(probe):
    model = {
        "a": jnp.zeros((300, 200)),
        "b": jnp.zeros((300, 200)),
        "half": jnp.zeros(4, jnp.bfloat16),
        "count": jnp.int32(1),
        "named": hax.zeros(hax.Axis("embed", 5)),
        "text": "text",
    }
    drawn = draw_probe(jax.random.key(0), model, probe)
    assert (drawn["count"], drawn["text"]) == (None, None)
    assert drawn["half"].dtype == jnp.bfloat16
    assert drawn["named"].axes == model["named"].axes
    a, b = np.asarray(drawn["a"]).ravel(), np.asarray(drawn["b"]).ravel()
    assert (set(np.unique(a)) == {-1, 1}) == (probe == "rademacher")
    limit = 5 / np.sqrt(a.size)
    assert abs(a.mean()) < limit
    assert abs(np.mean(a * b)) < limit
    assert abs(np.mean(a[1:] * a[:-1])) < limit
    assert abs(np.mean(a**2) - 1) < np.sqrt(2) * limit
    again = draw_probe(jax.random.key(0), model, probe)
    other = draw_probe(jax.random.key(1), model, probe)
    np.testing.assert_array_equal(again["a"], drawn["a"])
    assert abs(np.mean(a * np.asarray(other["a"]).ravel())) < limit


def test_integer_and_static_leaves_have_no_curvature():
    key = jax.random.key(0)
    estimates = (
        eqx.filter_eval_shape(lambda: SophiaG().estimate(lambda model: model(INPUTS), MODEL, key=key)),
        eqx.filter_eval_shape(lambda: SophiaH().estimate(loss, MODEL, key=key)),
    )
    for estimate in estimates:
        assert estimate.steps is None
        assert jax.tree.structure(estimate) == jax.tree.structure(differentiable(MODEL))


def test_unknown_probe():
    with pytest.raises(ValueError, match=r"probe is 'uniform'; it must be one of rademacher, gaussian"):
        draw_probe(jax.random.key(0), {"w": jnp.ones(2)}, "uniform")


def test_complex_model():
    with pytest.raises(ValueError, match="the model has complex leaves"):
        draw_probe(jax.random.key(0), {"w": jnp.ones(2, jnp.complex64)})


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        gnb_total({}, "mean")
