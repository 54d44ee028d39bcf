"""What estimators refuse, and how they say so."""

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from estimates import (
    ESTIMATORS,
    INPUTS,
    KEY,
    MODEL,
    POSITIONS,
    estimate,
    loss,
    named_grid,
    outputs_fn,
)
from jax.extend.core import Primitive

from sophia_levanter.optim import Categorical, GaussNewtonBartlett, Hutchinson

doubled = jax.custom_vjp(lambda x: 2 * x)
doubled.defvjp(lambda x: (2 * x, None), lambda _, c: (2 * c,))
squared = jax.custom_vjp(lambda x: x**2)
squared.defvjp(lambda x: (x**2, x), lambda x, c: (doubled(x) * c,))
plainly_squared = jax.custom_vjp(lambda x: x**2)
plainly_squared.defvjp(lambda x: (x**2, x), lambda x, c: (2 * x * c,))
without_jvp = Primitive("without_jvp")
without_jvp.def_impl(lambda x: x)
without_jvp.def_abstract_eval(lambda x: x)


def called_back(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_a_custom_backward_of_ordinary_operations_has_a_forward_derivative():
    found = estimate(Hutchinson(), lambda w: jnp.sum(plainly_squared(w)), jnp.ones(3))
    assert found.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "operation",
    [squared, without_jvp.bind, lambda a: jax.scipy.special.gammainc(a, 2.0), called_back],
    ids=["custom_vjp", "primitive", "incomplete gamma function", "callback"],
)
def test_an_operation_without_forward_derivative_is_refused(operation):
    with pytest.raises(
        TypeError, match=r"loss_fn contains an operation without a forward-mode derivative.* replace it"
    ):
        Hutchinson()(lambda w: jnp.sum(operation(w)), jnp.ones(3), key=KEY)


def test_gnb_needs_no_forward_derivative():
    w = jnp.ones((2, 3))
    assert jax.eval_shape(lambda w: GaussNewtonBartlett()(doubled, w, key=KEY), w).shape == w.shape


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Hutchinson("uniform"), ValueError, "probe is 'uniform'; it must be one of rademacher, gaussian"),
        (lambda: Hutchinson(probe=None), ValueError, "probe is None; it must be one of rademacher"),
        (lambda: Hutchinson(num_probes=0), ValueError, "num_probes is 0; it must be an integer of at least 1"),
        (lambda: Hutchinson(num_probes=1.5), ValueError, "num_probes is 1.5"),
        (lambda: GaussNewtonBartlett(reduction="mean"), ValueError, "reduction is 'mean'; it must be one of square_th"),
        (lambda: GaussNewtonBartlett(max_grad_norm=0), ValueError, r"max_grad_norm is 0; it must be in \(0, inf\)"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("estimator", [GaussNewtonBartlett(), Hutchinson()])
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({"count": jnp.int32(1), "text": "text"}, ValueError, "the model has no floating-point array"),
        (
            {"a": jnp.ones(2), "b": [jnp.ones(2, jnp.complex64)]},
            TypeError,
            r"model\['b'\]\[0\] is complex .*real arrays",
        ),
    ],
)
def test_models_that_cannot_be_estimated_are_refused(estimator, model, error, message):
    with pytest.raises(error, match=message):
        estimator(lambda m: jnp.zeros((2, 3)), model, key=KEY)


def test_a_loss_that_is_not_a_scalar_is_refused():
    message = r"shape \(1,\).* scalar"
    with pytest.raises(ValueError, match=message):
        Hutchinson()(lambda w: w, jnp.ones(1), key=KEY)
    with pytest.raises(ValueError, match=message):
        Hutchinson()(lambda w, x: w * x, jnp.ones(1), jnp.ones(2), key=KEY)
    with pytest.raises(ValueError, match="sampled_loss .*" + message):
        GaussNewtonBartlett().from_sampled_loss(lambda w, key: (w, 1), jnp.ones(1), key=KEY)


@pytest.mark.parametrize(
    "weights", [np.ones(7), np.ones((2, 3)), hax.named(np.ones(3), ("class",)), hax.named(np.ones(3), ("row",))]
)
def test_weights_that_do_not_fit_are_refused(weights):
    estimator = GaussNewtonBartlett(Categorical("class"))
    with pytest.raises(ValueError, match="weights"):
        eqx.filter_eval_shape(lambda model: estimator(named_grid, model, key=KEY, weights=weights), MODEL)


@pytest.mark.parametrize(("estimator", "function"), ESTIMATORS)
def test_weights_of_another_number_of_microbatches_are_refused(estimator, function):
    x = jnp.asarray(INPUTS.reshape(2, 4, 3))
    with pytest.raises(ValueError, match="weights"):
        estimator(function, MODEL, x, key=KEY, weights=jnp.ones((3,)))


def test_weights_of_microbatches_must_be_one_number_each():
    with pytest.raises(ValueError, match=r"weights have shape \(2, 1\)"):
        Hutchinson()(loss, MODEL, jnp.asarray(INPUTS.reshape(2, 4, 3)), key=KEY, weights=jnp.ones((2, 1)))


def test_weights_without_microbatches_are_refused_by_hutchinson():
    with pytest.raises(ValueError, match=r"weights .* microbatches"):
        Hutchinson()(loss, MODEL, key=KEY, weights=jnp.ones(POSITIONS))


def test_a_loss_instead_of_logits_is_refused():
    with pytest.raises(ValueError, match=r"a categorical likelihood requires logits .* not a loss"):
        GaussNewtonBartlett()(loss, MODEL, key=KEY)


@pytest.mark.parametrize("estimator", [GaussNewtonBartlett(), Hutchinson()])
@pytest.mark.parametrize("key", [None, 0])
def test_what_is_not_a_key_is_refused(estimator, key):
    with pytest.raises(TypeError, match=r"^key is"):
        estimator(lambda m: m, jnp.ones(3), key=key)


@pytest.mark.parametrize("outputs", [(jnp.ones((2, 3)), 1.0), None], ids=["pair", "none"])
def test_outputs_that_are_not_an_array_are_refused(outputs):
    with pytest.raises(TypeError, match=r"the outputs are a .*; the function must return a single array"):
        GaussNewtonBartlett()(lambda m: outputs, jnp.ones(3), key=KEY)


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="weights contain a negative entry"):
        GaussNewtonBartlett()(outputs_fn, MODEL, key=KEY, weights=np.asarray([1.0] * 7 + [-0.5]))


@pytest.mark.parametrize("result", [1.0, (1.0, 2.0, 3.0), None])
def test_a_sampled_loss_gives_two_scalars(result):
    with pytest.raises(TypeError, match="sampled_loss must return 2 scalars"):
        GaussNewtonBartlett().from_sampled_loss(lambda m, key: result, jnp.ones(3), key=KEY)


def test_a_mistake_that_mentions_a_tracer_is_left_alone():
    with pytest.raises(TypeError, match="can only concatenate str"):
        Hutchinson()(lambda m: "a" + m, jnp.ones(3), key=KEY)
