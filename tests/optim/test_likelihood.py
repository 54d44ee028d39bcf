"""Likelihoods' losses against other implementations; test_estimator_means.py has their samples and curvature."""

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

from sophia_levanter.optim import Bernoulli, Categorical, Normal

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(scale=2, size=(2, 4, 3)).astype(np.float32)
LABELS = RNG.integers(0, 3, (2, 4))
NUMBERS = RNG.normal(scale=2, size=LOGITS.shape).astype(np.float32)
YES = RNG.integers(0, 2, LOGITS.shape)
VARIANCES = np.asarray([0.25, 1, 4], np.float32)
NAMES = ("batch", "position", "class")


def cross_entropy(logits=LOGITS):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)


def in_order(array, names, wanted):
    """A NamedArray of `names` with its axes in another order."""
    return hax.named(jnp.asarray(array), names).rearrange(wanted)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_categorical_loss_over_any_position_of_the_classes(axis):
    losses = Categorical(axis).loss(np.moveaxis(LOGITS, -1, axis), LABELS)
    np.testing.assert_allclose(losses, cross_entropy(), rtol=1e-5)


@pytest.mark.parametrize("axis", ["class", 1, -2])
@pytest.mark.parametrize("targets", [("position", "batch"), ("batch", "position"), None])
def test_categorical_loss_of_named_logits(axis, targets):
    logits = in_order(LOGITS, NAMES, ("position", "class", "batch"))
    labels = LABELS.T if targets is None else in_order(LABELS, NAMES[:2], targets)
    losses = Categorical(axis).loss(logits, labels)
    np.testing.assert_allclose(losses, cross_entropy().T, rtol=1e-5)
    assert [a.name for a in Categorical(axis).target_axes(logits)] == ["position", "batch"]


def test_padded_classes_are_left_out():
    padded = np.concatenate([LOGITS, np.full((2, 4, 5), 9, np.float32)], axis=-1)
    np.testing.assert_allclose(Categorical(num_classes=3).loss(padded, LABELS), cross_entropy(), rtol=1e-5)
    first = Categorical(0, num_classes=3).loss(np.moveaxis(padded, -1, 0), LABELS)
    np.testing.assert_allclose(first, cross_entropy(), rtol=1e-5)
    drawn = Categorical(num_classes=3).sample(np.broadcast_to(padded, (500, *padded.shape)), key=KEY)
    assert np.unique(drawn).tolist() == [0, 1, 2]
    gradient = jax.grad(lambda x: jnp.sum(Categorical(num_classes=3).loss(x, LABELS)))(padded)
    np.testing.assert_array_equal(gradient[..., 3:], 0)
    assert np.isfinite(gradient).all()


