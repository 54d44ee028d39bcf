"""Estimators over microbatches, dtypes, named arrays and transformations."""

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from estimates import (
    ANY_WEIGHTS,
    ESTIMATORS,
    INPUTS,
    KEY,
    MODEL,
    assert_like_the_model,
    assert_mean,
    draws_of,
    estimate,
    flatten,
)

import sophia_levanter.jax_compatibility  # noqa: F401
from sophia_levanter.optim import (
    Categorical,
    GaussNewtonBartlett,
    Hutchinson,
)
from sophia_levanter.optim._hutchinson import PROBES, draw_probe


def scaled_loss(model, part, key):
    """A sampled loss whose gradient is known: the mean has the gradient c, over n targets."""
    c, n = part
    return jnp.sum(model["w"] * c), n


@pytest.mark.parametrize(
    ("reduction", "max_grad_norm", "wanted"),
    [
        # G = (3, 4) and B = (2, 2).
        ("square_then_average", None, 25 / 4),
        ("average_then_square", None, 49 / 4),
        # g = (1.5, 2), clipped to (1, 1); their mean is clipped to 1.
        ("square_then_average", 1.0, 8 / 4),
        ("average_then_square", 1.0, 16 / 4),
        ("square_then_average", 1.75, (3**2 + 3.5**2) / 4),
        ("average_then_square", 1.75, 49 / 4),
    ],
)
def test_microbatches_by_hand(reduction, max_grad_norm, wanted):
    estimator = GaussNewtonBartlett(reduction=reduction, max_grad_norm=max_grad_norm)
    parts = jnp.asarray([[1.5], [2.0]]), jnp.asarray([2, 2])
    found = estimator.from_sampled_loss(scaled_loss, {"w": jnp.ones(1)}, parts, key=KEY)
    assert found["w"].tolist() == pytest.approx([wanted])


@pytest.mark.parametrize(("max_grad_norm", "wanted"), [(None, [18, 32]), (1, [0.72, 1.28]), (5.1, [18, 32])])
def test_the_gradient_is_clipped_by_its_global_norm(max_grad_norm, wanted):
    estimator = GaussNewtonBartlett(max_grad_norm=max_grad_norm)
    model = {"a": jnp.ones(1), "b": jnp.ones((1, 1))}
    estimate = estimator.from_sampled_loss(lambda m, _: (3 * m["a"][0] + 4 * m["b"][0, 0], 2), model, key=KEY)
    assert flatten(estimate).tolist() == pytest.approx(wanted)


def test_each_microbatch_draws_its_own_targets():
    def sampled_loss(model, x, key):
        return jnp.sum(model * jax.random.uniform(key)), 1

    estimate = GaussNewtonBartlett().from_sampled_loss(sampled_loss, jnp.ones(1), jnp.zeros(2), key=KEY)
    draws = [float(jax.random.uniform(jax.random.fold_in(KEY, i))) for i in range(2)]
    assert draws[0] != draws[1]
    assert estimate.tolist() == pytest.approx([(draws[0] ** 2 + draws[1] ** 2) / 2])


@pytest.mark.parametrize("probe", PROBES)
def test_probe(probe):
    model = {
        "a": jnp.zeros((300, 200)),
        "b": jnp.zeros((300, 200)),
        "half": jnp.zeros(4, jnp.bfloat16),
        "count": jnp.int32(1),
        "named": hax.zeros(hax.Axis("embed", 5)),
        "text": "text",
    }
    drawn = draw_probe(KEY, model, probe)
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
    again = draw_probe(KEY, model, probe)
    other = draw_probe(jax.random.key(1), model, probe)
    np.testing.assert_array_equal(again["a"], drawn["a"])
    assert abs(np.mean(a * np.asarray(other["a"]).ravel())) < limit


@pytest.mark.parametrize(("estimator", "function"), ESTIMATORS)
def test_estimates_are_at_least_float32(estimator, function):
    half = jax.tree.map(lambda x: x.astype("bfloat16") if eqx.is_inexact_array(x) else x, MODEL)
    x = jnp.asarray(INPUTS.reshape(2, 4, 3), "bfloat16")
    for args in ((half,), (half, x)):
        estimate = eqx.filter_eval_shape(lambda *args: estimator(function, *args, key=KEY), *args)
        assert_like_the_model(estimate, half)


