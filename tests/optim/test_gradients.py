"""Loss, gradient and curvature from one forward pass, against each of them by itself."""

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import sophia_levanter.jax_compatibility  # noqa: F401
from sophia_levanter.optim import (
    Bernoulli,
    Categorical,
    EmpiricalFisher,
    GaussNewtonBartlett,
    Hutchinson,
    Normal,
    value_grad_and_curvature,
)
from sophia_levanter.optim._gauss_newton import REDUCTIONS
from sophia_levanter.optim._gradients import accumulate

KEY = jax.random.key(0)
MICROBATCHES, ROWS = 4, 3
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(MICROBATCHES, ROWS, 2)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 3, (MICROBATCHES, ROWS)))
NUMBERS = jnp.asarray(RNG.integers(0, 2, (MICROBATCHES, ROWS, 3)))
WEIGHTS = jnp.asarray([[0.25, 3, 0], [1, 0.5, 2], [0, 0, 0], [6, 1, 1]], jnp.float32)


class Network(eqx.Module):
    inner: jax.Array
    outer: jax.Array
    steps: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return jnp.tanh(x @ self.inner) @ self.outer


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


MODEL = Network(normal(2, 4), normal(4, 3), jnp.int32(3), "network")


def losses_fn(estimator):
    """As a user writes it: the microbatch holds inputs, targets and weights."""

    def losses(model, part, key):
        x, targets, weights = part
        return estimator.losses(model(x), targets, key=key, weights=weights)

    return losses


def parts(first=MICROBATCHES, targets=LABELS):
    return X[:first], targets[:first], WEIGHTS[:first]


def mean_cross_entropy(model, x=X, labels=LABELS, weights=WEIGHTS):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(x), labels)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def assert_same(ours, theirs, rtol=1e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6)


def own_estimate(estimator, first=MICROBATCHES):
    x, _, weights = parts(first)
    return estimator(lambda model, x: model(x), MODEL, x, key=KEY, weights=weights)


@pytest.mark.parametrize("curvature_microbatches", [None, 1, 2, MICROBATCHES])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_three_over_microbatches(reduction, curvature_microbatches):
    estimator = GaussNewtonBartlett(reduction=reduction)
    loss, grads, h_hat = eqx.filter_jit(value_grad_and_curvature)(
        losses_fn(estimator),
        MODEL,
        parts(),
        key=KEY,
        estimator=estimator,
        curvature_microbatches=curvature_microbatches,
    )
    wanted_loss, wanted_grads = eqx.filter_value_and_grad(mean_cross_entropy)(MODEL)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    assert_same(grads, wanted_grads)
    assert_same(h_hat, own_estimate(estimator, curvature_microbatches or MICROBATCHES))


