import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.optim.protocol import (
    check_range,
    check_same_structure,
    decay_mask_tree,
    differentiable,
    value_at,
)


class Layer(eqx.Module):
    weight: jax.Array
    bias: jax.Array | None
    steps: jax.Array
    name: str = eqx.field(static=True, default="layer")

    def __call__(self, x):
        raise AssertionError("a mask tree must not be called")


def layer():
    return Layer(jnp.ones((2, 3)), jnp.ones(3), jnp.int32(7))


def test_differentiable_keeps_floating_point_arrays_only():
    model = {"layer": layer(), "half": jnp.ones(2, jnp.bfloat16), "flag": True, "rate": 0.5, "function": jnp.sin}
    kept = jax.tree.leaves(differentiable(model))
    assert [(leaf.shape, leaf.dtype.name) for leaf in kept] == [
        ((2,), "bfloat16"),
        ((2, 3), "float32"),
        ((3,), "float32"),
    ]
    assert differentiable(model)["layer"].steps is None


def test_value_at():
    assert value_at(0.5, jnp.int32(3)) == 0.5
    assert value_at(lambda count: 2 * count, jnp.int32(3)) == 6


def test_no_mask_decays_every_leaf():
    params = differentiable(layer())
    mask = decay_mask_tree(None, params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert jax.tree.leaves(mask) == [True, True]


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        ({"a": True, "b": False}, [True, True, False]),
        ({"a": {"w": False, "b": True}, "b": True}, [True, False, True]),
        (lambda params: jax.tree.map(lambda p: p.ndim > 1, params), [False, True, False]),
        (lambda params: {"a": True, "b": False}, [True, True, False]),
    ],
    ids=["prefix", "whole", "function", "function to a prefix"],
)
def test_mask(mask, wanted):
    params = {"a": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "b": jnp.ones(3)}
    assert jax.tree.leaves(decay_mask_tree(mask, params)) == wanted


def test_mask_tree_that_is_a_callable_module_is_a_tree():
    params = differentiable(layer())
    mask = jax.tree.map(lambda p: p.ndim > 1, params)
    assert callable(mask)
    assert jax.tree.leaves(decay_mask_tree(mask, params)) == [True, False]


@pytest.mark.parametrize("mask", [{"a": True}, {"a": True, "c": True}, [True, True]])
def test_mask_of_another_tree(mask):
    with pytest.raises(ValueError, match=r"^weight_decay_mask does not fit the parameters' tree"):
        decay_mask_tree(mask, {"a": jnp.ones(1), "b": jnp.ones(1)})


def test_same_structure_passes():
    check_same_structure("grads", layer(), differentiable(layer()))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"w": np.ones((2, 3))}}, r"grads\['b'\] has shape missing, the parameter has \(4,\)"),
        (
            {"a": {"w": np.ones((3, 2))}, "b": np.ones(4)},
            r"grads\['a'\]\['w'\] has shape \(3, 2\), the parameter has \(2, 3\)",
        ),
        (
            {"a": {"w": np.ones((2, 3)), "v": np.ones(1)}, "b": np.ones(4)},
            r"grads\['a'\]\['v'\] has shape \(1,\), the parameter has missing",
        ),
        (
            {"a": {"w": np.ones((2, 3))}, "b": np.ones(4, int)},
            r"grads\['b'\] has shape missing, the parameter has \(4,\)",
        ),
    ],
    ids=["missing", "shape", "too many", "integer"],
)
def test_other_structure_is_named_by_its_path(tree, message):
    with pytest.raises(ValueError, match=message):
        check_same_structure("grads", tree, {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(4)})


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999])
def test_in_range(value):
    check_range("b1", value, low=0, high=1)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_out_of_range(value):
    with pytest.raises(ValueError, match=rf"b1 is {value}; it must be in \[0, 1\)"):
        check_range("b1", value, low=0, high=1)


def test_open_range():
    check_range("rho", 1e-30, low=0, low_open=True)
    with pytest.raises(ValueError, match=r"rho is 0; it must be in \(0, inf\)"):
        check_range("rho", 0, low=0, low_open=True)


def test_arrays_and_schedules_are_not_checked():
    check_range("b1", jnp.float32(2.0), low=0, high=1)
    check_range("learning_rate", lambda count: -1.0, low=0)