def test_bernoulli_loss():
    losses = Bernoulli().loss(LOGITS, YES)
    np.testing.assert_allclose(
        losses, -scipy.stats.bernoulli.logpmf(YES, scipy.special.expit(LOGITS.astype(np.float64))), rtol=1e-5
    )
    soft = np.full_like(LOGITS, 0.3)
    np.testing.assert_allclose(
        Bernoulli().loss(LOGITS, soft), optax.sigmoid_binary_cross_entropy(LOGITS, soft), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(Bernoulli().loss(LOGITS, YES.astype(bool)), losses)


def test_bernoulli_loss_of_extreme_logits():
    logits, yes = jnp.asarray([1e4, -1e4, 1e4, -1e4]), jnp.asarray([1, 0, 0, 1])
    value, pull = jax.vjp(lambda x: Bernoulli().loss(x, yes), logits)
    assert value.tolist() == [0, 0, 1e4, 1e4]
    assert pull(jnp.ones(4))[0].tolist() == [0, 0, 1, -1]


@pytest.mark.parametrize(
    ("likelihood", "variance"),
    [(Normal(), 1.0), (Normal(3), 3), (Normal(VARIANCES), VARIANCES), (Normal(jnp.float32(2)), 2)],
)
def test_normal_loss(likelihood, variance):
    wanted = -scipy.stats.norm.logpdf(NUMBERS, LOGITS, np.sqrt(variance))
    np.testing.assert_allclose(likelihood.loss(LOGITS, NUMBERS), wanted, rtol=1e-5)


@pytest.mark.parametrize("event_ndim", [1, 2, 3])
@pytest.mark.parametrize("likelihood", [Bernoulli, Normal])
def test_event_axes_are_summed(likelihood, event_ndim):
    single, summed = likelihood(), likelihood(event_ndim=event_ndim)
    wanted = np.sum(single.loss(LOGITS, YES), axis=tuple(range(3 - event_ndim, 3)))
    np.testing.assert_allclose(summed.loss(LOGITS, YES), wanted, rtol=1e-6)
    np.testing.assert_array_equal(summed.sample(LOGITS, key=KEY), single.sample(LOGITS, key=KEY))
    axes = summed.target_axes(hax.named(LOGITS, NAMES))
    assert [axis.name for axis in axes] == list(NAMES[: 3 - event_ndim])


@pytest.mark.parametrize("likelihood", [Bernoulli(), Normal(), Normal(2.0, event_ndim=1)])
def test_named_targets_are_brought_into_the_order_of_the_outputs(likelihood):
    outputs = hax.named(LOGITS, NAMES)
    targets = in_order(YES, NAMES, ("class", "batch", "position"))
    np.testing.assert_array_equal(likelihood.loss(outputs, targets), likelihood.loss(LOGITS, YES))
    np.testing.assert_array_equal(likelihood.loss(outputs, YES), likelihood.loss(LOGITS, YES))


def test_normal_draws_from_the_normal_distribution_independently():
    drawn = np.asarray(Normal(VARIANCES).sample(np.broadcast_to(LOGITS, (5000, *LOGITS.shape)), key=KEY))
    assert drawn.dtype == np.float32
    standard = ((drawn - LOGITS) / np.sqrt(VARIANCES)).reshape(len(drawn), -1)
    assert min(scipy.stats.kstest(column, "norm").pvalue for column in standard.T) > 1e-4
    correlations = np.corrcoef(standard, rowvar=False)
    assert np.abs(correlations - np.eye(24)).max() < 5 / np.sqrt(len(drawn))


@pytest.mark.parametrize(
    ("likelihood", "targets"), [(Categorical(), LABELS), (Bernoulli(), YES), (Normal(VARIANCES), NUMBERS)]
)
def test_half_precision_outputs_are_scored_and_drawn_in_float32(likelihood, targets):
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    single = jnp.asarray(half, jnp.float32)
    losses = likelihood.loss(half, targets)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, likelihood.loss(single, targets))
    drawn = likelihood.sample(half, key=KEY)
    assert drawn.dtype == likelihood.sample(single, key=KEY).dtype
    np.testing.assert_array_equal(drawn, likelihood.sample(single, key=KEY))


@pytest.mark.parametrize(
    ("likelihood", "targets"), [(Categorical(), LABELS), (Bernoulli(), YES), (Normal(0.1), NUMBERS)]
)
def test_float64_outputs_are_scored_in_float64(likelihood, targets):
    with jax.enable_x64(True):
        shift = 1e-12
        low, high = (likelihood.loss(jnp.asarray(LOGITS, jnp.float64) + s * VARIANCES, targets) for s in (0, shift))
        assert low.dtype == jnp.float64
        assert 0 < np.abs(high - low).max() < 1e-9


def test_variance_may_be_traced():
    losses = jax.vmap(lambda v: Normal(v).loss(LOGITS[0, 0], NUMBERS[0, 0]))(VARIANCES)
    wanted = [Normal(float(v)).loss(LOGITS[0, 0], NUMBERS[0, 0]) for v in VARIANCES]
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)
    assert jax.jit(lambda normal: normal.loss(LOGITS, NUMBERS))(Normal(jnp.float32(2))).shape == LOGITS.shape


def named(array=LOGITS, names=NAMES):
    return hax.named(jnp.asarray(array), names)


@pytest.mark.parametrize(
    ("outputs", "axis", "message"),
    [
        (LOGITS, 3, r"shape \(2, 4, 3\) and no class axis 3;"),
        (jnp.float32(0.5), -1, r"shape \(\) and no class axis -1; .* not a loss"),
        (LOGITS, "class", "class axis is 'class', but the logits have no named axes; specify its position"),
        (named(), "vocab", "the logits have no axis 'vocab'; their axes are batch, position, class"),
        (named(), 3, "the logits have no axis 3; their axes are batch, position, class"),
        (named(np.float32(0), ()), -1, "the logits have no axis -1; their axes are none"),
    ],
)
def test_logits_without_the_class_axis_are_refused(outputs, axis, message):
    with pytest.raises(ValueError, match=message):
        Categorical(axis).sample(outputs, key=KEY)
    with pytest.raises(ValueError, match=message):
        Categorical(axis).loss(outputs, LABELS)


