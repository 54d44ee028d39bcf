from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.optim._checks import (
    check_choice,
    check_count,
    check_number,
    check_parameters,
    check_same_structure,
    value_at,
    whole_number,
)

KINDS = [0, 0.5, np.float32(0.5), np.float64(0.999), np.asarray(0.5), jnp.asarray(0.5), jnp.asarray([0.0, 0.9])]


@pytest.mark.parametrize("value", [*KINDS, np.int64(0), jnp.asarray(0.5, jnp.bfloat16)], ids=repr)
def test_number_in_range(value):
    check_number("b1", value, low=0, high=1)


@pytest.mark.parametrize(
    "value", [-0.1, 1, 1.5, float("nan"), float("inf"), np.float32(2), jnp.asarray(-1.0)], ids=repr
)
def test_number_out_of_range(value):
    with pytest.raises(ValueError) as error:
        check_number("b1", value, low=0, high=1)
    assert str(error.value) == f"b1 is {value}; it must be in [0, 1)"


def test_one_number_of_a_batch_out_of_range():
    with pytest.raises(ValueError, match=r"^b1 is \[0\.5 1\. *\]; it must be in \[0, 1\)"):
        check_number("b1", jnp.asarray([0.5, 1.0]), low=0, high=1)


def test_open_range():
    check_number("rho", 1e-30, low=0, low_open=True)
    with pytest.raises(ValueError, match=r"^rho is 0; it must be in \(0, inf\)"):
        check_number("rho", 0, low=0, low_open=True)


@pytest.mark.parametrize(
    "value", ["0.5", None, True, np.True_, 1j, [0.5], (0.5,), {}, np.asarray(["0.5"]), jnp.asarray(True)], ids=repr
)
def test_what_is_not_a_number(value):
    with pytest.raises(TypeError) as error:
        check_number("b1", value, low=0, high=1)
    assert str(error.value) == f"b1 is {value!r}; it must be a number"
    with pytest.raises(TypeError, match=r"^b1 is .*; it must be a number or a function of the update count$"):
        check_number("b1", value, low=0, high=1, schedule=True)


def test_schedules_only_where_they_may_be():
    check_number("learning_rate", lambda count: -1.0, low=0, schedule=True)
    with pytest.raises(TypeError, match=r"^b1 is a function; it must be a number$"):
        check_number("b1", lambda count: 0.5, low=0)


def test_value_at():
    assert value_at("x", 0.5, jnp.int32(3)) == 0.5
    assert value_at("x", lambda count: 2 * count, jnp.int32(3)) == 6


def test_traced_numbers_are_taken_as_they_are():
    jax.jit(lambda value: check_number("b1", value, low=0, high=1))(2.0)
    jax.vmap(lambda value: check_number("b1", value, low=0, high=1))(jnp.asarray([2.0, 3.0]))


def test_choice():
    check_choice("probe", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"^probe is 'c'; it must be one of a, b$"):
        check_choice("probe", "c", ("a", "b"))


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.asarray(3)], ids=repr)
def test_whole_numbers_become_ints(value):
    assert (whole_number(value), type(whole_number(value))) == (3, int)


@pytest.mark.parametrize("value", [2.0, "3", None, True, Fraction(3), jnp.asarray(3), np.ones(2, int)], ids=repr)
def test_what_is_not_a_whole_number_stays(value):
    assert whole_number(value) is value


def test_count():
    check_count("interval", 1)
    check_count("first_refresh", 0, low=0)
    for value, low in (
        (0, 1),
        (-1, 0),
        (1.0, 1),
        ("1", 1),
        (True, 1),
        (None, 1),
        (np.int64(3), 1),
        (jnp.asarray(3), 1),
    ):
        with pytest.raises(ValueError) as error:
            check_count("interval", value, low=low)
        assert str(error.value) == f"interval is {value!r}; it must be an integer of at least {low}"


def test_parameters():
    check_parameters({"w": jnp.ones(1, jnp.bfloat16), "n": jnp.int32(1)})
    for model in ({}, {"n": jnp.int32(1), "rate": 0.5, "f": jnp.sin}, None):
        with pytest.raises(ValueError, match=r"^the model has no floating-point array to optimize"):
            check_parameters(model)
    with pytest.raises(
        TypeError, match=r"^model\['a'\]\[1\] is complex \(complex64\); store its real and imaginary part"
    ):
        check_parameters({"a": [jnp.ones(1), jnp.ones(1, jnp.complex64)]})


class Layer(eqx.Module):
    weight: jax.Array
    steps: jax.Array


def test_same_structure_passes():
    layer = Layer(jnp.ones((2, 3)), jnp.int32(7))
    params = eqx.filter(layer, eqx.is_inexact_array)
    check_same_structure("grads", layer, params)
    check_same_structure("grads", params, layer)
    check_same_structure("grads", {"w": jnp.ones(2, jnp.bfloat16)}, {"w": np.ones(2)})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"w": np.ones((2, 3))}}, "grads['b'] is missing, but the parameter has shape (4,)"),
        (
            {"a": {"w": np.ones((3, 2))}, "b": np.ones(4)},
            "grads['a']['w'] has shape (3, 2), but the parameter has shape (2, 3)",
        ),
        (
            {"a": {"w": np.ones((2, 3)), "v": np.ones(1)}, "b": np.ones(4)},
            "grads['a']['v'] has shape (1,), but there is no such parameter",
        ),
        (
            {"a": {"w": np.ones((2, 3))}, "b": np.ones(4, int)},
            "grads['b'] is missing, but the parameter has shape (4,)",
        ),
    ],
    ids=["missing", "shape", "too many", "integer"],
)
def test_other_structure_is_named_by_its_path(tree, message):
    with pytest.raises(ValueError) as error:
        check_same_structure("grads", tree, {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(4)})
    assert str(error.value) == message
