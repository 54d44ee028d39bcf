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
from jax.extend.core import Primitive
from jax.flatten_util import ravel_pytree

from sophia_levanter.optim import (
    Bernoulli,
    Categorical,
    GaussNewtonBartlett,
    GaussNewtonHutchinson,
    Hutchinson,
    Normal,
    SophiaG,
    SophiaH,
)
from sophia_levanter.optim.categorical import categorical_loss, sample_categorical
from sophia_levanter.optim.gauss_newton import REDUCTIONS
from sophia_levanter.optim.hutchinson import PROBES, draw_probe, hessian_vector_product
from sophia_levanter.optim.trees import differentiable

KEY = jax.random.key(0)
DRAWS = 5_000
POSITIONS = 8
RAGGED = (1, 2, 5)  # positions in each microbatch
INPUTS = np.random.default_rng(0).normal(size=(POSITIONS, 3)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, POSITIONS)
ANY_WEIGHTS = np.asarray([0.25, 3, 0, 1, 0.5, 2, 0, 6], np.float32)
MASK = np.asarray([1, 0, 1, 1, 0, 0, 1, 1], np.float32)
VARIANCES = np.asarray([0.25, 1, 4], np.float32)


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


def outputs_fn(model, x=INPUTS):
    return model(x)


def flatten(tree):
    return ravel_pytree(differentiable(tree))[0]


def loss(model, x=INPUTS, labels=LABELS):
    return jnp.mean(categorical_loss(model(x), labels))


@pytest.fixture(scope="module")
def hessian():
    return np.asarray(jax.jit(jax.hessian(lambda flat: loss(model_from(flat))))(FLAT))


@pytest.fixture(scope="module")
def jacobian():
    return np.asarray(jax.jit(jax.jacobian(lambda flat: model_from(flat)(INPUTS)))(FLAT), np.float64)


def gauss_newton_diagonal(jacobian, inner, weights=None):
    """The diagonal of sum_t w_t J_t^T S_t J_t / sum_t w_t, with S the Hessian of the loss in the outputs."""
    weights = np.ones(POSITIONS) if weights is None else weights
    return np.einsum("t,tci,tcd,tdi->i", weights, jacobian, inner, jacobian) / np.sum(weights)


def softmax_inner(classes=3):
    """[position, class, class] diag(p) - p p^T, 0 for the padding."""
    p = np.zeros((POSITIONS, 3))
    p[:, :classes] = jax.nn.softmax(MODEL(INPUTS)[:, :classes])
    return p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]


def diagonal_inner(values):
    return np.broadcast_to(values, (POSITIONS, 3))[:, :, None] * np.eye(3)


def sigmoid_inner():
    p = np.asarray(jax.nn.sigmoid(MODEL(INPUTS)), np.float64)
    return diagonal_inner(p * (1 - p))


def named_grid(model):
    """The eight positions as [class, row, column], so that the targets are [row, column]."""
    grid = hax.named(model(INPUTS).reshape(2, 4, 3), ("row", "column", "class"))
    return grid.rearrange(("class", "row", "column"))