@pytest.mark.parametrize(("estimator", "function"), ESTIMATORS)
def test_estimates_of_float64_models_are_float64(estimator, function):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype("float64") if eqx.is_inexact_array(x) else x, MODEL)
        x = jnp.asarray(INPUTS.reshape(2, 4, 3), jnp.float64)
        estimate = eqx.filter_eval_shape(lambda m, x: estimator(function, m, x, key=KEY), wide, x)
        assert_like_the_model(estimate, wide, "float64")


def test_squares_of_half_precision_gradients_do_not_underflow():
    model = jnp.ones(2, jnp.float16)
    estimate = GaussNewtonBartlett().from_sampled_loss(
        lambda m, key: (jnp.sum(m) * jnp.float16(1e-5), jnp.float32(4)), model, key=KEY
    )
    np.testing.assert_allclose(estimate, 4e-10, rtol=0.02)


def test_sums_over_many_microbatches_do_not_stand_still_in_half_precision():
    """In bfloat16 a sum of 1 / 512 stops growing at 1 / 2."""

    def loss_fn(m, x):
        return jnp.sum(m.astype(jnp.float32) ** 2) / 2 + jnp.sum(x)

    estimate = Hutchinson()(loss_fn, jnp.ones(1, jnp.bfloat16), jnp.ones((512, 1)), key=KEY)
    assert estimate.tolist() == [1.0]


@pytest.mark.parametrize("estimator", [GaussNewtonBartlett, Hutchinson])
def test_named_arrays_give_what_plain_arrays_give(estimator):
    """Named parameters, microbatches, outputs and weights, against the same in plain arrays."""
    x, weights = INPUTS.reshape(2, 4, 3), ANY_WEIGHTS.reshape(2, 4)
    named_model = {"w": hax.named(MODEL.inner, ("feature", "class"))}
    named_x, named_weights = (
        hax.named(jnp.asarray(a), names)
        for a, names in ((x, ("microbatch", "row", "feature")), (weights, ("microbatch", "row")))
    )

    def named_outputs(model, x):
        return hax.dot(x, model["w"], axis="feature")

    def plain_outputs(model, x):
        return x @ model["w"]

    if estimator is Hutchinson:
        made = Hutchinson()
        functions = (
            lambda m, x: hax.mean(named_outputs(m, x) ** 4),
            lambda m, x: jnp.mean(plain_outputs(m, x) ** 4),
        )
        named_weights, weights = hax.named(jnp.asarray([1.0, 3.0]), ("microbatch",)), jnp.asarray([1.0, 3.0])
    else:
        made, functions = estimator(Categorical(-1)), (named_outputs, plain_outputs)
    named = estimate(made, functions[0], named_model, named_x, weights=named_weights)
    plain = estimate(made, functions[1], {"w": MODEL.inner}, jnp.asarray(x), weights=jnp.asarray(weights))
    assert named["w"].axes == named_model["w"].axes
    np.testing.assert_allclose(named["w"].array, plain["w"], rtol=1e-5)


class HeteroscedasticNormal:
    """A custom likelihood whose outputs are a pair: the mean and the log of the variance."""

    def sample(self, outputs, *, key):
        mean, log_variance = outputs
        return mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)

    def loss(self, outputs, targets):
        mean, log_variance = outputs
        return (jnp.square(targets - mean) / jnp.exp(log_variance) + log_variance) / 2


def test_a_custom_likelihood():
    model = {"mean": jnp.asarray([1.0]), "log_variance": jnp.asarray([-1.0])}

    def outputs(m):
        return m["mean"] * jnp.ones(6), m["log_variance"] * jnp.ones(6)

    draws = draws_of(lambda key: GaussNewtonBartlett(HeteroscedasticNormal())(outputs, model, key=key))
    assert_mean(draws, np.asarray([0.5, np.e]))  # Fisher's information of a normal distribution: 1/2 and 1/variance


@pytest.mark.parametrize("num_probes", [1, 2])
@pytest.mark.parametrize("microbatches", [None, jnp.arange(2.0)])
def test_parameters_that_the_gradient_does_not_depend_on_have_no_curvature(num_probes, microbatches):
    model = {"w": jnp.asarray([1.0, 2.0]), "unused": jnp.ones(3), "linear": jnp.ones(2)}

    def loss(m, _=None):
        return jnp.sum(m["w"] ** 2) + jnp.sum(m["linear"])

    h_hat = Hutchinson(num_probes=num_probes)(loss, model, microbatches, key=KEY)
    assert h_hat["w"].tolist() == [2.0, 2.0]
    assert h_hat["unused"].tolist() == [0.0] * 3
    assert h_hat["linear"].tolist() == [0.0] * 2
