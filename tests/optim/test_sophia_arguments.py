"""Which arguments and states Sophia takes, and how it refuses others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_levanter.optim import (
    AdamW,
    Curvature,
    GaussNewtonBartlett,
    GaussNewtonHutchinson,
    Hutchinson,
    Lion,
    Momentum,
    ReproducedSophia,
    Sophia,
    SophiaG,
    SophiaH,
    WinRateController,
)


@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("b1", 1.0),
        ("b1", -0.1),
        ("b2", 1.0),
        ("b2", -0.1),
        ("rho", 0.0),
        ("rho", -1),
        ("eps", 0.0),
        ("eps", float("nan")),
        ("weight_decay", -0.1),
        ("interval", 0),
        ("interval", -1),
        ("interval", 2.5),
    ],
)
def test_argument_out_of_range(cls, name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value}; it must be "):
        cls(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "kinds"),
    [
        ("learning_rate", "0.1", "a number or a function of the update count"),
        ("learning_rate", None, "a number or a function of the update count"),
        ("learning_rate", True, "a number or a function of the update count"),
        ("rho", 1j, "a number or a function of the update count"),
        ("weight_decay", [0.1], "a number or a function of the update count"),
        ("b1", None, "a number"),
        ("b2", "0.99", "a number"),
        ("eps", False, "a number"),
        ("bias_correct_momentum", 1, "True or False"),
        ("bias_correct_curvature", None, "True or False"),
    ],
)
def test_argument_of_the_wrong_kind(name, value, kinds):
    with pytest.raises(TypeError) as error:
        SophiaG(**{name: value})
    assert str(error.value) == f"{name} is {value!r}; it must be {kinds}"


@pytest.mark.parametrize("name", ["b1", "b2", "eps"])
def test_argument_that_may_be_no_schedule(name):
    with pytest.raises(TypeError, match=rf"^{name} is a function; it must be a number"):
        SophiaG(**{name: lambda count: 0.5})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("denominator", "sum", "one of max, add"),
        ("refresh_order", None, "one of before, after"),
        ("first_refresh", -1, "a whole number of at least 0"),
        ("first_refresh", True, "a whole number of at least 0"),
        ("initial_refreshes", -1, "a whole number of at least 0"),
        ("initial_refreshes", 1.5, "a whole number of at least 0"),
        ("interval", True, "a whole number of at least 1"),
        ("interval", "10", "a whole number of at least 1"),
        ("rho", "Auto", "a number, a function of the update count, or 'auto'"),
    ],
)
def test_unknown_choice(name, value, wanted):
    with pytest.raises(ValueError) as error:
        SophiaG.paper(**{name: value})
    assert str(error.value) == f"{name} is {value!r}; it must be {wanted}"


def test_a_batch_with_one_number_out_of_range():
    with pytest.raises(ValueError, match="b1 is "):
        SophiaG(b1=jnp.asarray([0.9, 1.0]))


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_interval_is_no_array():
    with pytest.raises(ValueError, match="interval is"):
        SophiaG(interval=jnp.asarray(10))


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


def test_an_estimator_of_ones_own():
    def estimator(function, model, microbatches, *, key, **given):
        return function, model, microbatches, key, given

    assert Sophia(estimator=estimator).estimate("f", "m", "parts", key=1) == ("f", "m", "parts", 1, {})
    assert Sophia(estimator=estimator).estimate("f", "m", key=1, weights=2) == ("f", "m", None, 1, {"weights": 2})
    with pytest.raises(ValueError, match=r"^estimator is not set; use SophiaG, SophiaH or Sophia\(estimator="):
        Sophia().estimate("f", "m", key=1)


def test_model_without_floating_point_arrays():
    with pytest.raises(ValueError, match="the model has no floating-point array to optimize"):
        SophiaG().init({"steps": jnp.int32(1)})


def test_complex_parameters_are_named():
    with pytest.raises(TypeError, match=r"^model\['z'\] is complex \(complex64\)"):
        SophiaG().init({"w": jnp.ones(1), "z": jnp.ones(1, jnp.complex64)})


def test_other_trees_are_named_by_their_path():
    optimizer = SophiaG()
    params = {"w": jnp.ones(2), "b": jnp.ones(3)}
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"grads\['b'\] has shape missing, the parameter has \(3,\)"):
        optimizer.update({"w": jnp.ones(2)}, state, params)
    with pytest.raises(ValueError, match=r"h_hat\['w'\] has shape \(3,\), the parameter has \(2,\)"):
        optimizer.refresh(state, {"w": jnp.ones(3), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"weight_decay_mask does not fit the parameters: it has nothing for \['b'\]"):
        SophiaG(weight_decay_mask={"w": True}).update(params, state, params)


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


@pytest.mark.parametrize("finite", [True, False])
def test_finite_may_be_a_python_bool(finite):
    optimizer = SophiaG()
    params = {"w": jnp.ones(2)}
    updates, state = optimizer.update(params, optimizer.init(params), params, finite=finite)
    assert (int(state.skipped_updates), bool(updates["w"].any())) == (not finite, finite)


def test_a_strongly_typed_b2_leaves_the_curvatures_dtype():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(2, jnp.float32)}
        for b2 in (np.float64(0.99), jnp.float64(0.99)):
            optimizer = SophiaG(b2=b2)
            assert optimizer.refresh(optimizer.init(params), params).curvature["w"].dtype == jnp.float32


@pytest.mark.parametrize("cls", [SophiaG, AdamW, Lion])
@pytest.mark.parametrize("value", [1.0, optax.clip_by_global_norm])
def test_a_gradient_transform_that_is_none(cls, value):
    with pytest.raises(TypeError, match=r"^gradient_transform is "):
        cls(gradient_transform=value)


def test_a_transformation_that_overflows_is_a_gradient_that_is_not_finite():
    optimizer = SophiaG(gradient_transform=optax.scale(1e39))
    params = {"w": jnp.ones(2)}
    _, state = optimizer.update(params, optimizer.init(params), params)
    assert jnp.isfinite(state.momentum["w"]).all()


@pytest.mark.parametrize("finite", [1, "yes", jnp.asarray(1), jnp.ones(2, bool)])
@pytest.mark.parametrize("cls", [SophiaG, AdamW])
def test_finite_that_is_no_bool(cls, finite):
    optimizer, params = cls(), {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"^finite "):
        optimizer.update(params, optimizer.init(params), params, finite=finite)


@pytest.mark.parametrize("cls", [SophiaG, AdamW])
@pytest.mark.parametrize("state", [None, {}, optax.adam(0.1).init({"w": jnp.ones(2)})])
def test_a_state_that_is_none_of_ours(cls, state):
    params = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"^state is a .*; it must be what init\(model\) gave"):
        cls().update(params, state, params)


def test_a_state_of_another_model_or_rho():
    params = {"w": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match=r"state.momentum\['w'\] has shape \(1, 4\), the parameter has \(3, 4\)"):
        SophiaG().update(params, SophiaG().init({"w": jnp.ones((1, 4))}), params)
    for one, other in ((0.05, "auto"), ("auto", 0.05)):
        with pytest.raises(ValueError, match=r"state.rho and rho do not go together"):
            SophiaG(rho=one).update(params, SophiaG(rho=other).init(params), params)


def test_complex_trees_and_other_containers_are_refused():
    optimizer, params = SophiaG(), {"w": jnp.ones(2)}
    state, wrong = optimizer.init(params), {"w": jnp.ones(2, jnp.complex64)}
    with pytest.raises(TypeError, match=r"grads\['w'\] is complex"):
        optimizer.update(wrong, state, params)
    with pytest.raises(TypeError, match=r"h_hat\['w'\] is complex"):
        optimizer.refresh(state, wrong)
    optimizer, params = SophiaG(), [jnp.ones(2)]
    with pytest.raises(ValueError, match="grads is made of other containers or axes"):
        optimizer.update((jnp.ones(2),), optimizer.init(params), params)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"learning_rate": lambda count: None}, TypeError, "learning_rate at an update count is None"),
        ({"rho": lambda count: jnp.ones(2)}, ValueError, r"rho has shape \(2,\); one optimizer has one number"),
        ({"b1": jnp.asarray([0.9, 0.8])}, ValueError, r"b1 has shape \(2,\); one optimizer has one number"),
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
        ({"gradient_transform": optax.GradientTransformation}, "gradient_transform is "),
        ({"gradient_transform": SophiaH()}, "gradient_transform is "),
    ],
)
def test_classes_and_optimizers_in_the_wrong_place(settings, message):
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
        (SophiaH.optax, "Hutchinson"),
        (SophiaH.levanter, "Hutchinson"),
        (lambda **given: SophiaG.paper(estimator=Hutchinson("gaussian", 2), **given), "Hutchinson"),
        (lambda **given: ReproducedSophia(estimator=GaussNewtonHutchinson(), **given), "GaussNewtonHutchinson"),
        (lambda **given: ReproducedSophia(estimator=SignedEstimator(), **given), "SignedEstimator"),
    ],
)
def test_an_added_eps_with_estimates_that_may_be_negative(make, name):
    with pytest.raises(ValueError) as error:
        make(denominator="add")
    assert str(error.value) == (
        f"denominator is 'add', and {name}'s estimates may be negative, where an added eps turns the step uphill; "
        "use 'max'"
    )
    assert make(denominator="max").choices[0] == "max"


@pytest.mark.parametrize("make", [ReproducedSophia, SophiaG.authors, SophiaG.paper, SophiaH.authors])
def test_an_added_eps_where_it_is_safe_or_reproduces_other_code(make):
    assert make(denominator="add").choices[0] == "add"


def test_the_authors_preset_of_sophia_h_may_have_a_floor():
    assert SophiaH.authors(denominator="max").choices[0] == "max"