@pytest.mark.parametrize(
    ("likelihood", "targets", "loss"),
    [
        (Categorical(), LABELS[0], optax.softmax_cross_entropy_with_integer_labels),
        (Bernoulli(event_ndim=1), NUMBERS[0], lambda z, y: jnp.sum(optax.sigmoid_binary_cross_entropy(z, y), axis=-1)),
        # The negative log-density of variance 1/2 is the squared error and a constant.
        (Normal(0.5), NUMBERS[0], lambda z, y: jnp.square(z - y) + 0.5 * jnp.log(jnp.pi)),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
def test_all_three_in_one_pass(likelihood, targets, loss, max_grad_norm):
    estimator = GaussNewtonBartlett(likelihood, max_grad_norm=max_grad_norm)

    def losses(model, key):
        return estimator.losses(model(X[0]), targets, key=key)

    value, grads, h_hat = value_grad_and_curvature(losses, MODEL, key=KEY, estimator=estimator)
    wanted_loss, wanted_grads = eqx.filter_value_and_grad(lambda m: jnp.mean(loss(m(X[0]), targets)))(MODEL)
    np.testing.assert_allclose(value, wanted_loss, rtol=1e-5)
    assert_same(grads, wanted_grads)
    assert_same(h_hat, estimator(lambda m: m(X[0]), MODEL, key=KEY))


def test_the_estimator_squares_each_microbatch_if_not_said_otherwise():
    estimator = GaussNewtonBartlett()
    _, _, h_hat = value_grad_and_curvature(losses_fn(estimator), MODEL, parts(), key=KEY, estimator=estimator)
    assert_same(h_hat, own_estimate(estimator))


def test_named_arrays():
    estimator = GaussNewtonBartlett(Categorical("class"))
    model = {"w": hax.named(normal(2, 3), ("feature", "class"))}

    def losses(model, part, key):
        x, labels, weights = part
        return estimator.losses(hax.dot(x, model["w"], axis="feature"), labels, key=key, weights=weights)

    batch = (
        hax.named(X, ("microbatch", "row", "feature")),
        hax.named(LABELS, ("microbatch", "row")),
        hax.named(WEIGHTS, ("microbatch", "row")),
    )
    named = value_grad_and_curvature(losses, model, batch, key=KEY, estimator=estimator, curvature_microbatches=2)
    plain_estimator = GaussNewtonBartlett()
    plain = value_grad_and_curvature(
        lambda m, part, key: plain_estimator.losses(part[0] @ m, part[1], key=key, weights=part[2]),
        model["w"].array,
        parts(),
        key=KEY,
        curvature_microbatches=2,
        estimator=GaussNewtonBartlett(),
    )
    np.testing.assert_allclose(named[0], plain[0], rtol=1e-6)
    for tree, array in zip(named[1:], plain[1:], strict=True):
        assert tree["w"].axes == model["w"].axes
        np.testing.assert_allclose(tree["w"].array, array, rtol=1e-5, atol=1e-7)


def test_scalars_may_be_named():
    model = {"w": hax.named(normal(2, 3), ("feature", "class"))}

    def losses(model, key):
        return hax.mean(model["w"]), 2 * hax.mean(model["w"]), 3

    loss, grads, h_hat = value_grad_and_curvature(losses, model, key=KEY, estimator=GaussNewtonBartlett())
    np.testing.assert_allclose(loss, hax.mean(model["w"]).array, rtol=1e-6)
    np.testing.assert_allclose(grads["w"].array, 1 / 6, rtol=1e-6)
    np.testing.assert_allclose(h_hat["w"].array, 3 / 9, rtol=1e-6)


def count(jaxpr, primitive):
    """How often a primitive is in a jaxpr, and in those inside of it."""
    inner = [sub for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params)]
    return sum(equation.primitive.name == primitive for equation in jaxpr.eqns) + sum(
        count(sub, primitive) for sub in inner
    )


@pytest.mark.parametrize("microbatches", [False, True])
def test_there_is_one_forward_and_two_backward_passes(microbatches):
    estimator = GaussNewtonBartlett()
    calls = []

    class Counted(Network):
        def __call__(self, x):
            calls.append(x)
            return super().__call__(x)

    model = Counted(MODEL.inner, MODEL.outer, MODEL.steps, MODEL.name)

    def all_three(model):
        if microbatches:
            return value_grad_and_curvature(losses_fn(estimator), model, parts(), key=KEY, estimator=estimator)
        part = jax.tree.map(lambda x: x[0], parts())
        return value_grad_and_curvature(
            lambda m, key: losses_fn(estimator)(m, part, key), model, key=KEY, estimator=estimator
        )

    jaxpr = jax.make_jaxpr(all_three)(model).jaxpr
    # The shapes of the sums over microbatches are found by a trace of its own, which computes nothing.
    assert len(calls) == 1 + microbatches
    assert count(jaxpr, "tanh") == 1
    # Two products forward; backward one for each matrix, and one for the hidden layer.
    assert count(jaxpr, "dot_general") == 2 + 2 * 3


def test_what_has_no_weight_changes_nothing():
    estimator = GaussNewtonBartlett()
    wild = jnp.where(WEIGHTS[..., None] > 0, X, 1e4)
    one, other = (
        value_grad_and_curvature(losses_fn(estimator), MODEL, (x, LABELS, WEIGHTS), key=KEY, estimator=estimator)
        for x in (X, wild)
    )
    assert_same(one[0], other[0])
    assert_same(one[1], other[1])


@pytest.mark.parametrize("label", [-100, 1000])
def test_labels_of_positions_left_out_may_be_no_classes(label):
    """Data sets mark them so."""
    estimator = GaussNewtonBartlett()
    labels = jnp.where(WEIGHTS > 0, LABELS, label)
    marked = value_grad_and_curvature(losses_fn(estimator), MODEL, (X, labels, WEIGHTS), key=KEY, estimator=estimator)
    plain = value_grad_and_curvature(losses_fn(estimator), MODEL, parts(), key=KEY, estimator=estimator)
    for one, other in zip(marked, plain, strict=True):
        assert_same(one, other)


def test_all_left_out_is_not_finite():
    results = value_grad_and_curvature(
        losses_fn(GaussNewtonBartlett()),
        MODEL,
        (X, LABELS, jnp.zeros_like(WEIGHTS)),
        key=KEY,
        estimator=GaussNewtonBartlett(),
    )
    for leaf in jax.tree.leaves(results):
        assert not np.isfinite(leaf).any()


def test_vmap_over_keys():
    estimator = GaussNewtonBartlett()
    keys = jax.random.split(KEY, 2)

    def all_three(key):
        return value_grad_and_curvature(
            losses_fn(estimator), MODEL, parts(), key=key, curvature_microbatches=2, estimator=estimator
        )

    batched = jax.jit(jax.vmap(all_three))(keys)
    single = jax.jit(all_three)
    assert_same(batched, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(single, keys)), rtol=1e-4)


