from contextlib import nullcontext
from functools import partial

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.models import attention
from sophia_levanter.models.attention import blocked_attention, causal_attention, forward_differentiable
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.planning.collectives import collective_bytes

AXES = hax.make_axes(batch=2, position=5, heads=3, head_size=4)
RATE = 0.4
random_key = partial(jax.random.key, impl="unsafe_rbg")  # compiles in no time, as the default does not


ARRAYS = np.random.default_rng(0).normal(size=(3, 2, 5, 3, 4)).astype(np.float32)


def inputs(dtype=jnp.float32):
    return [hax.named(jnp.asarray(array, dtype), AXES) for array in ARRAYS]


def by_hand(starts=((0,) * 5,) * 2):
    q, k, v = ARRAYS.astype(np.float64)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    seen = np.arange(5) >= np.array(starts)[:, None, :, None]
    weights = np.exp(scores) * np.tril(np.ones((5, 5))) * seen
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


attend = jax.jit(causal_attention, static_argnames=("dropout", "implementation"))


def test_is_scaled_causal_softmax_attention():
    attended = attend(*inputs())
    assert attended.axes == AXES
    np.testing.assert_allclose(attended.array, by_hand(), atol=1e-6)


def test_axes_in_any_order_and_any_number_of_batch_axes():
    query, key, value = inputs()
    mixed = attend(query.rearrange(("heads", "position", "head_size", "batch")), key, value)
    np.testing.assert_allclose(mixed.rearrange(AXES).array, by_hand(), atol=1e-6)
    one = attend(*(x["batch", 1] for x in inputs()))
    assert one.axes == AXES[1:]
    np.testing.assert_allclose(one.array, by_hand()[1], atol=1e-6)
    more = attend(*(x.broadcast_axis(hax.Axis("microbatch", 2)) for x in inputs()))
    assert [axis.name for axis in more.axes] == ["microbatch", "batch", "position", "heads", "head_size"]
    np.testing.assert_allclose(more["microbatch", 1].array, by_hand(), atol=1e-6)


def test_keeps_the_dtype():
    attended = attend(*inputs(jnp.bfloat16))
    assert attended.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(attended.array, np.float32), by_hand(), atol=0.05)


def test_dropout_needs_a_rate_and_a_key():
    for options in ({"dropout": RATE}, {"dropout_key": random_key(0)}):
        np.testing.assert_array_equal(attend(*inputs(), **options).array, attend(*inputs()).array)


def test_dropout_of_next_to_nothing_is_no_dropout():
    options = {"dropout": 1e-9, "dropout_key": random_key(0)}
    np.testing.assert_allclose(attend(*inputs(), **options).array, by_hand(), atol=1e-6)
    half = jax.eval_shape(lambda *x: causal_attention(*x, **options), *inputs(jnp.bfloat16))
    assert (half.axes, half.dtype) == (AXES, jnp.bfloat16)


def test_dropout_keeps_the_mean_and_causality():
    draws = 2000
    query, key, value = inputs()

    def one(dropout_key, value):
        return attend(query, key, hax.named(value, AXES), dropout=RATE, dropout_key=dropout_key).array

    many = jax.jit(jax.vmap(one, (0, None)))
    keys = jax.random.split(random_key(2), draws)
    attended = np.asarray(many(keys, value.array))
    errors = attended.std(0, ddof=1) / np.sqrt(draws)
    assert np.all(np.abs(attended.mean(0) - by_hand()) < 5 * errors)
    # The first position sees itself alone: kept and scaled up, or dropped.
    first = attended[:, :, 0]
    kept = np.isclose(first, ARRAYS[2][:, 0] / (1 - RATE), rtol=1e-5)
    assert np.all(kept | (first == 0))
    assert abs(kept.mean() - (1 - RATE)) < 0.03
    changed = np.asarray(many(keys, value.array.at[:, 3:].add(10.0)))
    np.testing.assert_array_equal(changed[:, :, :3], attended[:, :, :3])
    assert np.any(changed[:, :, 3:] != attended[:, :, 3:])


STARTS = ((0, 0, 2, 2, 2), (0, 1, 1, 1, 4))


