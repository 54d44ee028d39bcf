import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_levanter.optim import SophiaG
from sophia_levanter.optim._trees import decay_mask_tree, trainable


class Layer(eqx.Module):
    weight: jax.Array
    bias: jax.Array | None
    steps: jax.Array
    name: str = eqx.field(static=True, default="layer")

    def __call__(self, x):
        raise AssertionError("a mask tree must not be called")


def layer():
    return Layer(jnp.ones((2, 3)), jnp.ones(3), jnp.int32(7))


def is_matrix(tree):
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, tree)


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (False, [False, False, False]),
        ({"a": True, "b": False}, [True, True, False]),
        ({"a": {"w": False, "b": True}, "b": True}, [True, False, True]),
        (is_matrix, [False, True, False]),
        (lambda params: {"a": True, "b": False}, [True, True, False]),
        (lambda params: False, [False, False, False]),
    ],
    ids=["scalar", "prefix", "whole", "function", "function to a prefix", "function to a scalar"],
)
def test_mask(mask, wanted):
    params = {"a": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "b": jnp.ones(3)}
    tree = decay_mask_tree(mask, params)
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert jax.tree.leaves(tree) == wanted


class WithDimensions(eqx.Module):
    number: int
    or_more: bool

    def __call__(self, params):
        return jax.tree.map(lambda p: p.ndim == self.number or (self.or_more and p.ndim > self.number), params)


@pytest.mark.parametrize(("or_more", "wanted"), [(False, [False, True]), (True, [True, True])])
def test_mask_function_that_is_a_module(or_more, wanted):
    assert jax.tree.leaves(decay_mask_tree(WithDimensions(1, or_more), trainable(layer()))) == wanted


def test_mask_over_a_whole_model_with_functions_and_numbers():
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    mask = jax.tree.map(lambda leaf: eqx.is_array(leaf) and leaf.ndim > 1, model)
    assert jax.tree.leaves(decay_mask_tree(mask, trainable(model))) == [True, False, True, False]


def test_parameters_that_optax_masked_are_left_out():
    params = {"a": {"w": jnp.ones(2), "b": optax.MaskedNode()}, "b": optax.MaskedNode()}
    for mask in ({"a": {"w": False, "b": True}, "b": {"deep": True}}, {"a": False, "b": True}, {"a": {"w": False}}):
        assert decay_mask_tree(mask, params) == {"a": {"w": False, "b": optax.MaskedNode()}, "b": optax.MaskedNode()}
    all_of_a = {"a": {"w": optax.MaskedNode(), "b": optax.MaskedNode()}, "b": jnp.ones(2)}
    assert jax.tree.leaves(decay_mask_tree({"a": True, "b": False}, all_of_a)) == [False]


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        ({"a": {"w": True}}, "it has no entry for ['b']"),
        ({"a": {}, "b": True}, "it has no entry for ['a']['w']"),
        ({"a": {"w": True}, "b": None}, "it has no entry for ['b']"),
        ({"a": {"w": True}, "b": True, "c": True}, "['c'] is not a parameter"),
        ({"a": {"w": True, "v": False}, "b": True}, "['a']['v'] is not a parameter"),
        ({"a": {"w": {"deeper": True}}, "b": True}, "it has no entry for ['a']['w']"),
        ([True, True], "it has no entry for ['a']['w']"),
        (lambda params: {"a": True}, "it has no entry for ['b']"),
        (lambda params: None, "it has no entry for ['a']['w']"),
    ],
)
def test_mask_of_another_tree_is_named_by_its_path(mask, problem):
    with pytest.raises(ValueError) as error:
        decay_mask_tree(mask, {"a": {"w": jnp.ones(1)}, "b": jnp.ones(1)})
    assert str(error.value) == f"weight_decay_mask does not match the parameters: {problem}"


@pytest.mark.parametrize("value", [1, "yes", -0.5, float("inf"), np.ones(2, bool)], ids=str)
def test_mask_leaf_that_is_not_a_bool(value):
    with pytest.raises(TypeError, match=r"^weight_decay_mask\['b'\] is .*; it must be True, False or a factor"):
        decay_mask_tree({"a": True, "b": value}, {"a": jnp.ones(1), "b": jnp.ones(1)})


@pytest.mark.parametrize("mask", [{"a": True, "e": False}, {"a": np.True_, "e": np.False_}])
def test_mask_prefix_over_a_subtree_without_parameters(mask):
    """As `eqx.nn.Identity` in a `Sequential`; numpy's bools are bools."""
    params = {"a": jnp.ones(1), "e": {}}
    optimizer = SophiaG(weight_decay_mask=mask)
    assert int(optimizer.update(params, optimizer.init(params), params)[1].count) == 1
