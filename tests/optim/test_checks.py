from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.optim._checks import (
    check_count,
    check_number,
    check_same_structure,
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


@pytest.mark.parametrize(
    "value", ["0.5", None, True, np.True_, 1j, [0.5], (0.5,), {}, np.asarray(["0.5"]), jnp.asarray(True)], ids=repr
)
def test_what_is_not_a_number(value):
    with pytest.raises(TypeError) as error:
        check_number("b1", value, low=0, high=1)
    assert str(error.value) == f"b1 is {value!r}; it must be a number"
    with pytest.raises(TypeError, match=r"^b1 is .*; it must be a number or a function of the update count$"):
        check_number("b1", value, low=0, high=1, schedule=True)


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
            "grads['a']['v'] has shape (1,), but the model has no such parameter",
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
