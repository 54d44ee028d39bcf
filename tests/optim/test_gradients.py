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
    EmpiricalFisher,
    GaussNewtonBartlett,
    Hutchinson,
    Normal,
    value_grad_and_curvature,
)
from sophia_levanter.optim._gauss_newton import REDUCTIONS

KEY = jax.random.key(0)
MICROBATCHES, ROWS = 4, 3
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(MICROBATCHES, ROWS, 2)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 3, (MICROBATCHES, ROWS)))
NUMBERS = jnp.asarray(RNG.integers(0, 2, (MICROBATCHES, ROWS, 3)))
WEIGHTS = jnp.asarray([[0.25, 3, 0], [1, 0.5, 2], [0, 0, 0], [6, 1, 1]], jnp.float32)
BATCH = X, LABELS, WEIGHTS
GNB, REPLACING = GaussNewtonBartlett(), GaussNewtonBartlett(extra_pass=False)
AVERAGED = GaussNewtonBartlett(reduction="average_then_square")


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


def losses_fn(model, part, key):
    """As a user writes it: the microbatch holds inputs, targets and weights."""
    x, targets, weights = part
    return GNB.losses(model(x), targets, key=key, weights=weights)


def passes(losses_fn, model, *microbatches, estimator=GNB, key=KEY, **given):
    return value_grad_and_curvature(losses_fn, model, *microbatches, estimator=estimator, key=key, **given)


@eqx.filter_jit
def all_three(batch=BATCH, estimator=GNB, curvature_microbatches=None, key=KEY):
    """Compiled once for each estimator and number of microbatches."""
    return passes(losses_fn, MODEL, batch, estimator=estimator, key=key, curvature_microbatches=curvature_microbatches)


@eqx.filter_jit
def own_estimate(estimator, first):
    x, _, weights = (array[:first] for array in BATCH)
    return estimator(lambda model, x: model(x), MODEL, x, key=KEY, weights=weights)


@eqx.filter_jit
@eqx.filter_value_and_grad
def mean_cross_entropy(model, x, labels, weights):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(x), labels)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def assert_same(ours, theirs, rtol=1e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6)


def assert_mean_loss_and_gradient(loss, grads, batch=BATCH):
    wanted_loss, wanted_grads = mean_cross_entropy(MODEL, *batch)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    assert_same(grads, wanted_grads)


@pytest.mark.parametrize(
    ("estimator", "curvature_microbatches"),
    [(GNB, None), (GNB, 1), (GNB, MICROBATCHES), (AVERAGED, 2)],
)
def test_all_three_over_microbatches(estimator, curvature_microbatches):
    loss, grads, h_hat = all_three(BATCH, estimator, curvature_microbatches)
    assert_mean_loss_and_gradient(loss, grads)
    assert_same(h_hat, own_estimate(estimator, curvature_microbatches or MICROBATCHES))


@pytest.mark.parametrize(
    ("estimator", "targets", "loss"),
    [
        (GNB, LABELS[0], optax.softmax_cross_entropy_with_integer_labels),
        (
            GaussNewtonBartlett(Bernoulli(event_ndim=1), max_grad_norm=0.01),
            NUMBERS[0],
            lambda z, y: jnp.sum(optax.sigmoid_binary_cross_entropy(z, y), axis=-1),
        ),
        # The negative log-density of variance 1/2 is the squared error and a constant.
        (GaussNewtonBartlett(Normal(0.5)), NUMBERS[0], lambda z, y: jnp.square(z - y) + 0.5 * jnp.log(jnp.pi)),
    ],
)
def test_all_three_in_one_pass(estimator, targets, loss):

    @eqx.filter_jit
    def found_and_wanted(model):
        found = passes(lambda m, key: estimator.losses(m(X[0]), targets, key=key), model, estimator=estimator)
        wanted = eqx.filter_value_and_grad(lambda m: jnp.mean(loss(m(X[0]), targets)))(model)
        return found, (*wanted, estimator(lambda m: m(X[0]), model, key=KEY))

    (value, *trees), (wanted, *wanted_trees) = found_and_wanted(MODEL)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert_same(trees, wanted_trees)


def count(jaxpr, primitive):
    """How often a primitive is in a jaxpr, and in those inside of it."""
    inner = [sub for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params)]
    return sum(equation.primitive.name == primitive for equation in jaxpr.eqns) + sum(
        count(sub, primitive) for sub in inner
    )


