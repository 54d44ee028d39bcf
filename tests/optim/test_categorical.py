"""Drawing classes by the inverse of the cumulative distribution, and scoring them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.optim._categorical import _first_above, categorical_loss, sample_categorical

SIZES = (2, 128, 129, 300, 1000)
ROWS = 4096  # in most tests, so that one compilation a size will do
LARGEST = np.nextafter(np.float32(1), np.float32(0))
sample = jax.jit(sample_categorical)
score = jax.jit(categorical_loss)


def normal(shape, scale=2.0, seed=0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def distribution(logits):
    """Cumulative probabilities in float64, where no rounding matters."""
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.cumsum(weights, axis=-1) / weights.sum(-1, keepdims=True)


def with_impossible_classes(classes):
    """Logits where half of the classes and all beyond a random one cannot be drawn, and whether each can."""
    rng = np.random.default_rng(classes)
    possible = rng.random((ROWS, classes)) < 0.5
    possible &= np.arange(classes) < rng.integers(1, classes + 1, size=(ROWS, 1))
    possible[~possible.any(-1), classes // 2] = True
    return np.where(possible, normal((ROWS, classes), seed=classes), -np.inf).astype(np.float32), possible


def drawn(possible, labels):
    return np.take_along_axis(possible, np.asarray(labels)[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("classes", SIZES)
def test_agrees_with_a_search_of_the_cumulative_sum(classes):
    logits = normal((ROWS, classes), seed=1)
    uniforms = np.random.default_rng(2).random(ROWS, np.float32)
    ends = distribution(logits)
    wanted = np.sum(ends <= uniforms[:, None], axis=-1)
    clear = np.min(np.abs(ends - uniforms[:, None]), axis=-1) > 2e-6
    labels = np.asarray(sample(logits, uniforms))
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(labels[clear], wanted[clear])


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("uniform", [0.0, LARGEST])
def test_ends_of_the_unit_interval(classes, uniform):
    logits, possible = with_impossible_classes(classes)
    labels = np.asarray(sample(logits, np.full(ROWS, uniform, np.float32)))
    first, last = possible.argmax(-1), classes - 1 - possible[:, ::-1].argmax(-1)
    if uniform == 0:
        np.testing.assert_array_equal(labels, first)
    else:
        # A last class of less than the last uniform's share may be passed over.
        assert drawn(possible, labels).all()
        share = np.take_along_axis(np.exp(logits), last[:, None], -1)[:, 0] / np.exp(logits).sum(-1)
        np.testing.assert_array_equal(labels[share > 1e-4], last[share > 1e-4])


@pytest.mark.parametrize("classes", SIZES)
def test_impossible_classes_are_never_drawn(classes):
    logits, possible = with_impossible_classes(classes)
    ends = distribution(logits)
    rng = np.random.default_rng(0)
    rows = np.arange(ROWS)
    for first in (0, 128, 256):
        # Where a class ends rounding decides between its neighbours, and most of all at the edge of a block of 128.
        near = np.clip(first + rng.integers(-6, 7, ROWS), 0, classes - 1)
        at = ends[rows, near].astype(np.float32)
        uniforms = np.clip(at + rng.integers(-2, 3, ROWS) * np.spacing(at), 0, LARGEST).astype(np.float32)
        assert drawn(possible, sample(logits, uniforms)).all()


@pytest.mark.parametrize(
    ("logits", "label"),
    [
        ([3e38, -3e38], 0),
        ([-np.inf] * 200 + [5.0] + [-np.inf] * 200, 200),
        ([-200.0] * 299 + [0.0], 299),
    ],
)
def test_extreme_logits(logits, label):
    uniforms = np.asarray([0, 0.25, 0.5, LARGEST], np.float32)
    labels = sample(np.broadcast_to(np.asarray(logits, np.float32), (4, len(logits))), uniforms)
    assert labels.tolist() == [label] * 4


def test_shift_of_all_logits_changes_nothing():
    logits, uniforms = np.full((4, 6), -5e4, np.float32), np.asarray([0.1, 0.3, 0.6, 0.9], np.float32)
    assert sample(logits, uniforms).tolist() == [0, 1, 3, 5]


@pytest.mark.parametrize(
    ("ends", "target", "label"),
    [
        ([0.0, 1.0, 1.0, 3.0, 3.0], -1e-7, 1),
        ([0.0, 1.0, 1.1, 3.0, 3.0], 1.0, 3),
        ([0.0, 1.0, 0.9, 3.0, 3.0], 0.95, 1),
        ([0.0, 1.0, 1.0, 3.0, 3.1], 3.0, 3),
        ([0.0, 1.0, 1.0, 3.0, 3.0], 3.2, 3),
    ],
    ids=["target below 0", "sum rises", "sum dips", "sum rises at the end", "target above the sum"],
)
def test_rounding_in_the_search_leads_to_no_impossible_class(ends, target, label):
    weights = np.asarray([0, 1, 0, 2, 0], np.float32)
    assert jax.jit(_first_above)(weights, np.asarray(ends, np.float32), np.float32(target)) == label


def test_shapes_and_dtypes():
    logits = jnp.asarray(normal((2, 64, 300)), jnp.bfloat16)
    uniforms = np.random.default_rng(0).random((2, 64), np.float32)
    labels = sample(logits, uniforms)
    assert (labels.shape, labels.dtype) == ((2, 64), jnp.int32)
    np.testing.assert_array_equal(labels, sample(np.asarray(logits, np.float32), uniforms))
    assert sample(np.asarray([0, 9], np.float32), np.float32(0.5)) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loss(dtype):
    logits = jnp.asarray(normal((2, 3, 5)), dtype)
    labels = np.asarray([[0, 1, 2], [3, 4, 0]])
    losses = score(logits, labels)
    probabilities = np.diff(distribution(logits), prepend=0)
    wanted = -np.log(np.take_along_axis(probabilities, labels[..., None], -1)[..., 0])
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, wanted, rtol=2e-6)


def test_loss_keeps_float64():
    with jax.enable_x64(True):
        loss = score(jnp.asarray([1e4, 1e4 + 1e-9]), jnp.asarray(0))
        assert loss.dtype == jnp.float64
        assert abs(float(loss) - np.log(2) - 0.5e-9) < 2e-12


def test_loss_of_an_impossible_class_is_left_out_of_the_rest():
    assert score(jnp.asarray([0.0, 0.0, -jnp.inf]), jnp.asarray(1)) == pytest.approx(np.log(2))
