import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_levanter.optim import SophiaG
from sophia_levanter.optim._trees import all_finite, decay_mask_tree, norm, select, total, trainable, upcast


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


def test_trainable_keeps_floating_point_arrays_only():
    model = {"layer": layer(), "half": jnp.ones(2, jnp.bfloat16), "flag": True, "rate": 0.5, "function": jnp.sin}
    kept = jax.tree.leaves(trainable(model))
    assert [(leaf.shape, leaf.dtype.name) for leaf in kept] == [
        ((2,), "bfloat16"),
        ((2, 3), "float32"),
        ((3,), "float32"),
    ]
    assert trainable(model)["layer"].steps is None


def test_upcast():
    with jax.enable_x64(True):
        wide = {dtype: upcast(jnp.ones(1, dtype)).dtype.name for dtype in ("float16", "bfloat16", "float32", "float64")}
    assert wide == {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_number_that_is_not_finite_is_found_in_any_array(bad):
    tree = {"a": jnp.ones((2, 2)), "b": jnp.ones(3), "steps": jnp.int32(1), "none": None}
    assert bool(all_finite(tree))
    for name, index in (("a", (1, 0)), ("b", 2)):
        assert not bool(all_finite(tree | {name: tree[name].at[index].set(bad)}))


def test_a_tree_without_floating_point_arrays_is_finite():
    assert bool(all_finite({"steps": jnp.int32(1)}))


def test_select_chooses_between_arrays_and_keeps_other_leaves():
    new = {"a": jnp.ones(2), "steps": jnp.int32(5), "key": jax.random.key(1), "name": "new"}
    old = {"a": jnp.zeros(2), "steps": jnp.int32(4), "key": jax.random.key(0), "name": "old"}
    for condition, wanted in ((True, new), (False, old)):
        found = select(jnp.asarray(condition), new, old)
        assert (found["a"].tolist(), int(found["steps"])) == (wanted["a"].tolist(), int(wanted["steps"]))
        assert jnp.all(jax.random.key_data(found["key"]) == jax.random.key_data(wanted["key"]))
        assert found["name"] == "old"


def test_total_and_norm():
    tree = {"a": jnp.asarray([[3.0, -4.0]]), "b": jnp.asarray(12.0), "none": None}
    assert (float(total(tree)), float(norm(tree))) == (11.0, 13.0)
    assert (float(total({})), float(norm({}))) == (0.0, 0.0)
    # 1e-4 squared, and the sum of 4,096 ones, are beyond float16 and bfloat16.
    assert float(norm({"a": jnp.full(4, 1e-4, jnp.float16)})) == pytest.approx(2e-4, rel=1e-2)
    assert float(total({"a": jnp.ones(4097, jnp.bfloat16)})) == 4097
    assert float(total({"a": jnp.asarray([True, False, True])})) == 2


def test_no_mask_decays_every_leaf():
    params = trainable(layer())
    mask = decay_mask_tree(None, params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert jax.tree.leaves(mask) == [True, True]


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


@pytest.mark.parametrize("of", [trainable(layer()), layer()], ids=["parameters", "whole model"])
def test_mask_tree_that_is_a_callable_module_is_a_tree(of):
    mask = is_matrix(of)
    assert callable(mask)
    assert jax.tree.leaves(decay_mask_tree(mask, trainable(layer()))) == [True, False]


def test_mask_over_a_whole_model_with_functions_and_numbers():
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    mask = jax.tree.map(lambda leaf: eqx.is_array(leaf) and leaf.ndim > 1, model)
    assert jax.tree.leaves(decay_mask_tree(mask, trainable(model))) == [True, False, True, False]


def test_mask_prefix_of_a_module():
    model = {"a": layer(), "b": layer()}
    assert jax.tree.leaves(decay_mask_tree({"a": False, "b": True}, trainable(model))) == [False] * 2 + [True] * 2


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


def test_a_mask_that_is_not_a_tree_of_bools():
    params = {"a": jnp.ones(1)}
    optimizer = SophiaG(weight_decay_mask=3)
    with pytest.raises(TypeError, match=r"^weight_decay_mask is 3; it must be True, False or a factor"):
        optimizer.update(params, optimizer.init(params), params)
