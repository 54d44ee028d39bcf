"""Estimators' means against exact diagonals, on a model of 24 parameters.

A mean over draws must be within five standard errors of the exact value in every coordinate, with the standard error
taken from the draws themselves; `test_a_broken_estimator_is_noticed` shows that this bound rejects the usual mistakes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from estimates import (
    ANY_WEIGHTS,
    DRAWS,
    FLAT,
    FROM_FLAT,
    INPUTS,
    KEY,
    LABELS,
    LIKELIHOODS,
    MODEL,
    POSITIONS,
    RAGGED,
    assert_like_the_model,
    assert_mean,
    draws_of,
    estimate,
    flatten,
    gauss_newton_diagonal,
    loss,
    model_from,
    outputs_fn,
    softmax_inner,
)

from sophia_levanter.optim import GaussNewtonBartlett, Hutchinson
from sophia_levanter.optim._categorical import categorical_loss, sample_categorical
from sophia_levanter.optim._gauss_newton import REDUCTIONS
from sophia_levanter.optim._hutchinson import PROBES, hessian_vector_product


@pytest.fixture(scope="module")
def hessian():
    return np.asarray(jax.jit(jax.hessian(lambda flat: loss(model_from(flat))))(FLAT))


@pytest.fixture(scope="module")
def jacobian():
    return np.asarray(jax.jit(jax.jacobian(lambda flat: model_from(flat)(INPUTS)))(FLAT), np.float64)


@pytest.mark.parametrize("case", LIKELIHOODS)
def test_gauss_newton_mean(case, jacobian):
    likelihood, outputs, weights, inner, position_weights = LIKELIHOODS[case]
    draws = draws_of(lambda key: GaussNewtonBartlett(likelihood)(outputs, MODEL, key=key, weights=weights))
    exact = gauss_newton_diagonal(jacobian, inner(), position_weights)
    assert_mean(draws, exact)
    assert draws.min() >= 0
    assert case != "padded" or (exact[-1] == 0 and not draws[:, -1].any())


@functools.cache
def hutchinson_draws(probe, num_probes):
    return draws_of(lambda key: Hutchinson(probe, num_probes)(loss, MODEL, key=key))


@pytest.mark.parametrize(("probe", "num_probes"), [(PROBES[0], 1), (PROBES[0], 3), (PROBES[1], 1)])
def test_hutchinson_mean(probe, num_probes, hessian):
    exact = np.diag(hessian)
    assert exact.min() < 0 < exact.max()
    assert_mean(hutchinson_draws(probe, num_probes), exact)


def test_the_variance_is_one_over_the_number_of_probes():
    one, three = (hutchinson_draws(PROBES[0], n).var(0).sum() for n in (1, 3))
    assert 0.88 / 3 < three / one < 1.12 / 3


@pytest.mark.parametrize("probe", PROBES)
def test_only_rademacher_is_exact_for_a_diagonal_hessian(probe):
    model = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([[3.0]])}

    def quadratic(m):
        return jnp.sum(m["a"] ** 2) - 3 * jnp.sum(m["b"] ** 2)

    estimate = Hutchinson(probe)(quadratic, model, key=KEY)
    assert (flatten(estimate).tolist() == [2, 2, -6]) == (probe == "rademacher")


def test_hessian_vector_product(hessian):
    vector = jax.random.normal(jax.random.key(2), FLAT.shape)
    product, _ = jax.jit(lambda v: hessian_vector_product(lambda m: (loss(m), None), MODEL, FROM_FLAT(v)))(vector)
    np.testing.assert_allclose(flatten(product), hessian @ vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_probes", "weights"), [(2, None), (1, [1, 3])])
def test_hutchinson_over_microbatches_is_that_of_the_whole_batch(weights, num_probes):
    """The probe is the same for all, so not only in the mean."""
    parts = jnp.asarray(INPUTS.reshape(2, 4, 3)), jnp.asarray(LABELS.reshape(2, 4))
    shares = np.asarray([1, 1] if weights is None else weights) / np.sum([1, 1] if weights is None else weights)

    def whole(model):
        return sum(share * loss(model, x, y) for share, x, y in zip(shares, *parts, strict=True))

    estimator = Hutchinson(num_probes=num_probes)
    joined = estimate(estimator, lambda m, part: loss(m, *part), MODEL, parts, weights=weights)
    np.testing.assert_allclose(flatten(joined), flatten(estimate(estimator, whole, MODEL)), rtol=1e-4, atol=1e-5)
    assert_like_the_model(joined)


def ragged():
    """Microbatches [4, 5, ...] of the eight positions, and their mask; the second has no position at all."""
    x = np.full((4, 5, 3), 7, np.float32)
    mask = np.zeros((4, 5), np.float32)
    for i, part in zip((0, 2, 3), np.split(INPUTS, np.cumsum(RAGGED)[:-1]), strict=True):
        x[i, : len(part)], mask[i, : len(part)] = part, 1
    return jnp.asarray(x), jnp.asarray(mask)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gnb_mean_over_ragged_microbatches(reduction, jacobian):
    x, mask = ragged()
    estimator = GaussNewtonBartlett(reduction=reduction)
    draws = draws_of(lambda key: estimator(outputs_fn, MODEL, x, key=key, weights=mask))
    assert_mean(draws, gauss_newton_diagonal(jacobian, softmax_inner()))


def test_a_masked_microbatch_adds_nothing():
    """And an estimate on no target at all is not finite."""
    estimator = GaussNewtonBartlett(max_grad_norm=1.0)
    x, mask = (jnp.roll(a, 2, axis=0) for a in ragged())
    assert not mask[3].any()
    joined = jax.jit(lambda x, mask: estimator(outputs_fn, MODEL, x, key=KEY, weights=mask))
    without = estimate(estimator, outputs_fn, MODEL, x[:3], weights=mask[:3])
    np.testing.assert_allclose(flatten(joined(x, mask)), flatten(without), rtol=1e-6)
    whole = estimate(estimator, outputs_fn, MODEL, weights=np.zeros(POSITIONS))
    for h_hat in (whole, joined(x, jnp.zeros_like(mask))):
        assert_like_the_model(h_hat)
        assert not np.isfinite(flatten(h_hat)).any()


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


def microbatch_sums(grads, sizes=RAGGED):
    return [np.sum(part, axis=1) for part in np.split(grads, np.cumsum(sizes)[:-1], axis=1)]


def squared_then_averaged(grads):
    return sum(g**2 for g in microbatch_sums(grads)) / POSITIONS


def without_the_factor(grads):
    return np.mean(grads, axis=1) ** 2


def unweighted_mean(grads):
    return np.mean([g**2 / n for g, n in zip(microbatch_sums(grads), RAGGED, strict=True)], axis=0)


def likely_labels(grads):
    uniforms = 0.05 + 0.9 * jax.random.uniform(jax.random.key(5), (DRAWS, POSITIONS))
    return squared_then_averaged(np.asarray(sampled_grads(uniforms), np.float64))


def weights_without_the_root(grads):
    return np.sum(grads * ANY_WEIGHTS[:, None], axis=1) ** 2 / np.sum(ANY_WEIGHTS)


def shared_labels(grads):
    same = jnp.broadcast_to(jax.random.uniform(jax.random.key(6), (DRAWS, 1)), (DRAWS, POSITIONS))
    return squared_then_averaged(np.asarray(sampled_grads(same), np.float64))


@pytest.mark.parametrize(
    ("broken", "weights"),
    [
        (without_the_factor, None),
        (unweighted_mean, None),
        (likely_labels, None),
        (shared_labels, None),
        (weights_without_the_root, ANY_WEIGHTS),
    ],
)
def test_a_broken_estimator_is_noticed(broken, weights, grads, jacobian):
    assert_mean(squared_then_averaged(grads), gauss_newton_diagonal(jacobian, softmax_inner()))
    with pytest.raises(AssertionError, match="the mean is off"):
        assert_mean(broken(grads), gauss_newton_diagonal(jacobian, softmax_inner(), weights))


def test_squaring_first_has_less_variance(grads):
    """With one target in each microbatch; `test_estimators.py` has both reductions by hand."""
    first, last = np.mean(grads**2, axis=1), POSITIONS * np.mean(grads, axis=1) ** 2
    assert first.var(0).sum() < 0.5 * last.var(0).sum()