COLUMN_WEIGHTS = ANY_WEIGHTS[3:7]
ELEMENT_WEIGHTS = np.outer(ANY_WEIGHTS, [1, 0, 0.5])
# Likelihood, outputs, weights as given, S, the weight of each position; all with targets of the same model.
LIKELIHOODS = {
    "categorical": (Categorical(), outputs_fn, None, softmax_inner, None),
    "mask": (Categorical(), outputs_fn, MASK.astype(bool), softmax_inner, MASK),
    "classes first": (Categorical(0), lambda m: m(INPUTS).T, ANY_WEIGHTS, softmax_inner, ANY_WEIGHTS),
    "named weights in another order": (
        Categorical("class"),
        named_grid,
        hax.named(ANY_WEIGHTS.reshape(2, 4), ("row", "column")).rearrange(("column", "row")),
        softmax_inner,
        ANY_WEIGHTS,
    ),
    "named weights of one axis": (
        Categorical(0),
        named_grid,
        hax.named(COLUMN_WEIGHTS, ("column",)),
        softmax_inner,
        np.tile(COLUMN_WEIGHTS, 2),
    ),
    "padded": (Categorical(num_classes=2), outputs_fn, None, lambda: softmax_inner(2), None),
    "bernoulli": (Bernoulli(), outputs_fn, None, lambda: sigmoid_inner() / 3, None),
    "bernoulli events": (Bernoulli(event_ndim=1), outputs_fn, ANY_WEIGHTS, sigmoid_inner, ANY_WEIGHTS),
    "normal": (Normal(), outputs_fn, None, lambda: diagonal_inner(1 / 3), None),
    "normal weights of elements": (
        Normal(2.0),
        outputs_fn,
        ELEMENT_WEIGHTS,
        lambda: diagonal_inner([0.5 / 1.5, 0, 0.25 / 1.5]),
        ANY_WEIGHTS,
    ),
    "normal events": (
        Normal(VARIANCES, event_ndim=1),
        lambda m: hax.named(m(INPUTS), ("row", "number")),
        hax.named(ANY_WEIGHTS, ("row",)),
        lambda: diagonal_inner(1 / VARIANCES),
        ANY_WEIGHTS,
    ),
}


def draws_of(estimate, draws=DRAWS):
    """float64 [draw, coordinate] of estimate(key)."""
    keys = jax.random.split(KEY, draws)
    return np.asarray(jax.jit(jax.vmap(lambda key: flatten(estimate(key))))(keys), np.float64)


def assert_mean(draws, exact, *, precision=0.1):
    errors = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert np.median(errors[exact != 0] / np.abs(exact[exact != 0])) < precision, (
        "the bound is too wide to tell anything"
    )
    assert np.all(np.abs(draws.mean(0) - exact) < 5 * errors + 1e-6), "the mean is off"


def estimate(estimator, function, *args, weights=None):
    """One estimate with `KEY`, compiled as a whole."""
    return eqx.filter_jit(lambda *args: estimator(function, *args, key=KEY, weights=weights))(*args)


def assert_like_the_model(estimate, model=MODEL, dtype="float32"):
    assert jax.tree.structure(estimate) == jax.tree.structure(differentiable(model))
    assert {leaf.dtype for leaf in jax.tree.leaves(estimate)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    ("estimator", "case"),
    [(GaussNewtonBartlett, case) for case in LIKELIHOODS]
    + [
        (GaussNewtonHutchinson, case)
        for case in ("named weights in another order", "padded", "bernoulli", "normal events")
    ],
)
def test_gauss_newton_mean(estimator, case, jacobian):
    likelihood, outputs, weights, inner, position_weights = LIKELIHOODS[case]
    draws = draws_of(lambda key: estimator(likelihood)(outputs, MODEL, key=key, weights=weights))
    exact = gauss_newton_diagonal(jacobian, inner(), position_weights)
    assert_mean(draws, exact)
    assert estimator is GaussNewtonHutchinson or draws.min() >= 0
    assert case != "padded" or (exact[-1] == 0 and not draws[:, -1].any())


@pytest.mark.parametrize("num_probes", [1, 3])
@pytest.mark.parametrize("probe", PROBES)
def test_hutchinson_mean(probe, num_probes, hessian):
    exact = np.diag(hessian)
    assert exact.min() < 0 < exact.max()
    assert_mean(draws_of(lambda key: Hutchinson(probe, num_probes)(loss, MODEL, key=key)), exact)


def test_gauss_newton_hutchinson_with_gaussian_probes(jacobian):
    estimator = GaussNewtonHutchinson(probe="gaussian", num_probes=2)
    draws = draws_of(lambda key: estimator(outputs_fn, MODEL, key=key))
    assert_mean(draws, gauss_newton_diagonal(jacobian, softmax_inner()))


@pytest.mark.parametrize("estimator", [Hutchinson, GaussNewtonHutchinson])
def test_the_variance_is_one_over_the_number_of_probes(estimator):
    function = loss if estimator is Hutchinson else outputs_fn
    one, four = (draws_of(lambda key: estimator(num_probes=n)(function, MODEL, key=key), 4000) for n in (1, 4))  # noqa: B023
    assert 0.22 < four.var(0).sum() / one.var(0).sum() < 0.28