def test_numpy_microbatches():
    estimator = GaussNewtonBartlett()
    numpy_parts = jax.tree.map(np.asarray, parts())
    ours, theirs = (
        value_grad_and_curvature(losses_fn(estimator), MODEL, p, key=KEY, curvature_microbatches=2, estimator=estimator)
        for p in (numpy_parts, parts())
    )
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


def test_gradients_of_half_precision_models_are_summed_in_float32():
    """In bfloat16 a sum of ones stands still at 256."""
    _, grads, h_hat = value_grad_and_curvature(
        lambda m, x, key: (jnp.sum(m), jnp.sum(m), 1),
        jnp.ones(2, jnp.bfloat16),
        jnp.zeros((512, 1)),
        key=KEY,
        estimator=GaussNewtonBartlett(),
    )
    np.testing.assert_allclose(np.asarray(grads, np.float32), 1)
    np.testing.assert_allclose(h_hat, 1)
    assert h_hat.dtype == jnp.float32


@pytest.mark.parametrize(("dtype", "num_targets"), [("bfloat16", 1001), ("float16", 70001)])
def test_the_number_of_targets_is_not_rounded_to_the_dtype_of_the_loss(dtype, num_targets):
    _, grads, h_hat = value_grad_and_curvature(
        lambda m, key: (jnp.sum(m), jnp.sum(m), num_targets),
        jnp.ones(2, dtype),
        key=KEY,
        estimator=GaussNewtonBartlett(),
    )
    np.testing.assert_allclose(grads, 1, rtol=1e-6)
    np.testing.assert_allclose(h_hat, num_targets, rtol=1e-6)


def test_sums_without_an_estimator():
    sums = accumulate(losses_fn(GaussNewtonBartlett()), MODEL, parts(), key=KEY)
    assert sums.curvature is None
    np.testing.assert_allclose(sums.num_targets, np.sum(WEIGHTS))
    loss, grads = sums.mean()
    wanted_loss, wanted_grads = eqx.filter_value_and_grad(mean_cross_entropy)(MODEL)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    assert_same(grads, wanted_grads)


@pytest.mark.parametrize("wanted", [0, -1, MICROBATCHES + 1, 1.5])
def test_more_curvature_microbatches_than_there_are_are_refused(wanted):
    with pytest.raises(ValueError, match=f"curvature_microbatches is {wanted}; it must be .*between 1 and 4"):
        value_grad_and_curvature(
            losses_fn(GaussNewtonBartlett()),
            MODEL,
            parts(),
            key=KEY,
            curvature_microbatches=wanted,
            estimator=GaussNewtonBartlett(),
        )