# A forward pass has two products; a backward pass has one for each matrix, and one for the hidden layer.
@pytest.mark.parametrize(
    ("estimator", "curvature_microbatches", "calls", "forward", "products"),
    [
        pytest.param(GNB, None, 2, 1, 2 + 2 * 3, id="one forward and two backward passes"),
        pytest.param(
            REPLACING, 1, 2, 2, 2 * (2 + 3), id="as much as a gradient: the first, and a loop over the others"
        ),
        pytest.param(GNB, "one pass", 1, 1, 2 + 2 * 3, id="without microbatches"),
    ],
)
def test_no_pass_is_made_twice(estimator, curvature_microbatches, calls, forward, products):
    seen = []

    class Counted(Network):
        def __call__(self, x):
            seen.append(x)
            return super().__call__(x)

    def traced(model):
        if curvature_microbatches == "one pass":
            part = jax.tree.map(lambda x: x[0], BATCH)
            return passes(lambda m, key: losses_fn(m, part, key), model, estimator=estimator)
        return passes(losses_fn, model, BATCH, estimator=estimator, curvature_microbatches=curvature_microbatches)

    jaxpr = jax.make_jaxpr(traced)(Counted(MODEL.inner, MODEL.outer, MODEL.steps, MODEL.name)).jaxpr
    # Another trace finds the shapes of the sums over microbatches, or is that of the loop over the other microbatches.
    assert len(seen) == calls
    assert count(jaxpr, "tanh") == forward
    assert count(jaxpr, "dot_general") == products


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param((jnp.where(WEIGHTS[..., None] > 0, X, 1e4), LABELS, WEIGHTS), id="inputs"),
        # Data sets mark positions so.
        pytest.param((X, jnp.where(WEIGHTS > 0, LABELS, -100), WEIGHTS), id="label -100"),
        pytest.param((X, jnp.where(WEIGHTS > 0, LABELS, 1000), WEIGHTS), id="label 1000"),
    ],
)
def test_what_has_no_weight_changes_nothing(batch):
    assert_same(all_three(batch), all_three())


@pytest.mark.parametrize("named", [False, True])
def test_missing_values_may_be_nan_where_the_weight_is_zero(named):
    estimator = GaussNewtonBartlett(Normal())
    x, weights, full = normal(4, 3), jnp.asarray([1.0, 0.0, 1.0, 1.0]), jnp.arange(4.0)

    def results(targets):
        def losses(w, key):
            outputs, y, used = (hax.named(a, ("row",)) if named else a for a in (x @ w, targets, weights))
            return estimator.losses(outputs, y, key=key, weights=used)

        return passes(losses, jnp.ones(3), estimator=estimator)

    assert_same(results(full.at[1].set(jnp.nan)), results(full))


def test_all_left_out_is_not_finite():
    for leaf in jax.tree.leaves(all_three((X, LABELS, jnp.zeros_like(WEIGHTS)))):
        assert not np.isfinite(leaf).any()


def test_gradients_of_half_precision_models_are_summed_in_float32():
    """In bfloat16 a sum of ones stands still at 256."""
    _, grads, h_hat = passes(
        lambda m, x, key: (jnp.sum(m), jnp.sum(m), 1), jnp.ones(2, jnp.bfloat16), jnp.zeros((512, 1))
    )
    np.testing.assert_allclose(np.asarray(grads, np.float32), 1)
    np.testing.assert_allclose(h_hat, 1)
    assert h_hat.dtype == jnp.float32


@pytest.mark.parametrize(("dtype", "num_targets"), [("bfloat16", 1001), ("float16", 70001)])
def test_the_number_of_targets_is_not_rounded_to_the_dtype_of_the_loss(dtype, num_targets):
    _, grads, h_hat = passes(lambda m, key: (jnp.sum(m), jnp.sum(m), num_targets), jnp.ones(2, dtype))
    np.testing.assert_allclose(grads, 1, rtol=1e-6)
    np.testing.assert_allclose(h_hat, num_targets, rtol=1e-6)


def test_hutchinson_makes_another_pass():
    """One probe for all microbatches, each with the weight of its targets."""
    loss, grads, h_hat = all_three(BATCH, Hutchinson(), 2)
    assert_mean_loss_and_gradient(loss, grads)
    first = [array[:2] for array in BATCH]
    wanted = eqx.filter_jit(lambda model: Hutchinson()(lambda m: mean_cross_entropy(m, *first)[0], model, key=KEY))
    assert_same(h_hat, wanted(MODEL), rtol=1e-4)