@pytest.mark.parametrize("probe", PROBES)
def test_only_rademacher_is_exact_for_a_diagonal_hessian(probe):
    model = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([[3.0]])}

    def quadratic(m):
        return jnp.sum(m["a"] ** 2) - 3 * jnp.sum(m["b"] ** 2)

    estimate = Hutchinson(probe)(quadratic, model, key=KEY)
    assert (flatten(estimate).tolist() == [2, 2, -6]) == (probe == "rademacher")


def test_hessian_vector_product(hessian):
    vector = jax.random.normal(jax.random.key(2), FLAT.shape)
    product = jax.jit(lambda v: flatten(hessian_vector_product(loss, MODEL, FROM_FLAT(v))))(vector)
    np.testing.assert_allclose(product, hessian @ vector, rtol=1e-4, atol=1e-5)


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


def test_gauss_newton_hutchinson_over_microbatches_is_that_of_the_whole_batch():
    """As S does not depend on the targets, this too is so in every draw."""
    estimator = GaussNewtonHutchinson()
    parts, weights = (jnp.asarray(a.reshape(2, 4, *a.shape[1:])) for a in (INPUTS, ANY_WEIGHTS))
    joined = estimate(estimator, outputs_fn, MODEL, parts, weights=weights)
    whole = estimate(estimator, outputs_fn, MODEL, weights=ANY_WEIGHTS)
    np.testing.assert_allclose(flatten(joined), flatten(whole), rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("estimator", [GaussNewtonBartlett(), GaussNewtonHutchinson()])
def test_a_masked_microbatch_adds_nothing(estimator):
    x, mask = ragged()
    x, mask = jnp.roll(x, 2, axis=0), jnp.roll(mask, 2, axis=0)
    with_it = estimate(estimator, outputs_fn, MODEL, x, weights=mask)
    without = estimate(estimator, outputs_fn, MODEL, x[:3], weights=mask[:3])
    assert not mask[3].any()
    np.testing.assert_allclose(flatten(with_it), flatten(without), rtol=1e-6)


@pytest.mark.parametrize("estimator", [GaussNewtonBartlett(max_grad_norm=1.0), GaussNewtonHutchinson()])
def test_an_estimate_on_no_target_is_not_finite(estimator):
    whole = estimate(estimator, outputs_fn, MODEL, weights=np.zeros(POSITIONS))
    joined = estimate(estimator, outputs_fn, MODEL, jnp.ones((2, 4, 3)), weights=jnp.zeros((2, 4)))
    for h_hat in (whole, joined):
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


def test_a_probe_repeated_from_leaf_to_leaf_is_noticed(hessian):
    u = np.random.default_rng(0).choice([-1.0, 1.0], (DRAWS, 12))
    u = np.concatenate([u, u], axis=1)
    with pytest.raises(AssertionError, match="the mean is off"):
        assert_mean(u * (u @ hessian), np.diag(hessian))


def test_squaring_first_has_less_variance():
    x = jnp.asarray(INPUTS[:, None])
    first, last = (
        draws_of(lambda key: GaussNewtonBartlett(reduction=r)(outputs_fn, MODEL, x, key=key), 4000).var(0).sum()  # noqa: B023
        for r in ("square_then_average", "average_then_square")
    )
    assert first < 0.5 * last


def test_microbatches_are_joined_by_squaring_first_if_not_said_otherwise():
    assert GaussNewtonBartlett().reduction == SophiaG().estimator.reduction == "square_then_average"


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
    estimate = estimator.from_sampled_loss(scaled_loss, {"w": jnp.ones(1)}, parts, key=KEY)
    assert estimate["w"].tolist() == pytest.approx([wanted])


@pytest.mark.parametrize(("max_grad_norm", "wanted"), [(None, [18, 32]), (1, [0.72, 1.28]), (5.1, [18, 32])])
def test_the_gradient_is_clipped_by_its_global_norm(max_grad_norm, wanted):
    estimator = GaussNewtonBartlett(max_grad_norm=max_grad_norm)
    model = {"a": jnp.ones(1), "b": jnp.ones((1, 1))}
    estimate = estimator.from_sampled_loss(lambda m, _: (3 * m["a"][0] + 4 * m["b"][0, 0], 2), model, key=KEY)
    assert flatten(estimate).tolist() == pytest.approx(wanted)


def test_from_sampled_loss_is_the_same():
    estimator = GaussNewtonBartlett()

    def sampled_loss(model, x, key):
        return estimator.sampled_loss(model(x), key=key)

    x = jnp.asarray(INPUTS.reshape(2, 4, 3))
    pairs = [
        (
            estimator(outputs_fn, MODEL, x, key=KEY),
            estimator.from_sampled_loss(sampled_loss, MODEL, x, key=KEY),
        ),
        (
            estimator(outputs_fn, MODEL, key=KEY),
            estimator.from_sampled_loss(lambda m, k: sampled_loss(m, INPUTS, k), MODEL, key=KEY),
        ),
    ]
    for called, made in pairs:
        np.testing.assert_array_equal(flatten(called), flatten(made))


@pytest.mark.parametrize(("optimizer", "function"), [(SophiaG(), outputs_fn), (SophiaH(), loss)])
def test_the_optimizers_estimate_with_their_estimator(optimizer, function):
    estimate = optimizer.estimate(function, MODEL, key=KEY)
    np.testing.assert_array_equal(flatten(estimate), flatten(optimizer.estimator(function, MODEL, key=KEY)))


def test_each_microbatch_has_targets_of_its_own():
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


def square_of_outputs(model, x=INPUTS):
    return jnp.mean(model(x).astype(jnp.float32) ** 2)


ESTIMATORS = [
    (GaussNewtonBartlett(), outputs_fn),
    (GaussNewtonHutchinson(num_probes=2), outputs_fn),
    (Hutchinson(), square_of_outputs),
]


@pytest.mark.parametrize(("estimator", "function"), ESTIMATORS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_estimates_are_at_least_float32(dtype, estimator, function):
    half = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, MODEL)
    x = jnp.asarray(INPUTS.reshape(2, 4, 3), dtype)
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


@pytest.mark.parametrize(
    ("estimator", "function"),
    [
        (Hutchinson(), lambda m, x: jnp.sum(m.astype(jnp.float32) ** 2) / 2 + jnp.sum(x)),
        (GaussNewtonHutchinson(Normal()), lambda m, x: m * x),
        (GaussNewtonBartlett(), None),
    ],
)
def test_sums_over_many_microbatches_do_not_stand_still_in_half_precision(estimator, function):
    """In bfloat16 a sum of 1 / 512 stops growing at 1 / 2, and a sum of 1 at 256."""
    model, microbatches = jnp.ones(1, jnp.bfloat16), jnp.ones((512, 1))
    if function is None:
        estimate = estimator.from_sampled_loss(lambda m, x, key: (jnp.sum(m), 1), model, microbatches, key=KEY)
    else:
        estimate = estimator(function, model, microbatches, key=KEY)
    assert estimate.tolist() == [1.0]


@pytest.mark.parametrize(("estimator", "function"), ESTIMATORS)
def test_vmap_over_keys_changes_nothing(estimator, function):
    keys, x = jax.random.split(KEY, 2), jnp.asarray(INPUTS.reshape(2, 4, 3))
    batched = jax.jit(jax.vmap(lambda key: flatten(estimator(function, MODEL, x, key=key))))(keys)
    one = jax.jit(lambda key: flatten(estimator(function, MODEL, x, key=key)))
    np.testing.assert_allclose(batched, [one(key) for key in keys], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("estimator", "function"), ESTIMATORS)
def test_microbatches_and_weights_may_be_numpy_arrays(estimator, function):
    x = INPUTS.reshape(2, 4, 3)
    weights = {} if isinstance(estimator, Hutchinson) else {"weights": ANY_WEIGHTS.reshape(2, 4)}
    given = estimator(function, MODEL, x, key=KEY, **weights)
    weights = {name: jnp.asarray(array) for name, array in weights.items()}
    np.testing.assert_array_equal(
        flatten(given), flatten(estimator(function, MODEL, jnp.asarray(x), key=KEY, **weights))
    )


@pytest.mark.parametrize("estimator", [GaussNewtonBartlett, GaussNewtonHutchinson, Hutchinson])
def test_integer_and_static_leaves_have_no_curvature(estimator):
    h_hat = estimator()(loss if estimator is Hutchinson else outputs_fn, MODEL, key=KEY)
    assert (h_hat.steps, h_hat.name) == (None, "classifier")
    assert_like_the_model(h_hat)


@pytest.mark.parametrize("estimator", [GaussNewtonBartlett, GaussNewtonHutchinson, Hutchinson])
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
    named = made(functions[0], named_model, named_x, key=KEY, weights=named_weights)
    plain = made(functions[1], {"w": MODEL.inner}, jnp.asarray(x), key=KEY, weights=jnp.asarray(weights))
    assert named["w"].axes == named_model["w"].axes
    np.testing.assert_allclose(named["w"].array, plain["w"], rtol=1e-5)


class HeteroscedasticNormal:
    """A likelihood of a user's own, whose outputs are a pair: mean and log of the variance."""

    def sample(self, outputs, *, key):
        mean, log_variance = outputs
        return mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)

    def loss(self, outputs, targets):
        mean, log_variance = outputs
        return (jnp.square(targets - mean) / jnp.exp(log_variance) + log_variance) / 2


