"""Which arguments and states Sophia takes, and how it refuses others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_levanter.optim import (
    Curvature,
    GaussNewtonBartlett,
    Hutchinson,
    Momentum,
    ReproducedSophia,
    Sophia,
    SophiaG,
    SophiaH,
    WinRateController,
)

NUMBER, RATE = "a number", "a number or a function of the update count"


# `test_checks.py` has what each check refuses; here it is that each argument has its check, and its bounds.
@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("learning_rate", -1e-4, "in [0, inf)"),
        ("b1", 1.0, "in [0, 1)"),
        ("b1", -0.1, "in [0, 1)"),
        ("b2", 1.0, "in [0, 1)"),
        ("b2", -0.1, "in [0, 1)"),
        ("rho", 0.0, "in (0, inf)"),
        ("eps", 0.0, "in (0, inf)"),
        ("weight_decay", -0.1, "in [0, inf)"),
        ("interval", 0, "an integer of at least 1"),
        ("denominator", "sum", "one of max, add"),
        ("refresh_order", None, "one of before, after"),
        ("first_refresh", -1, "an integer of at least 0"),
        ("initial_refreshes", -1, "an integer of at least 0"),
        ("rho", "Auto", "a number, a function of the update count, or 'auto'"),
    ],
)
def test_argument_out_of_range(name, value, wanted):
    with pytest.raises(ValueError) as error:
        SophiaG.paper(**{name: value})
    assert str(error.value) == f"{name} is {value!r}; it must be {wanted}"


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("learning_rate", None, RATE),
        ("rho", 1j, RATE),
        ("weight_decay", [0.1], RATE),
        ("b1", None, NUMBER),
        ("b2", "0.99", NUMBER),
        ("eps", False, NUMBER),
        ("bias_correct_momentum", 1, "True or False"),
        ("bias_correct_curvature", None, "True or False"),
    ],
)
def test_argument_of_the_wrong_kind(name, value, wanted):
    with pytest.raises(TypeError) as error:
        SophiaG(**{name: value})
    assert str(error.value) == f"{name} is {value!r}; it must be {wanted}"
    if wanted == NUMBER:
        with pytest.raises(TypeError, match=rf"^{name} is a function; it must be a number"):
            SophiaG(**{name: lambda count: 0.5})


def test_limits_that_are_allowed():
    Sophia(learning_rate=0, b1=0, b2=0, weight_decay=0, interval=1)
    Sophia(
        learning_rate=np.float32(0.1), b1=np.float64(0.9), rho=jnp.asarray(0.1), eps=np.asarray(1e-8), weight_decay=1
    )


def test_defaults():
    g, h = SophiaG(), SophiaH()
    assert (g.learning_rate, g.rho.value, g.eps, g.weight_decay.rate, h.rho.value) == (6e-4, 0.05, 1e-12, 0.2, 0.01)
    assert (g.estimator, h.estimator) == (GaussNewtonBartlett(), Hutchinson("rademacher", 1))
    for optimizer in (g, h):
        assert optimizer.momentum == Momentum(b1=0.965, bias_correct=True, dtype=None)
        assert optimizer.curvature == Curvature(0.99, interval=10, initial_refreshes=0, bias_correct=True)
        assert (optimizer.gradient_transform, optimizer.weight_decay.mask) == (None, None)


def test_a_custom_estimator():
    def estimator(function, model, microbatches, *, key, **given):
        return function, model, microbatches, key, given

    assert Sophia(estimator=estimator).estimate("f", "m", "parts", key=1) == ("f", "m", "parts", 1, {})
    assert Sophia(estimator=estimator).estimate("f", "m", key=1, weights=2) == ("f", "m", None, 1, {"weights": 2})
    with pytest.raises(ValueError, match=r"^estimator is not set; use SophiaG, SophiaH or Sophia\(estimator="):
        Sophia().estimate("f", "m", key=1)


@pytest.mark.parametrize("settings", [{}, {"rho": "auto", "gradient_transform": optax.ema(0.9)}])
def test_a_new_state_may_be_donated(settings):
    """No two of its arrays are one buffer."""
    optimizer = SophiaG(**settings)
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    _, state = jax.jit(optimizer.update, donate_argnums=1)(params, state, params)
    assert int(state.count) == 1


def test_a_state_of_another_model_or_rho():
    params = {"w": jnp.ones((3, 4))}
    with pytest.raises(
        ValueError, match=r"state.momentum\['w'\] has shape \(1, 4\), but the parameter has shape \(3, 4\)"
    ):
        SophiaG().update(params, SophiaG().init({"w": jnp.ones((1, 4))}), params)
    for one, other in ((0.05, "auto"), ("auto", 0.05)):
        with pytest.raises(ValueError, match=r"state.rho does not match rho"):
            SophiaG(rho=one).update(params, SophiaG(rho=other).init(params), params)


def test_trees_of_other_shapes_dtypes_and_containers_are_refused():
    optimizer, params = SophiaG(), {"w": jnp.ones(2)}
    state, wrong = optimizer.init(params), {"w": jnp.ones(2, jnp.complex64)}
    with pytest.raises(ValueError, match=r"h_hat\['w'\] has shape \(3,\), but the parameter has shape \(2,\)"):
        optimizer.refresh(state, {"w": jnp.ones(3)})
    with pytest.raises(TypeError, match=r"grads\['w'\] is complex"):
        optimizer.update(wrong, state, params)
    with pytest.raises(TypeError, match=r"h_hat\['w'\] is complex"):
        optimizer.refresh(state, wrong)
    optimizer, params = SophiaG(), [jnp.ones(2)]
    with pytest.raises(ValueError, match="grads and the parameters have different containers or axes"):
        optimizer.update((jnp.ones(2),), optimizer.init(params), params)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"learning_rate": lambda count: None}, TypeError, "the schedule for learning_rate returned None"),
        ({"rho": lambda count: jnp.ones(2)}, ValueError, r"rho has shape \(2,\); it must be a single number"),
        ({"b1": jnp.asarray([0.9, 0.8])}, ValueError, r"b1 has shape \(2,\); it must be a single number"),
    ],
)
def test_what_is_not_one_number_is_refused(settings, error, message):
    optimizer, params = SophiaG(**settings), {"w": jnp.ones(2)}
    with pytest.raises(error, match=message):
        optimizer.update(params, optimizer.init(params), params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": WinRateController}, "rho is "),
        ({"estimator": GaussNewtonBartlett}, "estimator is "),
        ({"estimator": 3}, "estimator is "),
    ],
)
def test_classes_in_the_wrong_place(settings, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        SophiaG(**settings)


class SignedEstimator:
    """A custom estimator that says that its estimates may be negative."""

    signed = True

    def __call__(self, function, model, microbatches=None, *, key):
        return model


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (SophiaH.paper, "Hutchinson"),
        (lambda **given: ReproducedSophia(estimator=SignedEstimator(), **given), "SignedEstimator"),
    ],
)
def test_an_added_eps_with_estimates_that_may_be_negative(make, name):
    with pytest.raises(ValueError) as error:
        make(denominator="add")
    assert str(error.value) == (
        f"denominator is 'add', but {name}'s estimates may be negative, which can reverse the step; use 'max'"
    )
    assert make(denominator="max").choices[0] == "max"


@pytest.mark.parametrize("make", [ReproducedSophia, SophiaG.authors, SophiaG.paper])
def test_an_added_eps_where_it_is_safe(make):
    for denominator in ("add", "max"):
        assert make(denominator=denominator).choices[0] == denominator