@pytest.mark.parametrize("axis", [None, 1.0, True, ("class",)])
def test_an_axis_that_is_not_a_position_or_name_is_refused(axis):
    with pytest.raises(TypeError, match=r"axis is .*; it must be the position or name of the class axis"):
        Categorical(axis)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True])
def test_num_classes_that_is_not_a_count_is_refused(num_classes):
    with pytest.raises(ValueError, match=r"num_classes is .*; it must be an integer of at least 1"):
        Categorical(num_classes=num_classes)


@pytest.mark.parametrize(("outputs", "axis"), [(LOGITS, 1), (named(), "position")])
def test_more_classes_than_logits_are_refused(outputs, axis):
    with pytest.raises(ValueError, match=f"num_classes is 5, but the logits have 4 on axis {axis!r}"):
        Categorical(axis, num_classes=5).sample(outputs, key=KEY)


@pytest.mark.parametrize(("likelihood", "targets"), [(Categorical(), LABELS), (Bernoulli(), YES), (Normal(), NUMBERS)])
@pytest.mark.parametrize("dtype", [np.int32, bool, np.complex64])
def test_outputs_that_are_not_real_numbers_are_refused(likelihood, targets, dtype):
    outputs = LOGITS.astype(dtype)
    with pytest.raises(TypeError, match=f"have dtype {np.dtype(dtype)}; a likelihood requires floating-point numbers"):
        likelihood.sample(outputs, key=KEY)
    with pytest.raises(TypeError, match=f"have dtype {np.dtype(dtype)}; a likelihood requires floating-point numbers"):
        likelihood.loss(outputs, targets)


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_classes_must_be_integers(dtype):
    with pytest.raises(TypeError, match=f"targets .* have dtype {np.dtype(dtype)}; they must be integer classes"):
        Categorical().loss(LOGITS, LABELS.astype(dtype))


@pytest.mark.parametrize(
    ("likelihood", "targets"),
    [
        (Categorical(), LABELS[..., None]),
        (Categorical(0), LABELS),
        (Bernoulli(event_ndim=1), YES[..., 0]),
        (Normal(), NUMBERS[..., None]),
    ],
)
def test_targets_are_not_broadcast(likelihood, targets):
    message = rf"the targets have shape \({', '.join(map(str, targets.shape))},?\); these outputs require shape"
    with pytest.raises(ValueError, match=message):
        likelihood.loss(LOGITS, targets)


@pytest.mark.parametrize(
    ("likelihood", "targets"),
    [(Categorical("class"), named(LABELS, ("batch", "time"))), (Normal(), named(NUMBERS, ("batch", "time", "class")))],
)
def test_named_targets_with_other_axes_are_refused(likelihood, targets):
    with pytest.raises(ValueError, match="targets"):
        likelihood.loss(named(), targets)


@pytest.mark.parametrize(
    ("variance", "error", "message"),
    [
        (0, ValueError, r"in \(0, inf\)"),
        (np.inf, ValueError, r"in \(0, inf\)"),
        ("1", TypeError, "a number"),
    ],
)
def test_variance_must_be_a_positive_number(variance, error, message):
    with pytest.raises(error, match=rf"variance is .*; it must be {message}"):
        Normal(variance)


@pytest.mark.parametrize("variance", [np.ones((2, 3), np.float32), np.ones((5, 1, 1, 3), np.float32)])
def test_variance_must_broadcast_to_the_outputs(variance):
    for use in (lambda n: n.loss(LOGITS, NUMBERS), lambda n: n.sample(LOGITS, key=KEY)):
        with pytest.raises(ValueError, match=r"variance has shape .* outputs"):
            use(Normal(variance))


@pytest.mark.parametrize("likelihood", [Bernoulli, Normal])
def test_event_ndim_is_checked(likelihood):
    for event_ndim in (-1, 1.0, True):
        with pytest.raises(ValueError, match=r"event_ndim is .*; it must be an integer of at least 0"):
            likelihood(event_ndim=event_ndim)
    with pytest.raises(ValueError, match=r"shape \(2, 4, 3\), which has fewer axes than event_ndim=4"):
        likelihood(event_ndim=4).loss(LOGITS, YES)
