"""The Kronecker basis: what it does to trees, how it is rotated, and Sophia and its estimators in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from estimates import (
    FLAT,
    FROM_FLAT,
    INPUTS,
    KEY,
    MODEL,
    assert_mean,
    draws_of,
    loss,
    model_from,
    outputs_fn,
    softmax_inner,
)
from optax.contrib import MuonDimensionNumbers

from sophia_levanter.optim import (
    GaussNewtonBartlett,
    Hutchinson,
    KroneckerBasis,
    Sophia,
    SophiaG,
)
from sophia_levanter.optim._kronecker import Factor

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def orthogonal(n):
    return jnp.asarray(np.linalg.qr(RNG.normal(size=(n, n)))[0], jnp.float32)


def rotated_factors(*sizes, count=1):
    """Factors of any basis."""
    return tuple(Factor(jnp.zeros((count, n, n)), jnp.stack([orthogonal(n) for _ in range(count)])) for n in sizes)


# Two layers of 4 x (2 * 3), with the axes out of order.
PARAMS = {"w": normal(2, 2, 4, 3), "v": normal(5), "m": normal(3, 2)}
AXES = {"w": MuonDimensionNumbers(2, (1, 3)), "v": None, "m": MuonDimensionNumbers(0, 1)}
BASIS = KroneckerBasis(matrices=AXES)
# In the leaves' order: m, v, w.
TURNS = (rotated_factors(3, 2), None, rotated_factors(4, 6, count=2))


def test_a_tree_is_projected_and_projected_back():
    coordinates = BASIS.at(TURNS)
    inside = coordinates.project(PARAMS)
    assert inside["v"] is PARAMS["v"]
    np.testing.assert_allclose(
        inside["m"], TURNS[0][0].vectors[0].T @ PARAMS["m"] @ TURNS[0][1].vectors[0], rtol=1e-5, atol=1e-6
    )
    for layer in range(2):
        matrix = PARAMS["w"][layer].transpose(1, 0, 2).reshape(4, 6)
        wanted = TURNS[2][0].vectors[layer].T @ matrix @ TURNS[2][1].vectors[layer]
        np.testing.assert_allclose(inside["w"][layer].transpose(1, 0, 2).reshape(4, 6), wanted, rtol=1e-5, atol=1e-6)
    for name, leaf in coordinates.project_back(inside).items():
        np.testing.assert_allclose(leaf, PARAMS[name], rtol=1e-5, atol=1e-6)


def test_it_starts_at_the_parameters_own_coordinates():
    for name, leaf in BASIS.at(BASIS.init(PARAMS)).project(PARAMS).items():
        np.testing.assert_array_equal(leaf, PARAMS[name])


@pytest.mark.parametrize(("max_size", "kept"), [(4, (False, True)), (3, (True, True)), (6, (False, False))])
def test_a_large_side_keeps_its_coordinates(max_size, kept):
    basis = KroneckerBasis(matrices=AXES, max_size=max_size)
    turns = basis.init(PARAMS)
    assert tuple(side is None for side in turns[2]) == kept
    turns, _ = basis.rotated(basis.update_moments(turns, PARAMS), PARAMS)
    inside = basis.at(turns).project(PARAMS)["w"]
    np.testing.assert_allclose(jnp.linalg.norm(inside), jnp.linalg.norm(PARAMS["w"]), rtol=1e-5)
    assert (float(jnp.max(jnp.abs(inside - PARAMS["w"]))) < 1e-6) == all(kept)


def test_the_basis_finds_the_eigenvectors_and_follows_them():
    """Gradients A Z B^T of white noise Z have the second moments A A^T and B B^T, times numbers."""
    basis = KroneckerBasis(b2=0.98)
    turns, h = basis.init({"w": jnp.zeros((4, 6))}), {"w": jnp.ones((4, 6))}
    step = jax.jit(lambda turns, h, m: basis.rotated(basis.update_moments(turns, m), h))
    for _ in range(2):  # other eigenvectors the second time
        left, right = orthogonal(4) * 2.0 ** jnp.arange(4), orthogonal(6) * 2.0 ** jnp.arange(6)
        for _ in range(400):
            turns, h = step(turns, h, {"w": 1e-8 * left @ normal(4, 6) @ right.T})
        for side, factor in zip(turns[0], (left, right), strict=True):
            cosines = jnp.abs(side.vectors[0].T @ (factor / jnp.linalg.norm(factor, axis=0)))
            # Orthogonal iteration puts the largest first.
            assert float(jnp.min(jnp.diag(cosines[:, ::-1]))) > 0.95
            np.testing.assert_allclose(side.vectors[0].T @ side.vectors[0], jnp.eye(len(factor)), atol=1e-5)


def test_a_diagonal_turns_with_the_basis():
    """The diagonal of K diag(h) K^T, K what takes the old coordinates to the new ones, by whole matrices."""
    basis, params = KroneckerBasis(b2=0.5), {"w": normal(3, 4)}
    turns, h = (rotated_factors(3, 4),), {"w": jnp.abs(normal(3, 4))}
    after, turned = basis.rotated(basis.update_moments(turns, params), h)
    (old_left, old_right), (left, right) = turns[0], after[0]
    change = np.kron(left.vectors[0].T @ old_left.vectors[0], right.vectors[0].T @ old_right.vectors[0])
    wanted = np.diag(change @ np.diag(h["w"].ravel()) @ change.T).reshape(3, 4)
    np.testing.assert_allclose(turned["w"], wanted, rtol=1e-4)
    assert float(jnp.max(jnp.abs(turned["w"] - h["w"]))) > 0.1
    np.testing.assert_allclose(after[0][0].moment[0], 0.5 * params["w"] @ params["w"].T, rtol=1e-5)
    np.testing.assert_allclose(after[0][1].moment[0], 0.5 * params["w"].T @ params["w"], rtol=1e-5)


def test_a_zero_momentum_rotates_nothing():
    turns, h = BASIS.rotated(BASIS.update_moments(TURNS, jax.tree.map(jnp.zeros_like, PARAMS)), PARAMS)
    for before, after in zip(jax.tree.leaves(TURNS), jax.tree.leaves(turns), strict=True):
        np.testing.assert_array_equal(before, after)
    for name in h:
        np.testing.assert_allclose(h[name], PARAMS[name], rtol=1e-5, atol=1e-5)


MODEL_BASIS = KroneckerBasis()
MODEL_TURNS = tuple(rotated_factors(3, 3) if leaf.ndim == 2 else None for leaf in jax.tree.leaves(FROM_FLAT(FLAT)))
COORDINATES = MODEL_BASIS.at(MODEL_TURNS)


@pytest.fixture(scope="module")
def rotation():
    """float64 [coordinate in the basis, parameter]."""
    columns = jax.vmap(lambda e: jax.flatten_util.ravel_pytree(COORDINATES.project(FROM_FLAT(e)))[0])
    matrix = np.asarray(jax.jit(columns)(jnp.eye(len(FLAT))), np.float64).T
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(FLAT)), atol=1e-5)
    assert np.abs(matrix - np.eye(len(FLAT))).max() > 0.5
    return matrix


@pytest.fixture(scope="module")
def gauss_newton():
    jacobian = np.asarray(jax.jit(jax.jacobian(lambda flat: model_from(flat)(INPUTS)))(FLAT), np.float64)
    return np.einsum("tci,tcd,tdj->ij", jacobian, softmax_inner(), jacobian) / len(INPUTS)


@pytest.mark.parametrize(
    "estimator",
    [GaussNewtonBartlett(reduction="average_then_square"), Hutchinson()],
    ids=repr,
)
def test_estimates_have_the_exact_diagonal_in_the_basis_as_their_mean(estimator, rotation, gauss_newton):
    function, exact = outputs_fn, gauss_newton
    if isinstance(estimator, Hutchinson):
        function = loss
        exact = np.asarray(jax.jit(jax.hessian(lambda flat: loss(model_from(flat))))(FLAT), np.float64)
    optimizer = Sophia(basis=MODEL_BASIS, estimator=estimator)
    state = optimizer.init(MODEL)._replace(basis=MODEL_TURNS)
    draws = draws_of(lambda key: optimizer.estimate(function, MODEL, key=key, state=state))
    assert_mean(draws, np.diag(rotation @ exact @ rotation.T))
    with pytest.raises(AssertionError, match="the mean is off"):
        assert_mean(draws, np.diag(exact))


def test_microbatches_are_squared_apart_in_the_basis(rotation):
    parts = INPUTS.reshape(2, 4, 3)
    estimator = GaussNewtonBartlett(coordinates=COORDINATES)
    keys = [jax.random.fold_in(KEY, i) for i in range(2)]

    @jax.jit
    @jax.grad
    def gradient_sum(flat, part, key):
        losses, count = estimator.sampled_loss(model_from(flat)(part), key=key)
        return losses * count

    gradients = [np.asarray(gradient_sum(FLAT, *given), np.float64) for given in zip(parts, keys, strict=True)]
    wanted = sum((rotation @ gradient) ** 2 for gradient in gradients) / 8
    found = jax.jit(lambda parts: estimator(lambda m, x: m(x), MODEL, parts, key=KEY))(parts)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found)[0], wanted, rtol=1e-4, atol=1e-6)


def by_hand(grads, estimates, *, rate, b1, b2, rho, basis_b2, cautious):
    """Sophia in a Kronecker basis in plain numpy, on one matrix."""
    theta, m, h = np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4))
    moments, vectors = [np.zeros((3, 3)), np.zeros((4, 4))], [np.eye(3), np.eye(4)]
    for step, (g, h_hat) in enumerate(zip(grads, estimates, strict=True)):
        if h_hat is not None:
            h = b2 * h + (1 - b2) * h_hat
            if step:
                old = list(vectors)
                for side, gram in enumerate((m @ m.T, m.T @ m)):
                    moments[side] = basis_b2 * moments[side] + (1 - basis_b2) * gram
                    vectors[side] = np.linalg.qr(moments[side] @ vectors[side])[0]
                left, right = (new.T @ before for new, before in zip(vectors, old, strict=True))
                h = left**2 @ h @ (right**2).T
        m = b1 * m + (1 - b1) * g
        u = np.clip(vectors[0].T @ m @ vectors[1] / np.maximum(rho * h, 1e-12), -1, 1)
        if cautious:
            agrees = u * (vectors[0].T @ g @ vectors[1]) > 0
            u = u * agrees / agrees.mean()
        theta = theta - rate * vectors[0] @ u @ vectors[1].T
    return theta


@pytest.mark.parametrize("cautious", [False, True])
def test_steps_are_those_by_hand(cautious):
    settings = {"b1": 0.8, "b2": 0.7, "rho": 0.6, "cautious": cautious}
    grads = [np.asarray(normal(3, 4), np.float64) for _ in range(12)]
    estimates = [np.asarray(jnp.abs(normal(3, 4)), np.float64) if step % 3 == 0 else None for step in range(12)]
    uncorrected = {"bias_correct_momentum": False, "bias_correct_curvature": False}
    optimizer = SophiaG(0.01, weight_decay=0.0, basis=KroneckerBasis(b2=0.6), **uncorrected, **settings)
    params = {"w": jnp.zeros((3, 4))}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for g, h_hat in zip(grads, estimates, strict=True):
        h_hat = None if h_hat is None else {"w": jnp.asarray(h_hat, jnp.float32)}
        updates, state = update({"w": jnp.asarray(g, jnp.float32)}, state, params, h_hat)
        params = optax.apply_updates(params, updates)
    wanted = by_hand(grads, estimates, rate=0.01, basis_b2=0.6, **settings)
    np.testing.assert_allclose(params["w"], wanted, atol=2e-5)
    # The basis is not the identity.
    assert float(jnp.max(jnp.abs(state.basis[0][0].vectors - jnp.eye(3)))) > 0.1


def test_an_estimate_that_is_not_finite_leaves_basis_and_curvature():
    optimizer = SophiaG(basis=KroneckerBasis())
    params, refresh = {"w": normal(3, 4)}, jax.jit(optimizer.refresh)
    _, state = jax.jit(optimizer.update)({"w": normal(3, 4)}, optimizer.init(params), params)
    skipped = refresh(state, {"w": jnp.full((3, 4), jnp.nan)})
    for before, after in zip(jax.tree.leaves(state.basis), jax.tree.leaves(skipped.basis), strict=True):
        np.testing.assert_array_equal(before, after)
    assert skipped.refresh_pending and not jnp.any(skipped.curvature["w"])
    taken = refresh(state, {"w": jnp.ones((3, 4))})
    assert jnp.any(taken.basis[0][0].moment) and not taken.refresh_pending


def test_a_momentum_whose_square_is_not_finite_rotates_nothing():
    optimizer = SophiaG(learning_rate=1e-3, b1=0.0, basis=KroneckerBasis())
    params = {"w": normal(3, 4)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for size in (1.0, 1e22, 1.0):
        updates, state = update({"w": size * normal(3, 4)}, state, params, {"w": jnp.ones((3, 4))})
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((updates, state)))
    assert float(jnp.max(jnp.abs(state.basis[0][0].vectors - jnp.eye(3)))) > 0.1


def test_weight_decay_is_of_the_parameters_themselves():
    optimizer = SophiaG(learning_rate=0.1, weight_decay=0.5, basis=KroneckerBasis())
    params = {"w": normal(3, 4)}
    state = optimizer.init(params)._replace(basis=(rotated_factors(3, 4),))
    updates, _ = optimizer.update({"w": jnp.zeros((3, 4))}, state, params)
    np.testing.assert_allclose(updates["w"], -0.05 * params["w"], rtol=1e-6)


def test_dtypes_of_parameters_in_bfloat16():
    optimizer = SophiaG(basis=KroneckerBasis())

    def step(params):
        state = optimizer.init(params)
        h_hat = optimizer.estimate(lambda p: jnp.ones((5, 3), jnp.bfloat16) @ p["w"], params, key=KEY, state=state)
        return h_hat, *optimizer.update(params, state, params, h_hat)

    h_hat, updates, state = jax.eval_shape(step, {"w": jnp.ones((3, 4), jnp.bfloat16)})
    assert updates["w"].dtype == state.momentum["w"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((h_hat, state.curvature, state.basis))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("arguments", "error", "wanted"),
    [
        ({"b2": 1.0}, ValueError, "b2"),
        ({"b2": "0.9"}, TypeError, "b2"),
        ({"max_size": 0}, ValueError, "max_size is 0; it must be an integer of at least 1"),
    ],
)
def test_arguments_out_of_range(arguments, error, wanted):
    with pytest.raises(error, match=f"^{wanted}"):
        KroneckerBasis(**arguments)


def test_parameters_without_a_matrix():
    with pytest.raises(ValueError, match=r"^basis has no matrix to rotate, because no parameter has two axes"):
        SophiaG(basis=KroneckerBasis()).init({"w": jnp.ones((2, 3, 4)), "v": jnp.ones(3)})


def test_a_decay_for_each_column_is_refused():
    optimizer = SophiaG(basis=KroneckerBasis(b2=jnp.asarray([0.5, 0.9])))
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"^basis\.b2 has shape \(2,\)"):
        optimizer.update(params, optimizer.init(params), params)


def test_the_state_of_another_model():
    optimizer = SophiaG(basis=KroneckerBasis())
    with pytest.raises(ValueError, match=r"state\.momentum"):
        optimizer.estimate(outputs_fn, MODEL, key=KEY, state=optimizer.init({"w": jnp.ones((2, 2))}))
    with pytest.raises(ValueError, match=r"^the basis has 3 parameters, but the tree has 1$"):
        BASIS.at(TURNS).project({"w": PARAMS["w"]})


def test_a_basis_of_another_kind():
    with pytest.raises(TypeError, match=r"^basis is 'kronecker'; it must be a KroneckerBasis or None"):
        SophiaG(basis="kronecker")


def test_an_estimate_in_a_basis_needs_the_state():
    optimizer = SophiaG(basis=KroneckerBasis())
    with pytest.raises(ValueError, match=r"^state is missing; the estimate depends on its basis, so call estimate\("):
        optimizer.estimate(outputs_fn, MODEL, key=KEY)
    with pytest.raises(TypeError, match="it must be the result of init"):
        optimizer.estimate(outputs_fn, MODEL, key=KEY, state={})


def test_an_estimator_without_coordinates():
    optimizer = Sophia(basis=KroneckerBasis(), estimator=lambda function, model, microbatches, *, key: model)
    with pytest.raises(TypeError, match="with a basis, it must have a `coordinates` field, like Hutchinson"):
        optimizer.estimate(outputs_fn, MODEL, key=KEY, state=optimizer.init(MODEL))


def test_a_state_without_a_basis():
    state = SophiaG().init(MODEL)
    optimizer = SophiaG(basis=KroneckerBasis())
    for with_basis, without in ((optimizer, state), (SophiaG(), optimizer.init(MODEL))):
        with pytest.raises(ValueError, match=r"state\.basis does not match basis; call init again"):
            with_basis.update(FROM_FLAT(FLAT), without, MODEL)
