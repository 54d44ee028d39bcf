import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers
from trajectories import normal, rate, run

from sophia_levanter.optim import Muon
from sophia_levanter.optim._matrices import matrices_tree

STEPS = 4


@pytest.mark.parametrize("momentum_dtype", [None, jnp.bfloat16])
def test_steps_and_state_are_those_of_optax(momentum_dtype):
    """So that checkpoints from when it was `optax.contrib.muon` load."""
    matrices = {
        "stack": MuonDimensionNumbers((1,), (3, 4)),
        "tall": MuonDimensionNumbers(),
        "wide": MuonDimensionNumbers(1, 0),
    }
    matrices |= {"embedding": None, "norm": None}

    def tree(seed):
        shapes = {"stack": (2, 6, 3, 2, 4), "tall": (7, 3), "wide": (7, 3), "embedding": (5, 4), "norm": (4,)}
        return {name: normal(*shape, seed=seed) for name, shape in shapes.items()}

    ours = Muon(rate, 0.8, 0.85, 0.9, 1e-6, weight_decay=0.0, matrices=matrices, momentum_dtype=momentum_dtype)
    theirs = optax.chain(
        optax.contrib.muon(
            1.0,
            beta=0.8,
            eps=1e-6,
            adam_b1=0.85,
            adam_b2=0.9,
            mu_dtype=momentum_dtype,
            muon_weight_dimension_numbers=lambda _: matrices,
            consistent_rms=0.2,
        ),
        optax.add_decayed_weights(0.0),
        optax.scale_by_learning_rate(rate, flip_sign=False),
    )
    params = tree(9)
    state, wanted_state = ours.init(params), theirs.init(params)
    for step in range(STEPS):
        updates, state = eqx.filter_jit(ours.update)(tree(step), state, params)
        wanted, wanted_state = eqx.filter_jit(theirs.update)(tree(step), wanted_state, params)
        for name in params:
            np.testing.assert_allclose(updates[name], wanted[name], rtol=1e-5, atol=1e-6)
    found, expected = (jax.tree_util.tree_leaves_with_path(s) for s in (state.optax_state, wanted_state))
    for (path, x), (wanted_path, y) in zip(found, expected, strict=True):
        assert (path, x.shape, x.dtype) == (wanted_path, y.shape, y.dtype)
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-5, atol=1e-7)


def test_one_decay_and_one_mask_for_both_groups():
    params = {"w": jnp.ones((2, 2)), "v": jnp.ones((2, 2)), "a": jnp.ones(2), "b": jnp.ones(2)}
    optimizer = Muon(0.5, weight_decay=0.2, weight_decay_mask={"w": True, "v": False, "a": True, "b": False})
    (after,) = run(optimizer, params, [jax.tree.map(jnp.zeros_like, params)])
    for name, array in after.items():
        np.testing.assert_allclose(array, 0.9 if name in "wa" else 1.0, rtol=1e-6)


def test_the_momentum_norm_is_over_both_groups():
    optimizer = Muon(beta=0.5, b1=0.75)
    params = {"w": jnp.zeros((1, 2)), "b": jnp.zeros(1)}
    grads = {"w": jnp.asarray([[6.0, 8.0]]), "b": jnp.asarray([48.0])}
    _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    assert float(optimizer.metrics(state)["momentum_norm"]) == pytest.approx(13)


class Model(eqx.Module):
    table: jax.Array
    linear: hax.NamedArray
    steps: jax.Array

    def __call__(self):
        raise AssertionError("the optimizer must not call the model, nor a tree of its shape")


def is_entry(x):
    return x is None or isinstance(x, MuonDimensionNumbers)


def test_matrices_may_be_a_function_a_tree_or_a_prefix():
    model = Model(normal(3, 4), hax.named(normal(2, 3, 4), ("layers", "in", "out")), jnp.int32(1))
    grads = eqx.filter(model, eqx.is_inexact_array)
    entry = MuonDimensionNumbers(1, 2)
    prefix = eqx.tree_at(lambda m: (m.table, m.linear, m.steps), model, (None, entry, None))
    full = eqx.tree_at(lambda m: m.linear, prefix, eqx.tree_at(lambda x: x.array, model.linear, entry))
    for matrices in (prefix, full, lambda _: prefix, lambda _: full):
        assert jax.tree.leaves(matrices_tree(matrices, grads), is_leaf=is_entry) == [None, entry, None]
    found, default = (run(Muon(matrices=matrices), model, [grads])[0] for matrices in (prefix, None))
    assert found.linear.axes == model.linear.axes
    assert int(found.steps) == 1
    assert np.abs(default.table - found.table).max() > 1e-5
    assert np.abs(default.linear.array - found.linear.array).max() > 1e-5


@pytest.mark.parametrize(
    ("matrices", "error", "message"),
    [
        ({"w": None}, ValueError, r"^matrices does not match the parameters: it has no entry for \['b'\]$"),
        ({"w": True, "b": None}, TypeError, r"^matrices\['w'\] is True; it must be a MuonDimensionNumbers or None$"),
        (MuonDimensionNumbers(), ValueError, r"^matrices\['b'\] is .*; it must specify distinct axes of .* \(2,\)$"),
        ({"w": MuonDimensionNumbers(0, 3), "b": None}, ValueError, r"^matrices\['w'\] is .* \(2, 3\)$"),
        ({"w": MuonDimensionNumbers(1, -1), "b": None}, ValueError, r"^matrices\['w'\] is .* \(2, 3\)$"),
        ({"w": MuonDimensionNumbers((), 1), "b": None}, ValueError, r"^matrices\['w'\] is .* \(2, 3\)$"),
    ],
)
def test_matrices_that_do_not_fit(matrices, error, message):
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    for given in (matrices, lambda _: matrices):
        with pytest.raises(error, match=message):
            Muon(matrices=given).init(params)


def test_by_default_the_matrices_are_the_leaves_with_two_axes():
    tree = matrices_tree(None, {"a": jnp.ones((2, 3)), "b": jnp.ones(2), "c": jnp.ones((2, 3, 4))})
    assert tree == {"a": MuonDimensionNumbers(0, 1), "b": None, "c": None}


@pytest.mark.parametrize("beta", [1.0, -0.1])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match=rf"^beta is {beta}; it must be in \[0, 1\)"):
        Muon(beta=beta)
