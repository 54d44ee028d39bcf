"""A model of 24 parameters, its losses and likelihoods, and what tests of estimators ask of estimates."""

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from sophia_levanter.optim import (
    Bernoulli,
    Categorical,
    GaussNewtonBartlett,
    Hutchinson,
    Normal,
)
from sophia_levanter.optim._categorical import categorical_loss
from sophia_levanter.optim._trees import trainable

KEY = jax.random.key(0)
DRAWS = 5_000
POSITIONS = 8
RAGGED = (1, 2, 5)  # positions in each microbatch
INPUTS = np.random.default_rng(0).normal(size=(POSITIONS, 3)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, POSITIONS)
ANY_WEIGHTS = np.asarray([0.25, 3, 0, 1, 0.5, 2, 0, 6], np.float32)
MASK = np.asarray([1, 0, 1, 1, 0, 0, 1, 1], np.float32)
VARIANCES = np.asarray([0.25, 1, 4], np.float32)


class Classifier(eqx.Module):
    """A network whose matrices have one shape, so that a probe repeated from leaf to leaf biases the estimate."""

    inner: jax.Array
    inner_bias: jax.Array
    outer: jax.Array
    outer_bias: jax.Array
    steps: jax.Array
    name: str = eqx.field(static=True)

    @staticmethod
    def init():
        rng = np.random.default_rng(3)

        def normal(*shape):
            return jnp.asarray(rng.normal(size=shape), jnp.float32)

        return Classifier(normal(3, 3), normal(3), normal(3, 3), normal(3), jnp.int32(5), "classifier")

    def __call__(self, x):
        return jnp.tanh(x @ self.inner + self.inner_bias) @ self.outer + self.outer_bias


MODEL = Classifier.init()
FLAT, FROM_FLAT = ravel_pytree(trainable(MODEL))


def model_from(flat):
    return eqx.combine(FROM_FLAT(flat), MODEL)


def outputs_fn(model, x=INPUTS):
    return model(x)


def flatten(tree):
    return ravel_pytree(trainable(tree))[0]


def loss(model, x=INPUTS, labels=LABELS):
    return jnp.mean(categorical_loss(model(x), labels))


def gauss_newton_diagonal(jacobian, inner, weights=None):
    """The diagonal of sum_t w_t J_t^T S_t J_t / sum_t w_t, with S the Hessian of the loss in the outputs."""
    weights = np.ones(POSITIONS) if weights is None else weights
    return np.einsum("t,tci,tcd,tdi->i", weights, jacobian, inner, jacobian) / np.sum(weights)


def softmax_inner(classes=3):
    """[position, class, class] diag(p) - p p^T, 0 for the padding."""
    p = np.zeros((POSITIONS, 3))
    p[:, :classes] = jax.nn.softmax(MODEL(INPUTS)[:, :classes])
    return p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]


def diagonal_inner(values):
    return np.broadcast_to(values, (POSITIONS, 3))[:, :, None] * np.eye(3)


def sigmoid_inner():
    p = np.asarray(jax.nn.sigmoid(MODEL(INPUTS)), np.float64)
    return diagonal_inner(p * (1 - p))


def named_grid(model):
    """The eight positions as [class, row, column], so that the targets are [row, column]."""
    grid = hax.named(model(INPUTS).reshape(2, 4, 3), ("row", "column", "class"))
    return grid.rearrange(("class", "row", "column"))


COLUMN_WEIGHTS = ANY_WEIGHTS[3:7]
ELEMENT_WEIGHTS = np.outer(ANY_WEIGHTS, [1, 0, 0.5])
# Likelihood, outputs, weights as given, S, the weight of each position; all with targets of the same model.
LIKELIHOODS = {
    "classes first": (Categorical(0), lambda m: m(INPUTS).T, MASK.astype(bool), softmax_inner, MASK),
    "named weights in another order": (
        Categorical("class"),
        named_grid,
        hax.named(ANY_WEIGHTS.reshape(2, 4), ("row", "column")).rearrange(("column", "row")),
        softmax_inner,
        ANY_WEIGHTS,
    ),
    "named weights of one axis": (
        Categorical(0),
        named_grid,
        hax.named(COLUMN_WEIGHTS, ("column",)),
        softmax_inner,
        np.tile(COLUMN_WEIGHTS, 2),
    ),
    "padded": (Categorical(num_classes=2), outputs_fn, None, lambda: softmax_inner(2), None),
    "bernoulli": (Bernoulli(), outputs_fn, None, lambda: sigmoid_inner() / 3, None),
    "bernoulli events": (Bernoulli(event_ndim=1), outputs_fn, ANY_WEIGHTS, sigmoid_inner, ANY_WEIGHTS),
    "normal weights of elements": (
        Normal(2.0),
        outputs_fn,
        ELEMENT_WEIGHTS,
        lambda: diagonal_inner([0.5 / 1.5, 0, 0.25 / 1.5]),
        ANY_WEIGHTS,
    ),
    "normal events": (
        Normal(VARIANCES, event_ndim=1),
        lambda m: hax.named(m(INPUTS), ("row", "number")),
        hax.named(ANY_WEIGHTS, ("row",)),
        lambda: diagonal_inner(1 / VARIANCES),
        ANY_WEIGHTS,
    ),
}


def draws_of(estimate, draws=DRAWS):
    """float64 [draw, coordinate] of estimate(key)."""
    keys = jax.random.split(KEY, draws)
    return np.asarray(jax.jit(jax.vmap(lambda key: flatten(estimate(key))))(keys), np.float64)


def assert_mean(draws, exact, *, precision=0.1):
    errors = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert np.median(errors[exact != 0] / np.abs(exact[exact != 0])) < precision, (
        "the bound is too wide to tell anything"
    )
    assert np.all(np.abs(draws.mean(0) - exact) < 5 * errors + 1e-6), "the mean is off"


def estimate(estimator, function, *args, weights=None):
    """One estimate with `KEY`, compiled as a whole."""
    return eqx.filter_jit(lambda *args: estimator(function, *args, key=KEY, weights=weights))(*args)


def assert_like_the_model(estimate, model=MODEL, dtype="float32"):
    assert jax.tree.structure(estimate) == jax.tree.structure(trainable(model))
    assert {leaf.dtype for leaf in jax.tree.leaves(estimate)} == {jnp.dtype(dtype)}


def square_of_outputs(model, x=INPUTS):
    return jnp.mean(model(x).astype(jnp.float32) ** 2)


ESTIMATORS = [
    (GaussNewtonBartlett(), outputs_fn),
    (Hutchinson(num_probes=2), square_of_outputs),
]