def test_a_likelihood_of_ones_own():
    model = {"mean": jnp.asarray([1.0]), "log_variance": jnp.asarray([-1.0])}

    def outputs(m):
        return m["mean"] * jnp.ones(6), m["log_variance"] * jnp.ones(6)

    draws = draws_of(lambda key: GaussNewtonBartlett(HeteroscedasticNormal())(outputs, model, key=key))
    assert_mean(draws, np.asarray([0.5, np.e]))  # Fisher's information of a normal distribution: 1/2 and 1/variance


doubled = jax.custom_vjp(lambda x: 2 * x)
doubled.defvjp(lambda x: (2 * x, None), lambda _, c: (2 * c,))
squared = jax.custom_vjp(lambda x: x**2)
squared.defvjp(lambda x: (x**2, x), lambda x, c: (doubled(x) * c,))
plainly_squared = jax.custom_vjp(lambda x: x**2)
plainly_squared.defvjp(lambda x: (x**2, x), lambda x, c: (2 * x * c,))
without_jvp = Primitive("without_jvp")
without_jvp.def_impl(lambda x: x)
without_jvp.def_abstract_eval(lambda x: x)


def called_back(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_a_custom_backward_of_ordinary_operations_has_a_forward_derivative():
    estimate = Hutchinson()(lambda w: jnp.sum(plainly_squared(w)), jnp.ones(3), key=KEY)
    assert estimate.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "operation",
    [squared, without_jvp.bind, lambda a: jax.scipy.special.gammainc(a, 2.0), called_back],
    ids=["custom_vjp", "primitive", "incomplete gamma function", "callback"],
)
def test_an_operation_without_forward_derivative_is_refused(operation):
    with pytest.raises(TypeError, match=r"loss_fn has an operation without a forward derivative.* use one that has it"):
        Hutchinson()(lambda w: jnp.sum(operation(w)), jnp.ones(3), key=KEY)