def test_curvature_microbatches_without_microbatches_are_refused():
    with pytest.raises(ValueError, match=r"curvature_microbatches .* microbatches"):
        value_grad_and_curvature(
            lambda m, key: (m, m, 1), jnp.ones(()), key=KEY, curvature_microbatches=2, estimator=GaussNewtonBartlett()
        )


@pytest.mark.parametrize(("which", "name"), [(0, "first"), (1, "second")])
@pytest.mark.parametrize("shape", [(3,), (1,)])
def test_a_loss_that_is_no_scalar_is_refused(which, name, shape):
    def losses(model, key):
        results = [jnp.sum(model), jnp.sum(model), 1]
        results[which] = jnp.broadcast_to(results[which], shape)
        return tuple(results)

    with pytest.raises(ValueError, match=rf"the {name} result of losses_fn has shape .*scalar mean loss"):
        value_grad_and_curvature(losses, jnp.ones(2), key=KEY, estimator=GaussNewtonBartlett())


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({"n": jnp.int32(1)}, ValueError, "the model has no floating-point array"),
        ({"z": jnp.ones(2, jnp.complex64)}, TypeError, r"model\['z'\] is complex"),
    ],
)
def test_models_that_cannot_be_differentiated_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        value_grad_and_curvature(lambda m, key: (0.0, 0.0, 1), model, key=KEY, estimator=GaussNewtonBartlett())


