"""Every preset is what it is named after: its numbers against other people's code, or a plain loop of theirs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_levanter.optim import GaussNewtonBartlett, Hutchinson, SophiaG, SophiaH, WinRateController, sophia_g

GOLDEN = Path(__file__).parent.parent / "golden"
STEPS = 33
SIZE = 8
START = np.linspace(-2.0, 3.0, SIZE)
# Norms from 0.2 to 8, so that clipping to norm 1 leaves some alone and not others.
GRADS = np.random.default_rng(0).normal(size=(STEPS, SIZE)) * np.geomspace(0.1, 3, STEPS)[::-1, None]
SIGNED = 2000 * np.random.default_rng(1).normal(size=(STEPS, SIZE))
# Coordinates without curvature, where m is about as small as each eps.
GRADS[:, :3] *= [1e-15, 1e-12, 1e-8]
SIGNED[:, :3] = 0
H_HATS = {SophiaG: 0.05 * np.abs(SIGNED), SophiaH: SIGNED}
PRESETS = {
    "G paper": SophiaG.paper,
    "G authors": SophiaG.authors,
    "H paper": SophiaH.paper,
    "H optax": SophiaH.optax,
    "H levanter": SophiaH.levanter,
}


def follow(optimizer, h_hats, grads=GRADS, start=START):
    """Parameters [step, coordinate], momentum, curvature, win rates [step] in float64.

    An estimate is given to `update` wherever one is due.
    """
    with jax.enable_x64(True):
        params = jnp.asarray(start)
        state, found, win_rates = optimizer.init(params), [], []

        @jax.jit
        def update(grad, state, params, h_hat):
            updates, state = optimizer.update(grad, state, params, h_hat)
            return params + updates, state, optimizer.metrics(state)["win_rate"]

        for step, grad in enumerate(grads):
            h_hat = jnp.asarray(h_hats[step]) if optimizer.refresh_due(step) else None
            params, state, win_rate = update(jnp.asarray(grad), state, params, h_hat)
            found.append(np.asarray(params))
            win_rates.append(float(win_rate))
        assert found[0].dtype == np.float64
        return np.stack(found), np.asarray(state.momentum), np.asarray(state.curvature), win_rates


def clipped_to_norm_1(grad):
    return grad / max(1.0, np.linalg.norm(grad))


def algorithm_3(h_hats, lr, gamma):
    """arXiv 2305.14342, Algorithm 3, with its k counted from 1, and the clipping of section 3.1."""
    theta, m, h, found = START, np.zeros(SIZE), np.zeros(SIZE), []
    for t, grad in enumerate(GRADS, start=1):
        m = 0.96 * m + (1 - 0.96) * clipped_to_norm_1(grad)
        if t % 10 == 1:
            h = 0.99 * h + (1 - 0.99) * h_hats[t - 1]
        theta = theta - lr * 0.2 * theta
        theta = theta - lr * np.clip(m / np.maximum(gamma * h, 1e-12), -1, 1)
        found.append(theta)
    return np.stack(found), m, h


def authors_loop(h_hats, lr, rho):
    """The training script and `sophia.py` of the authors, with h_hat for bs * g^2."""
    theta, m, h, found = START, np.zeros(SIZE), np.zeros(SIZE), []
    for iter_num, grad in enumerate(GRADS):
        theta = theta * (1 - lr * 0.2)
        m = 0.965 * m + (1 - 0.965) * clipped_to_norm_1(grad)
        ratio = np.minimum(np.abs(m) / (rho * h + 1e-15), 1)
        theta = theta - lr * np.sign(m) * ratio
        if iter_num % 10 == 9:
            h = 0.99 * h + (1 - 0.99) * h_hats[iter_num]
        found.append(theta)
    return np.stack(found), m, h


def levanter_loop(h_hats, lr, gamma):
    """`_sophia_gradient_transform` of Levanter, whose count is one ahead when it asks for the curvature."""
    theta, mu, h, found = START, np.zeros(SIZE), np.zeros(SIZE), []
    for count, grad in enumerate(GRADS):
        mu = (1 - 0.96) * grad + 0.96 * mu
        updates = np.clip(mu / (1 - 0.96 ** (count + 1)) / np.maximum(gamma * h, 1e-12), -1, 1)
        if (count + 1) % 10 == 0:
            h = (1 - 0.99) * h_hats[count] + 0.99 * h
        theta = theta - lr * (updates + 0.1 * theta)
        found.append(theta)
    return np.stack(found), mu, h


@pytest.mark.parametrize(
    ("make", "h_hats", "rho", "loop"),
    [
        (SophiaG.paper, H_HATS[SophiaG], 0.05, algorithm_3),
        (SophiaH.paper, H_HATS[SophiaH], 0.01, algorithm_3),
        (SophiaG.authors, H_HATS[SophiaG], 0.05, authors_loop),
        (SophiaH.levanter, H_HATS[SophiaH], 0.01, levanter_loop),
    ],
    ids=["G paper", "H paper", "G authors", "H levanter"],
)
def test_a_preset_is_the_loop_that_it_is_named_after(make, h_hats, rho, loop):
    *found, win_rates = follow(make(learning_rate=0.05), h_hats)
    for ours, theirs in zip(found, loop(h_hats, 0.05, rho), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    # Some steps were clipped and some not.
    assert any(0 < rate < 1 for rate in win_rates)


def test_the_authors_preset_follows_their_update():
    """Golden parameters, without clipping (whoever measured them clipped outside) and with their rate, rho and bs."""
    golden = np.load(GOLDEN / "sophia_g_update_float64.npz")
    given = json.loads(str(golden["hyperparameters"]))
    optimizer = SophiaG.authors(learning_rate=given["lr"], rho=given["rho"], gradient_transform=None)
    for name in "wb":
        h_hats = given["bs"] * np.square(golden[f"hess_grad/{name}"])
        found, m, h, _ = follow(optimizer, h_hats, golden[f"grad/{name}"], golden[f"param0/{name}"])
        assert len(found) == 60
        np.testing.assert_allclose(found, golden[f"param/{name}"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(m, golden[f"exp_avg/{name}"][-1], rtol=0, atol=1e-12)
        np.testing.assert_allclose(h / given["bs"], golden[f"hessian/{name}"][-1], rtol=0, atol=1e-12)


def test_the_optax_preset_follows_optax():
    """`optax.contrib.sophia` with its defaults, where the same arrays stand for the diagonal."""
    with jax.enable_x64(True):
        h_hats, params = jnp.asarray(SIGNED), jnp.asarray(START)
        given = optax.GradientTransformation(
            lambda params: jnp.int32(0), lambda grads, count, params: (h_hats[10 * count], count + 1)
        )
        theirs, wanted = optax.contrib.sophia(0.05, hessian_diagonal_fn=given), []
        state = theirs.init(params)
        update = jax.jit(theirs.update)
        for grad in GRADS:
            updates, state = update(jnp.asarray(grad), state, params)
            params = params + updates
            wanted.append(np.asarray(params))
    found, m, h, win_rates = follow(SophiaH.optax(learning_rate=0.05), SIGNED)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(m, state[0].mu, rtol=0, atol=1e-12)
    np.testing.assert_allclose(h, state[0].nu, rtol=0, atol=1e-12)
    assert state[0].hessian_fn_state == 4
    assert any(0 < rate < 1 for rate in win_rates)


def quadratic(w):
    return 0.5 * jnp.sum(jnp.arange(1.0, 5.0) * w**2)


@pytest.mark.parametrize(
    ("make", "rademacher"),
    [
        (SophiaH, True),
        (SophiaH.optax, True),
        (SophiaH.paper, False),
        (SophiaH.levanter, False),
    ],
    ids=["default", "optax", "paper", "levanter"],
)
def test_probes_of_the_presets(make, rademacher):
    """On a separable quadratic u * (H u) is a u^2: the diagonal itself for signs, never for normal numbers."""
    h_hat = make().estimate(quadratic, jnp.ones(4), key=jax.random.key(0))
    exact = np.isclose(h_hat, np.arange(1.0, 5.0))
    assert exact.all() if rademacher else not exact.any()
    assert (h_hat > 0).all()


def test_curvature_gradients_of_the_presets():
    """Two microbatches of two targets each, g far beyond norm 1: all but the default join first, the authors clip g."""
    w = jnp.asarray([[0.03, -0.02, 0.01]])
    xs = jnp.asarray([[[40.0], [10.0]], [[30.0], [-20.0]]])

    def outputs_fn(w, x):
        return x @ w

    def estimate(estimator):
        return jax.jit(lambda w: estimator(outputs_fn, w, xs, key=jax.random.key(1)))(w)

    alone, paper, authors = (estimate(make().estimate) for make in (SophiaG, SophiaG.paper, SophiaG.authors))
    joined = estimate(GaussNewtonBartlett(reduction="average_then_square"))
    assert not np.allclose(alone, joined)
    np.testing.assert_allclose(paper, joined, rtol=1e-6)
    # h_hat = 4 g^2, and a g of norm 1 leaves 4 in all.
    assert float(jnp.sum(joined)) > 5
    np.testing.assert_allclose(authors, 4 * joined / jnp.sum(joined), rtol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_overrides(name):
    make = PRESETS[name]
    optimizer = make(learning_rate=0.25, b1=0.5, rho="auto", interval=3, gradient_transform=None)
    assert (optimizer.learning_rate, optimizer.momentum.b1, optimizer.curvature.interval) == (0.25, 0.5, 3)
    assert optimizer.gradient_transform is None
    assert optimizer.rho == WinRateController(initial=0.05 if name.startswith("G") else 0.01)
    assert optimizer.curvature.b2 == make().curvature.b2
    assert isinstance(make().estimator, GaussNewtonBartlett if name.startswith("G") else Hutchinson)
    with pytest.raises(TypeError, match="gamma"):
        make(gamma=0.1)


def test_sophia_g_is_the_optimizer_of_the_same_arguments():
    """Each differs from its default, so that a dropped or swapped argument shows."""
    given = {
        "learning_rate": lambda count: 0.05 / (count + 1),
        "b1": 0.8,
        "b2": 0.7,
        "rho": 0.004,
        "eps": 0.3,
        "weight_decay": lambda count: 0.1 * count,
        "weight_decay_mask": [True, False],
        "bias_correct_momentum": False,
        "bias_correct_curvature": False,
    }
    params, grads, h_hat = ([*jnp.asarray(x).reshape(2, 4)] for x in (START, GRADS[0], H_HATS[SophiaG][0]))

    def run(transformation):
        state, found = transformation.init(params), []
        for step in range(3):
            updates, state = transformation.update(grads, state, params, h_hat=[(step + 1) * h for h in h_hat])
            found.append(updates)
        return np.asarray(found)

    found = run(sophia_g(**given))
    np.testing.assert_array_equal(found, run(SophiaG(**given).as_optax()))
    np.testing.assert_array_equal(run(sophia_g()), run(SophiaG().as_optax()))
    for name in given:
        without = {other: value for other, value in given.items() if other != name}
        assert not np.array_equal(found, run(sophia_g(**without)))