def test_outputs_without_forward_derivative_are_refused():
    with pytest.raises(TypeError, match="outputs_fn has an operation without a forward derivative"):
        GaussNewtonHutchinson()(lambda w: doubled(w), jnp.ones((2, 3)), key=KEY)
    assert GaussNewtonBartlett()(lambda w: doubled(w), jnp.ones((2, 3)), key=KEY).shape == (2, 3)


def test_errors_in_the_loss_itself_are_left_alone():
    def broken(_):
        raise TypeError("something else")

    with pytest.raises(TypeError, match=r"^something else"):
        Hutchinson()(broken, MODEL, key=KEY)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Hutchinson("uniform"), ValueError, "probe is 'uniform'; it must be one of rademacher, gaussian"),
        (lambda: GaussNewtonHutchinson(probe=None), ValueError, "probe is None; it must be one of rademacher"),
        (lambda: draw_probe(KEY, MODEL, "normal"), ValueError, "probe is 'normal'"),
        (lambda: Hutchinson(num_probes=0), ValueError, "num_probes is 0; it must be a whole number of at least 1"),
        (lambda: GaussNewtonHutchinson(num_probes=1.5), ValueError, "num_probes is 1.5"),
        (lambda: GaussNewtonBartlett(reduction="mean"), ValueError, "reduction is 'mean'; it must be one of square_th"),
        (lambda: GaussNewtonBartlett(max_grad_norm=0), ValueError, r"max_grad_norm is 0; it must be in \(0, inf\)"),
        (lambda: GaussNewtonBartlett(max_grad_norm="1"), TypeError, "max_grad_norm is '1'; it must be a number"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("estimator", [GaussNewtonBartlett(), GaussNewtonHutchinson(), Hutchinson()])
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({"count": jnp.int32(1), "text": "text"}, ValueError, "the model has no floating-point array"),
        (
            {"a": jnp.ones(2), "b": [jnp.ones(2, jnp.complex64)]},
            TypeError,
            r"model\['b'\]\[0\] is complex .*real arrays",
        ),
    ],
)
def test_models_that_cannot_be_estimated_are_refused(estimator, model, error, message):
    with pytest.raises(error, match=message):
        estimator(lambda m: jnp.zeros((2, 3)), model, key=KEY)


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 2)])
def test_a_loss_that_is_no_scalar_is_refused(shape):
    message = rf"shape \({', '.join(map(str, shape))},?\).* scalar"
    with pytest.raises(ValueError, match=message):
        Hutchinson()(lambda w: w, jnp.ones(shape), key=KEY)
    with pytest.raises(ValueError, match=message):
        Hutchinson()(lambda w, x: w * x, jnp.ones(shape), jnp.ones(2), key=KEY)
    with pytest.raises(ValueError, match="sampled_loss .*" + message):
        GaussNewtonBartlett().from_sampled_loss(lambda w, key: (w, 1), jnp.ones(shape), key=KEY)