@pytest.mark.parametrize("microbatches", [None, jnp.zeros((2, 1))])
def test_a_probe_does_not_depend_on_what_the_loss_draws(microbatches):
    """A loss that draws its noise as a probe is drawn: of the same key the diagonal would come out as 4."""

    def losses(w, *args):
        signs = jax.random.rademacher(jax.random.split(args[-1], 1)[0], w.shape, w.dtype)
        loss = jnp.sum(signs * w) ** 2 / 2
        return loss, loss, 1

    def diagonal(key):
        return passes(losses, jnp.ones(4), microbatches, key=key, estimator=Hutchinson())[2]

    draws = jax.jit(jax.vmap(diagonal))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(jnp.mean(draws, axis=0), 1, atol=0.2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_empirical_fisher_squares_the_training_gradient(reduction):
    """It needs no further pass, and does not look at the sampled targets."""

    def losses(model, part, key):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(part[0]), part[1])
        return jnp.mean(losses), jnp.nan, ROWS

    estimator = EmpiricalFisher(reduction=reduction)
    _, grads, h_hat = eqx.filter_jit(lambda batch: passes(losses, MODEL, batch, estimator=estimator))(BATCH)
    if reduction == "average_then_square":
        wanted = jax.tree.map(lambda g: MICROBATCHES * ROWS * g**2, grads)
    else:
        each = [mean_cross_entropy(MODEL, x, labels, jnp.ones(ROWS))[1] for x, labels in zip(X, LABELS, strict=True)]
        wanted = jax.tree.map(lambda *gs: sum((ROWS * g) ** 2 for g in gs) / (MICROBATCHES * ROWS), *each)
    assert_same(h_hat, wanted)


def test_without_an_extra_pass_the_gradient_is_that_of_the_other_microbatches():
    loss, grads, h_hat = all_three(BATCH, REPLACING, 1)
    assert_mean_loss_and_gradient(loss, grads, [array[1:] for array in BATCH])
    assert_same(h_hat, own_estimate(GNB, 1))


def test_without_an_extra_pass_an_estimate_that_is_not_finite_leaves_no_gradient():
    """The step must be skipped: its other microbatches were not looked at, so it has no loss."""
    loss, grads, h_hat = all_three((X.at[0, 0, 0].set(jnp.nan), LABELS, WEIGHTS), REPLACING, 1)
    assert np.isnan(loss)
    assert not any(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, h_hat)))


@pytest.mark.parametrize("wanted", [None, MICROBATCHES])
def test_without_an_extra_pass_a_microbatch_must_be_left(wanted):
    with pytest.raises(ValueError, match=r"^extra_pass is False, but no microbatch is left for the gradient"):
        passes(losses_fn, MODEL, BATCH, estimator=REPLACING, curvature_microbatches=wanted)


@pytest.mark.parametrize("wanted", [0, -1, MICROBATCHES + 1, 1.5])
def test_more_curvature_microbatches_than_there_are_are_refused(wanted):
    with pytest.raises(ValueError, match=f"curvature_microbatches is {wanted}; it must be .*between 1 and 4"):
        passes(losses_fn, MODEL, BATCH, curvature_microbatches=wanted)
    with pytest.raises(ValueError, match=r"curvature_microbatches .* microbatches"):
        passes(lambda m, key: (m, m, 1), jnp.ones(()), curvature_microbatches=wanted)


@pytest.mark.parametrize(("which", "name"), [(0, "first"), (1, "second")])
@pytest.mark.parametrize("shape", [(3,), (1,)])
def test_a_loss_that_is_not_a_scalar_is_refused(which, name, shape):
    def losses(model, key):
        results = [jnp.sum(model), jnp.sum(model), 1]
        results[which] = jnp.broadcast_to(results[which], shape)
        return tuple(results)

    with pytest.raises(ValueError, match=rf"the {name} result of losses_fn has shape .*scalar mean loss"):
        passes(losses, jnp.ones(2))


@pytest.mark.parametrize(
    ("losses", "estimator", "message"),
    [
        (1.0, GNB, "losses_fn must return 3 scalars"),
        ((1.0, 2.0), GNB, "losses_fn must return 3 scalars"),
        ((1.0, 1.0, 1), lambda *given: 0, "^estimator is .*; it must define gradient_and_estimate"),
    ],
)
def test_what_does_not_fit_is_refused(losses, estimator, message):
    with pytest.raises(TypeError, match=message):
        passes(lambda m, key: losses, jnp.ones(2), estimator=estimator)