@pytest.mark.parametrize("kind", ["xla", "blocked", "dropout"])
def test_a_position_sees_nothing_before_its_document(kind):
    options = {"dropout": 1e-9, "dropout_key": random_key(0)} if kind == "dropout" else {"implementation": kind}
    query, key, value = inputs()
    starts = hax.named(jnp.array(STARTS), ("batch", "position"))
    attended = attend(query, key, value, document_starts=starts, **options)
    np.testing.assert_allclose(attended.array, by_hand(STARTS), atol=1e-6)
    one = attend(*(x["batch", 1] for x in (query, key, value)), document_starts=starts["batch", 1], **options)
    np.testing.assert_allclose(one.array, by_hand(STARTS)[1], atol=1e-6)


MESHES = [MeshConfig(data=2, model=4), MeshConfig(heads=None)]
# A row and a head for each device; 128 positions are two blocks, and the fewest that splash takes.
WIDE = hax.make_axes(batch=8, position=128, heads=4, head_size=16)
WIDE_ARRAYS = np.random.default_rng(1).normal(size=(3, 8, 128, 4, 16)).astype(np.float32)


def wide_loss(*qkv, implementation="xla"):
    named = hax.auto_sharded(tuple(hax.named(x, WIDE) for x in qkv))
    return (hax.auto_sharded(causal_attention(*named, implementation=implementation)).array ** 2).sum()


@pytest.fixture(scope="module")
def wanted():
    """The loss and its gradients on one device."""
    return jax.jit(jax.value_and_grad(wide_loss, argnums=(0, 1, 2)))(*WIDE_ARRAYS)


@pytest.mark.parametrize("mesh", MESHES)
def test_blocked_attention_on_a_mesh_needs_no_communication(mesh, wanted):
    def gradients(*qkv):
        found = jax.grad(partial(wide_loss, implementation="blocked"), argnums=(0, 1, 2))(*qkv)
        return hax.auto_sharded([hax.named(g, WIDE) for g in found])

    with partition_of(mesh).active():
        compiled = jax.jit(gradients).lower(*WIDE_ARRAYS).compile()
        assert not collective_bytes(compiled.as_text())
        for ours, theirs in zip(compiled(*WIDE_ARRAYS), wanted[1], strict=True):
            np.testing.assert_allclose(ours.array, theirs, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, MESHES[1]])
