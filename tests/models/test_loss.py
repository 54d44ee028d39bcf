import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.models.loss import Targets, blocked_cross_entropy

BATCH, POSITIONS, EMBED, VOCAB, PADDED = 2, 7, 4, 100, 128
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(BATCH, POSITIONS, EMBED)).astype(np.float32)
HEAD = RNG.normal(size=(PADDED, EMBED)).astype(np.float32)
HEAD[VOCAB:] *= 50  # were the padding predicted or drawn, it would win
LABELS = RNG.integers(0, VOCAB, (BATCH, POSITIONS)).astype(np.int32)
WEIGHTS = RNG.choice([0, 0.25, 1, 3], (BATCH, POSITIONS)).astype(np.float32)
SAMPLES = RNG.integers(0, VOCAB, (BATCH, POSITIONS)).astype(np.int32)
UNIFORMS = RNG.random((BATCH, POSITIONS), np.float32)
BLOCKS = (7, 10, 3)  # one block, a block of more positions than there are, three blocks whose last is not full
MIX = (0.7, -1.3)


def targets(samples=SAMPLES):
    return Targets(jnp.asarray(LABELS), jnp.asarray(WEIGHTS), None if samples is None else jnp.asarray(samples))


def labels_drawn():
    """By a search of the cumulative sum in float64."""
    logits = np.einsum("bte,ve->btv", HIDDEN, HEAD[:VOCAB]).astype(np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    ends = np.cumsum(weights, -1) / weights.sum(-1, keepdims=True)
    assert np.abs(ends - UNIFORMS[..., None]).min() > 1e-6
    return np.sum(ends <= UNIFORMS[..., None], axis=-1).astype(np.int32)


def plain(hidden, head, samples):
    """Both losses from whole logits."""
    log_p = jax.nn.log_softmax(jnp.einsum("bte,ve->btv", hidden, head[:VOCAB]), axis=-1)

    def loss(labels, weights):
        return -jnp.sum(jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0] * weights)

    return loss(LABELS, WEIGHTS), loss(samples, np.sqrt(WEIGHTS))


def mixed(losses):
    return MIX[0] * losses[0] + MIX[1] * losses[1]


def blocked(block_size, samples=SAMPLES):
    return lambda hidden, head: blocked_cross_entropy(VOCAB, block_size, hidden, head, targets(samples))


@pytest.fixture(scope="module")
def wanted():
    """Losses, and the gradients of each."""
    losses = jax.jit(plain)(HIDDEN, HEAD, SAMPLES)
    return losses, jax.jit(jax.jacrev(plain, (0, 1)))(HIDDEN, HEAD, SAMPLES)


@pytest.mark.parametrize("block_size", BLOCKS)
def test_values_and_gradients(block_size, wanted):
    losses, pull = jax.vjp(jax.jit(blocked(block_size)), HIDDEN, HEAD)
    np.testing.assert_allclose(losses, wanted[0], rtol=1e-5)
    for i, cotangents in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        hidden, head = pull(tuple(jnp.float32(c) for c in cotangents))
        np.testing.assert_allclose(hidden, wanted[1][i][0], atol=2e-5)
        np.testing.assert_allclose(head, wanted[1][i][1], atol=2e-5)
        assert not np.asarray(head[VOCAB:]).any()
    hidden, head = pull(tuple(jnp.float32(c) for c in MIX))
    np.testing.assert_allclose(hidden, MIX[0] * wanted[1][0][0] + MIX[1] * wanted[1][1][0], atol=5e-5)
    np.testing.assert_allclose(head, MIX[0] * wanted[1][0][1] + MIX[1] * wanted[1][1][1], atol=5e-5)


def test_values_without_a_gradient(wanted):
    np.testing.assert_allclose(jax.jit(blocked(3))(HIDDEN, HEAD), wanted[0], rtol=1e-5)