GNB_AND_GNH = [GaussNewtonBartlett(Categorical("class")), GaussNewtonHutchinson(Categorical("class"))]


@pytest.mark.parametrize("estimator", GNB_AND_GNH)
@pytest.mark.parametrize(
    "weights",
    [
        np.ones(7),
        np.ones((8, 3)),
        np.ones((2, 3)),
        hax.named(np.ones(3), ("class",)),
        hax.named(np.ones(3), ("other",)),
        hax.named(np.ones(3), ("row",)),
    ],
)
def test_weights_that_do_not_fit_are_refused(estimator, weights):
    with pytest.raises(ValueError, match="weights"):
        estimator(named_grid, MODEL, key=KEY, weights=weights)


@pytest.mark.parametrize(("estimator", "function"), ESTIMATORS)
def test_weights_of_another_number_of_microbatches_are_refused(estimator, function):
    x = jnp.asarray(INPUTS.reshape(2, 4, 3))
    with pytest.raises(ValueError, match="weights"):
        estimator(function, MODEL, x, key=KEY, weights=jnp.ones((3,)))


def test_weights_of_microbatches_must_be_one_number_each():
    with pytest.raises(ValueError, match=r"weights have shape \(2, 1\)"):
        Hutchinson()(loss, MODEL, jnp.asarray(INPUTS.reshape(2, 4, 3)), key=KEY, weights=jnp.ones((2, 1)))


def test_weights_without_microbatches_mean_nothing_to_hutchinson():
    with pytest.raises(ValueError, match=r"weights .* microbatches"):
        Hutchinson()(loss, MODEL, key=KEY, weights=jnp.ones(POSITIONS))


@pytest.mark.parametrize("estimator", [GaussNewtonBartlett(), GaussNewtonHutchinson()])
def test_a_loss_instead_of_logits_is_refused(estimator):
    with pytest.raises(ValueError, match=r"a categorical likelihood needs logits .* not a loss"):
        estimator(loss, MODEL, key=KEY)