def test_splash_is_the_same(mesh, wanted, monkeypatch):
    """TPU's kernel, interpreted, and its gradients; on a mesh each device has its own rows and heads."""
    monkeypatch.setattr(attention, "_splash", partial(attention._splash, interpret=True))
    monkeypatch.setattr(attention, "_chosen", lambda *_: "splash")
    # A new function: `wide_loss` itself was traced with the other attention.
    compiled = jax.jit(jax.value_and_grad(lambda *qkv: wide_loss(*qkv), argnums=(0, 1, 2)))
    with nullcontext() if mesh is None else partition_of(mesh).active():
        found, gradients = compiled(*WIDE_ARRAYS)
    np.testing.assert_allclose(found, wanted[0], rtol=1e-5)
    for ours, theirs in zip(gradients, wanted[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_splash_takes_a_single_row_on_a_mesh(mesh, monkeypatch):
    """Sampling fills its cache from one row of tokens, which has no batch axis."""
    monkeypatch.setattr(attention, "_splash", partial(attention._splash, interpret=True))
    monkeypatch.setattr(attention, "_chosen", lambda wanted, *_: wanted)
    one = [hax.named(x[0], WIDE[1:]) for x in WIDE_ARRAYS]
    starts = hax.named(np.arange(128, dtype=np.int32) // 50 * 50, WIDE[1])
    wanted = attend(*one, document_starts=starts)
    with partition_of(mesh).active():
        found = attend(*one, implementation="splash", document_starts=starts)
    np.testing.assert_allclose(found.array, wanted.array, atol=1e-5)


@pytest.mark.parametrize("implementation", ["splash", "blocked"])
def test_documents_on_a_mesh_are_those_of_xla_on_one_device(implementation, monkeypatch):
    """Documents of any length, which begin inside of blocks; TPU's kernel is interpreted."""
    monkeypatch.setattr(attention, "_splash", partial(attention._splash, interpret=True))
    monkeypatch.setattr(attention, "_chosen", lambda wanted, *_: wanted)
    begins = np.random.default_rng(2).random((8, 128)) < 0.03
    starts = np.maximum.accumulate(np.where(begins, np.arange(128, dtype=np.int32), 0), axis=1)

    def loss(qkv, implementation):
        *named, at = hax.auto_sharded((*(hax.named(x, WIDE) for x in qkv), hax.named(starts, WIDE[:2])))
        return (causal_attention(*named, implementation=implementation, document_starts=at).array ** 2).sum()

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    wanted = both(tuple(WIDE_ARRAYS), "xla")
    with partition_of(MESHES[0]).active():
        found = both(tuple(WIDE_ARRAYS), implementation)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def value_and_gradient(implementation, arrays, starts=None):
    """Of the sum of squares of the attended values."""
    axes = hax.make_axes(**dict(zip(("batch", "position", "heads", "head_size"), arrays[0].shape, strict=True)))

    def loss(qkv):
        named = [hax.named(x, axes) for x in qkv]
        at = None if starts is None else hax.named(starts, axes[:2])
        attended = causal_attention(*named, implementation=implementation, document_starts=at)
        return (attended.array.astype(jnp.float32) ** 2).sum()

    return jax.value_and_grad(loss)(arrays)


def value_gradient_and_hessian_product(implementation, arrays, tangents, starts=None):
    """The second derivative is forward over reverse."""
    return jax.jvp(partial(value_and_gradient, implementation, starts=starts), (arrays,), (tangents,))


gradient_of = jax.jit(lambda *given: value_and_gradient(*given)[1], static_argnums=0)


@pytest.mark.parametrize(
    ("positions", "documents"),
    [(1, 0), (10, 0), (14, 4)],
)
def test_blocked_attention_is_the_same_for_any_number_of_positions(positions, documents, monkeypatch):
    """14 positions are 3 blocks, of 5, 5 and 4; 10 are two blocks of 4 and one of 2."""
    monkeypatch.setattr(attention, "BLOCK_SIZE", 4)
    monkeypatch.setattr(attention, "MOST_BLOCKS", 3)
    rng = np.random.default_rng(positions)
    arrays, tangents = rng.normal(size=(2, 3, 2, positions, 2, 4)).astype(np.float32)
    both = jax.jit(value_gradient_and_hessian_product, static_argnums=0)
    # Documents of four positions in one row, and one alone in the other.
    starts = np.stack([np.arange(positions) // 4 * 4, np.zeros(positions, int)]) if documents else None
    wanted, found = (both(name, tuple(arrays), tuple(tangents), starts) for name in ("xla", "blocked"))
    for theirs, ours in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5 * np.abs(theirs).max())


def test_blocked_attention_computes_no_block_above_the_diagonal():
    shape = jax.ShapeDtypeStruct((1, 1, 512, 4), jnp.float32)
    cost = jax.jit(blocked_attention).lower(shape, shape, shape).compile().cost_analysis()["flops"]
    assert cost < 0.7 * 2 * 2 * 512 * 512 * 4 + 12 * 512 * 512 * 0.6  # two products and some operations a weight


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_blocked_attention_in_bfloat16_is_as_near_the_truth(size):
    """At a size of 300 scores are of 1e5, weights 0 or 1, and the gradients of queries and keys 0."""
    rng = np.random.default_rng(0)
    exact = tuple(size * rng.normal(size=(3, 2, 100, 2, 16)).astype(np.float32))
    truth = gradient_of("xla", exact)
    rounded = tuple(x.astype(jnp.bfloat16) for x in exact)
    errors = {}
    for name in ("xla", "blocked"):
        gradient = gradient_of(name, rounded)
        assert all(g.dtype == jnp.bfloat16 and np.isfinite(np.asarray(g, np.float32)).all() for g in gradient)
        errors[name] = [np.linalg.norm(np.asarray(g, np.float32) - t) for g, t in zip(gradient, truth, strict=True)]
    rounding = 1e-6 * size**2 * np.linalg.norm(exact[0]) * np.array([1, 1, 0])
    assert np.all(np.array(errors["blocked"]) <= 1.1 * np.array(errors["xla"]) + rounding)


def test_curvature_that_needs_a_forward_derivative_has_ordinary_operations(monkeypatch):
    monkeypatch.setattr(attention, "_splash", None)
    monkeypatch.setattr(attention, "attention_for", lambda *_, **__: "splash")
    with forward_differentiable():
        np.testing.assert_allclose(causal_attention(*inputs()).array, by_hand(), atol=1e-6)
    with pytest.raises(TypeError):
        causal_attention(*inputs())