def test_labels_drawn_from_uniforms():
    with_uniforms = jax.jit(jax.value_and_grad(lambda *x: blocked(3, UNIFORMS)(*x)[1], (0, 1)))
    drawn = labels_drawn()
    loss, grads = with_uniforms(HIDDEN, HEAD)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(lambda *x: plain(*x, drawn)[1], (0, 1)))(HIDDEN, HEAD)
    assert drawn.max() < VOCAB
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_without_samples_the_second_loss_is_zero(wanted):
    (first, second), pull = jax.vjp(jax.jit(blocked(3, None)), HIDDEN, HEAD)
    assert float(first) == pytest.approx(float(wanted[0][0]), rel=1e-5)
    assert second == 0
    hidden, head = pull((jnp.float32(1), jnp.float32(5)))
    np.testing.assert_allclose(hidden, wanted[1][0][0], atol=2e-5)
    np.testing.assert_allclose(head, wanted[1][0][1], atol=2e-5)


def test_positions_of_weight_zero_have_no_gradient():
    hidden = jax.jit(jax.grad(lambda h: mixed(blocked(3)(h, HEAD))))(HIDDEN)
    assert (WEIGHTS == 0).any()
    assert not np.asarray(hidden)[WEIGHTS == 0].any()
    assert np.asarray(hidden)[WEIGHTS > 0].any(axis=-1).all()


def test_bfloat16(wanted):
    hidden, head = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(HEAD, jnp.bfloat16)
    losses, pull = jax.vjp(jax.jit(blocked(3, UNIFORMS)), hidden, head)
    assert {loss.dtype for loss in losses} == {jnp.dtype("float32")}
    assert float(losses[0]) == pytest.approx(float(wanted[0][0]), rel=0.02)
    grads = pull((jnp.float32(1), jnp.float32(0)))
    assert {grad.dtype for grad in grads} == {jnp.dtype("bfloat16")}
    for ours, theirs in zip(grads, wanted[1][0], strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.15)
    _, sampled = pull((jnp.float32(0), jnp.float32(1)))
    for head_grad in (grads[1], sampled):
        assert not np.asarray(head_grad[VOCAB:], np.float32).any()
        assert np.asarray(head_grad[:VOCAB], np.float32).any()


def test_the_head_is_summed_over_blocks_in_float32():
    """A bfloat16 sum of 1,024 equal parts would stall at 256 of them."""
    positions = 1024
    hidden = jnp.ones((1, positions, 1), jnp.bfloat16)
    head = jnp.zeros((2, 1), jnp.bfloat16)
    given = Targets(jnp.zeros((1, positions), jnp.int32), jnp.ones((1, positions)), None)
    grad = jax.jit(jax.grad(lambda head: blocked_cross_entropy(2, 1, hidden, head, given)[0]))(head)
    np.testing.assert_array_equal(np.asarray(grad, np.float32), [[-512], [512]])


def test_hessian_vector_product():
    """Forward over reverse, as Hutchinson's estimator needs it."""
    rng = np.random.default_rng(1)
    vector = tuple(rng.normal(size=x.shape).astype(np.float32) for x in (HIDDEN, HEAD))

    def product(losses):
        grad = jax.grad(lambda *x: mixed(losses(*x)), (0, 1))
        return jax.jit(lambda v: jax.jvp(grad, (HIDDEN, HEAD), v)[1])(vector)

    ours, theirs = product(blocked(3)), product(lambda *x: plain(*x, SAMPLES))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4, rtol=1e-4)
    assert not np.asarray(ours[1][VOCAB:]).any()
    assert np.abs(theirs[0]).max() > 1


def test_float64():
    with jax.enable_x64(True):
        hidden, head = jnp.asarray(HIDDEN, jnp.float64), jnp.asarray(HEAD, jnp.float64)
        losses = jax.jit(blocked(3))(hidden, head)
        wanted = jax.jit(plain)(hidden, head, SAMPLES)
        assert losses[0].dtype == jnp.float64
        np.testing.assert_allclose(losses, wanted, rtol=1e-12)