@pytest.mark.parametrize("named", [False, True])
def test_missing_values_may_be_nan_where_the_weight_is_zero(named):
    estimator = GaussNewtonBartlett(Normal())
    x, weights = normal(4, 3), jnp.asarray([1.0, 0.0, 1.0, 1.0])

    def losses(targets):
        def of_model(w, key):
            outputs, y, used = x @ w, targets, weights
            if named:
                outputs, y, used = (hax.named(a, ("row",)) for a in (outputs, y, used))
            return estimator.losses(outputs, y, key=key, weights=used)

        return value_grad_and_curvature(of_model, jnp.ones(3), key=KEY, estimator=estimator)

    full = jnp.arange(4.0)
    for one, other in zip(losses(full.at[1].set(jnp.nan)), losses(full), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("result", [1.0, (1.0, 2.0), None])
def test_losses_that_are_not_three_are_refused(result):
    with pytest.raises(TypeError, match="losses_fn must give 3 scalars"):
        value_grad_and_curvature(lambda m, key: result, jnp.ones(2), key=KEY, estimator=GaussNewtonBartlett())


@pytest.mark.parametrize("estimator", [None, lambda function, model, microbatches, key: model])
def test_an_estimator_that_does_not_say_which_passes_it_needs_is_refused(estimator):
    with pytest.raises(TypeError, match=r"^estimator is .*; it must define gradient_and_estimate"):
        value_grad_and_curvature(lambda m, key: (1.0, 1.0, 1), jnp.ones(2), key=KEY, estimator=estimator)


@pytest.mark.parametrize("curvature_microbatches", [None, 2])
def test_hutchinson_makes_a_pass_of_its_own(curvature_microbatches):
    """One probe for all microbatches, each with the weight of its targets."""
    estimator = Hutchinson()
    loss, grads, h_hat = value_grad_and_curvature(
        losses_fn(GaussNewtonBartlett()),
        MODEL,
        parts(),
        key=KEY,
        estimator=estimator,
        curvature_microbatches=curvature_microbatches,
    )
    first = parts(curvature_microbatches or MICROBATCHES)
    wanted_loss, wanted_grads = eqx.filter_value_and_grad(mean_cross_entropy)(MODEL)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    assert_same(grads, wanted_grads)
    assert_same(h_hat, estimator(lambda m: mean_cross_entropy(m, *first), MODEL, key=KEY), rtol=1e-4)


@pytest.mark.parametrize("microbatches", [None, jnp.zeros((2, 1))])
def test_a_probe_does_not_depend_on_what_the_loss_draws(microbatches):
    """A loss that draws its noise as a probe is drawn: of the same key the diagonal would come out as 4."""

    def losses(w, *args):
        signs = jax.random.rademacher(jax.random.split(args[-1], 1)[0], w.shape, w.dtype)
        loss = jnp.sum(signs * w) ** 2 / 2
        return loss, loss, 1

    def diagonal(key):
        return value_grad_and_curvature(losses, jnp.ones(4), microbatches, key=key, estimator=Hutchinson())[2]

    draws = jax.vmap(diagonal)(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(jnp.mean(draws, axis=0), 1, atol=0.2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_empirical_fisher_squares_the_training_gradient(reduction):
    """It needs no pass of its own, and does not look at the sampled targets."""
    estimator = EmpiricalFisher(reduction=reduction)

    def losses(model, part, key):
        x, labels = part
        losses = optax.softmax_cross_entropy_with_integer_labels(model(x), labels)
        return jnp.mean(losses), jnp.nan, ROWS

    _, grads, h_hat = value_grad_and_curvature(losses, MODEL, (X, LABELS), key=KEY, estimator=estimator)
    each = [
        eqx.filter_grad(lambda m, i=i: jnp.mean(losses(m, (X[i], LABELS[i]), KEY)[0]))(MODEL)
        for i in range(MICROBATCHES)
    ]
    if reduction == "average_then_square":
        wanted = jax.tree.map(lambda g: MICROBATCHES * ROWS * g**2, grads)
    else:
        wanted = jax.tree.map(lambda *gs: sum((ROWS * g) ** 2 for g in gs) / (MICROBATCHES * ROWS), *each)
    assert_same(h_hat, wanted)


REPLACING = GaussNewtonBartlett(extra_pass=False)


@pytest.mark.parametrize("curvature_microbatches", [1, 2])
def test_without_an_extra_pass_the_gradient_is_that_of_the_other_microbatches(curvature_microbatches):
    loss, grads, h_hat = value_grad_and_curvature(
        losses_fn(REPLACING),
        MODEL,
        parts(),
        key=KEY,
        estimator=REPLACING,
        curvature_microbatches=curvature_microbatches,
    )
    rest = jax.tree.map(lambda a: a[curvature_microbatches:], parts())
    wanted_loss, wanted_grads = eqx.filter_value_and_grad(mean_cross_entropy)(MODEL, *rest)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    assert_same(grads, wanted_grads)
    assert_same(h_hat, own_estimate(GaussNewtonBartlett(), curvature_microbatches))


def test_without_an_extra_pass_there_is_no_more_work():
    """As many products as a gradient has: one forward and one backward pass of each microbatch."""

    def all_three(model):
        return value_grad_and_curvature(
            losses_fn(REPLACING), model, parts(), key=KEY, estimator=REPLACING, curvature_microbatches=1
        )

    jaxpr = jax.make_jaxpr(all_three)(MODEL).jaxpr
    # The first microbatch, and the loop over the others: two products forward and three backward each.
    assert count(jaxpr, "dot_general") == 2 * (2 + 3)


@pytest.mark.parametrize("microbatches", [None, 4])
def test_without_an_extra_pass_a_microbatch_must_be_left(microbatches):
    with pytest.raises(ValueError, match=r"^extra_pass is False, and no microbatch is left for the gradient"):
        value_grad_and_curvature(
            losses_fn(REPLACING), MODEL, parts(), key=KEY, estimator=REPLACING, curvature_microbatches=microbatches
        )


def test_without_an_extra_pass_an_estimate_that_is_not_finite_leaves_no_gradient():
    """The step must be skipped: its other microbatches were not looked at."""
    x = X.at[0, 0, 0].set(jnp.nan)
    _, grads, h_hat = value_grad_and_curvature(
        losses_fn(REPLACING),
        MODEL,
        (x, LABELS, WEIGHTS),
        key=KEY,
        estimator=REPLACING,
        curvature_microbatches=1,
    )
    assert not any(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, h_hat)))
