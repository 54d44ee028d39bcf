from contextlib import nullcontext

import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis

from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.models.layers import gelu, linear, normalize
from sophia_levanter.partition.mesh import partition_of

Batch, Position, Embed, Heads, HeadSize = hax.make_axes(batch=8, position=6, embed=8, heads=4, head_size=2)
ROWS = (Batch, Position)


def draw(axes, seed=0, dtype=jnp.float32):
    shape = [axis.size for axis in axes]
    return hax.named(jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype), axes)


def layer(In, Out, bias):
    weight = draw((*hax.util.ensure_tuple(In), *hax.util.ensure_tuple(Out)), 1)
    return hnn.Linear(weight, draw(hax.util.ensure_tuple(Out), 2) if bias else None, In, Out)


def with_gradients(function):
    """Compiled: a layer and its input to the output, and the gradients of a loss in both."""
    return jax.jit(lambda m, x: (function(m, x), jax.grad(lambda *a: (function(*a).array ** 2).sum(), (0, 1))(m, x)))


hnn_linear = with_gradients(lambda layer, x: layer(x))


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, model=4), MeshConfig(sequence=2, data=4)])
@pytest.mark.parametrize(
    ("In", "Out", "bias"),
    [
        (Embed, (Axis("qkv", 3), Heads, HeadSize), True),
        ((Heads, HeadSize), Embed, True),
        (Axis("mlp", 16), Embed, False),
    ],
)
def test_linear_is_the_layer_and_its_gradients(mesh, In, Out, bias):
    one, x = layer(In, Out, bias), draw((*ROWS, *hax.util.ensure_tuple(In)))
    wanted = hnn_linear(one, x)
    with nullcontext() if mesh is None else partition_of(mesh).active():
        found = with_gradients(linear)(one, x)
    assert found[0].axes == wanted[0].axes
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_linear_takes_axes_in_any_order_and_one_row():
    one, x = layer((Heads, HeadSize), Embed, True), draw((Batch, Heads, Position, HeadSize))
    np.testing.assert_allclose(
        linear(one, x).rearrange((*ROWS, Embed)).array, one(x).rearrange((*ROWS, Embed)).array, rtol=1e-5
    )
    np.testing.assert_allclose(
        linear(one, x["batch", 0, "position", 0]).array, one(x["batch", 0, "position", 0]).array, rtol=1e-5
    )


def hessian_product(function, primals, tangents):
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(function(*p))))
    return jax.jit(lambda *given: jax.jvp(gradient, given[:1], given[1:])[1])(primals, tangents)


def test_gelu_and_its_derivatives():
    x = draw((*ROWS, Embed))
    ours, theirs = lambda x: gelu(hax.named(x, (*ROWS, Embed))).array, jax.nn.gelu
    np.testing.assert_allclose(ours(x.array), theirs(x.array), rtol=1e-6)
    for found, wanted in zip(*(hessian_product(f, (x.array,), (x.array + 1,)) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_and_its_derivatives(bias):
    norm = hnn.LayerNorm.init(Embed, eps=1e-3, use_bias=bias)
    x, weight, shift = draw((*ROWS, Embed)).array + 3, draw((Embed,), 1).array, draw((Embed,), 2).array

    def with_arrays(function):
        def apply(x, weight, *bias):
            leaves = [hax.named(a, Embed) for a in (weight, *bias)]
            return function(
                jax.tree.unflatten(jax.tree.structure(norm), [a.array for a in leaves]), hax.named(x, (*ROWS, Embed))
            ).array

        return apply

    primals = (x, weight, shift) if bias else (x, weight)
    ours, theirs = with_arrays(normalize), with_arrays(lambda norm, x: norm(x))
    np.testing.assert_allclose(ours(*primals), theirs(*primals), rtol=1e-5, atol=1e-6)
    tangents = tuple(jnp.cos(7 * p) for p in primals)
    for found, wanted in zip(*(hessian_product(f, primals, tangents) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_layer_norm_of_bfloat16_has_its_statistics_in_float32():
    norm = hnn.LayerNorm.init(Embed, use_bias=False)
    x = draw((*ROWS, Embed), dtype=jnp.bfloat16) + 100
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), norm)
    found = normalize(half, x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.array, norm(x.astype(jnp.float32)).array.astype(jnp.bfloat16))
