"""Optimizers on a mesh: sharded parameters, and matrices shared among the devices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers
from trajectories import normal

from sophia_levanter.optim import AdamW, CautiousWeightDecay, Hyperball, KroneckerBasis, Muon, Soap, SophiaG
from sophia_levanter.optim._matrices import by_matrix


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def placed(tree, mesh):
    """Matrices split over the first axis, the rest on every device."""

    def place(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*("data",)[: leaf.ndim - 1])))

    return jax.tree.map(place, tree)


TREE = {"w": normal(16, 3), "b": normal(3, seed=1)}


@pytest.fixture(scope="module")
def three_steps():
    """(parameters, estimate) -> parameters, updates, state and metrics after three updates."""
    optimizer = SophiaG.paper(learning_rate=0.1, rho="auto", interval=1)
    update = jax.jit(lambda params, state, h_hat: optimizer.update(params, optimizer.refresh(state, h_hat), params))

    def steps(params, h_hat):
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = update(params, state, h_hat)
            params = eqx.apply_updates(params, updates)
        return params, updates, state, optimizer.metrics(state)

    return steps


@pytest.fixture(scope="module")
def on_one_device(three_steps):
    return three_steps(TREE, jax.tree.map(lambda x: 30 * jnp.square(x), TREE))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_parameters(axis_type, three_steps, on_one_device):
    """The same numbers, with clipping and the win rate over all devices; and every array stays where it was."""
    mesh = mesh_of(axis_type)
    tree = placed(TREE, mesh)
    found = three_steps(tree, jax.tree.map(lambda x: 30 * jnp.square(x), tree))
    jax.tree.map(lambda ours, one: np.testing.assert_allclose(ours, one, rtol=1e-5), found, on_one_device)
    params, updates, state, metrics = found
    assert 0 < float(metrics["win_rate"]) < 1
    for found in (params, updates, state.momentum, state.curvature):
        for name, leaf in found.items():
            assert leaf.sharding.is_equivalent_to(tree[name].sharding, leaf.ndim)
            assert leaf.addressable_shards[0].data.shape == {"w": (2, 3), "b": (3,)}[name]


def test_norms_are_those_of_whole_matrices():
    """Also where eight devices have two rows of a matrix each; and every array stays where it was."""
    optimizer = Hyperball(CautiousWeightDecay(AdamW(0.1, weight_decay=0.0), 0.3))

    def steps(params):
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(3):
            updates, state = update(params, state, params)
            params = eqx.apply_updates(params, updates)
        return params, state

    tree = placed(TREE, mesh_of(AxisType.Explicit))
    (found, state), (wanted, _) = steps(tree), steps(TREE)
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-5, atol=1e-6)
        assert leaf.sharding.is_equivalent_to(tree[name].sharding, leaf.ndim)
    norm = np.linalg.norm(TREE["w"])
    assert [float(jnp.linalg.norm(found["w"])), float(jnp.max(state.radii[1]))] == pytest.approx([norm, norm])


# 16 matrices are shared as they are; 3 and 7 of a shape are pooled as 16, and 2 of another shape padded to 8.
ITEMS = [
    (normal(count, n, 8, seed=count), {"y": normal(count, n, seed=9)}) for count, n in ((16, 5), (3, 5), (2, 4), (7, 5))
]


def gram(x, more):
    return {"gram": x @ jnp.swapaxes(x, -1, -2), "rows": len(x) * jnp.ones_like(more["y"]), "y": 2 * more["y"]}


@pytest.mark.parametrize(("jit", "shares"), [(False, [16, 3, 2, 7]), (True, [2, 2, 1, 2])])
def test_each_device_takes_its_share_under_jit(jit, shares):
    def function(items):
        return by_matrix("data", gram, items)

    with jax.set_mesh(mesh_of()):
        found = (jax.jit(function) if jit else function)(ITEMS)
    for (x, more), result, share in zip(ITEMS, found, shares, strict=True):
        np.testing.assert_allclose(result["gram"], x @ jnp.swapaxes(x, -1, -2), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(result["y"], 2 * more["y"])
        np.testing.assert_array_equal(result["rows"], np.full(more["y"].shape, share))


@pytest.mark.parametrize(
    ("mesh", "axis"), [(None, "data"), (AxisType.Auto, None), (AxisType.Auto, "model"), (AxisType.Explicit, "data")]
)
def test_without_such_an_axis_each_device_takes_all(mesh, axis):
    def counts(items):
        return by_matrix(axis, lambda x, more: len(x) + 0 * x, items)

    if mesh is None:
        found = jax.jit(counts)(ITEMS)
    else:
        with jax.set_mesh(mesh_of(mesh)):
            found = jax.jit(counts)(ITEMS)
    assert [int(x[0, 0, 0]) for x in found] == [16, 3, 2, 7]


def test_inside_of_a_shard_map_each_device_takes_what_it_has():
    def counts(x):
        return by_matrix("data", lambda x: len(x) + 0 * x, [(x,)])[0]

    with jax.set_mesh(mesh_of()):
        spec = PartitionSpec("data")
        found = jax.jit(jax.shard_map(counts, in_specs=spec, out_specs=spec))(ITEMS[0][0])
    np.testing.assert_array_equal(found, np.full(found.shape, 2))


@pytest.mark.parametrize("optimizer", [KroneckerBasis, Muon])
def test_a_mesh_axis_that_is_not_a_name(optimizer):
    with pytest.raises(TypeError, match=r"^mesh_axis is 8; it must be the name of a mesh axis, or None"):
        optimizer(mesh_axis=8)


@pytest.mark.parametrize("optimizer", [Soap, Muon])
def test_hyper_parameters_may_be_arrays_there(optimizer):
    """They are traced outside of the devices' shares."""
    params = {"w": normal(8, 16), "v": normal(16, 8)}

    def step(b1, beta):
        if optimizer is Soap:
            chosen = Soap(b1=b1, b2=beta, basis=KroneckerBasis(b2=beta, max_size=8, mesh_axis="data"))
        else:
            chosen = Muon(b1=b1, beta=beta, mesh_axis="data")
        return chosen.update(params, chosen.init(params), params)[0]

    numbers = jnp.float32(0.8), jnp.float32(0.9)
    wanted = jax.jit(step)(*numbers)
    with jax.set_mesh(mesh_of()):
        found = jax.jit(step)(*numbers)
    for name in params:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_muon_orthogonalizes_only_its_share():
    """Of small stacks, pooled."""
    params = {str(i): normal(3, 24, 32, seed=i) for i in range(8)}

    def flops(mesh_axis):
        muon = Muon(matrices=jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), params), mesh_axis=mesh_axis)
        with jax.set_mesh(mesh_of()):
            compiled = jax.jit(lambda *x: muon.update(*x)).lower(params, muon.init(params), params).compile()
        return compiled.cost_analysis()["flops"]

    assert flops("data") <= 1.3 / 8 * flops(None)
