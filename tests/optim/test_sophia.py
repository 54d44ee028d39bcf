"""The update of Sophia: by hand, by the authors' numbers, and what metrics say of it."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import assert_trees_equal

from sophia_levanter.optim import ReproducedSophia, Sophia, SophiaG, SophiaH

GOLDEN = Path(__file__).parent.parent / "golden"
UNCORRECTED = {"bias_correct_momentum": False, "bias_correct_curvature": False}
PLAIN = UNCORRECTED | {"learning_rate": 0.1, "b1": 0.5, "b2": 0.75, "rho": 0.5, "eps": 1e-8, "weight_decay": 0.0}


class Model(eqx.Module):
    weight: jax.Array
    bias: jax.Array
    steps: jax.Array
    width: int
    name: str = eqx.field(static=True)

    def __call__(self, x):
        raise AssertionError("the optimizer must not call the model, nor a mask of its shape")


def model(dtype=jnp.float32):
    return Model(jnp.asarray([[1.0, -2.0]], dtype), jnp.asarray([4.0]), jnp.int32(7), 2, "model")


def grads_of(weight, bias):
    zeros = eqx.filter(model(), eqx.is_inexact_array)
    return eqx.tree_at(lambda m: (m.weight, m.bias), zeros, (jnp.asarray([weight]), jnp.asarray([bias])))


def state_of(momentum, curvature, count=1, refreshes=1):
    m, h = ({"w": jnp.asarray(x, jnp.float32)} for x in (momentum, curvature))
    return eqx.tree_at(
        lambda s: (s.momentum, s.curvature, s.count, s.refresh_count),
        Sophia().init(m),
        (m, h, jnp.int32(count), jnp.int32(refreshes)),
    )


def one_step(optimizer, momentum_after, curvature, params, **counts):
    """The update of a state whose momentum will be `momentum_after`."""
    state = state_of(np.asarray(momentum_after) / optimizer.momentum.b1, curvature, **({"count": 0} | counts))
    params = {"w": jnp.asarray(params, jnp.float32)}
    updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    return updates["w"], state


def follow_golden(dtype):
    """Ours and theirs, [step, ...] of parameters, momentum and curvature, by name."""
    golden = np.load(GOLDEN / f"sophia_g_update_{dtype}.npz")
    given = json.loads(str(golden["hyperparameters"]))
    rates = (given[name] for name in ("lr", "beta1", "beta2", "rho"))
    optimizer = SophiaG(*rates, 1e-15, given["weight_decay"], interval=given["k"], **UNCORRECTED)
    model = {name: jnp.asarray(golden[f"param0/{name}"]) for name in "wb"}
    state = optimizer.init(model)
    update, refresh = jax.jit(optimizer.update), jax.jit(optimizer.refresh)
    ours = []
    for step in range(len(golden["grad/w"])):
        updates, state = update({name: golden[f"grad/{name}"][step] for name in "wb"}, state, model)
        model = eqx.apply_updates(model, updates)
        if step % given["k"] == given["k"] - 1:
            h_hat = {name: given["bs"] * jnp.square(golden[f"hess_grad/{name}"][step]) for name in "wb"}
            state = refresh(state, h_hat)
        ours.append((model, state.momentum, jax.tree.map(lambda h: h / given["bs"], state.curvature)))
    for i, kind in enumerate(("param", "exp_avg", "hessian")):
        for name in "wb":
            yield f"{kind}/{name}", np.stack([parts[i][name] for parts in ours]), golden[f"{kind}/{name}"]


def test_follows_the_authors_update_in_float64():
    with jax.enable_x64(True):
        for name, ours, theirs in follow_golden("float64"):
            assert (len(ours), ours.dtype) == (60, np.float64)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12, err_msg=name)
            assert name.startswith("param") or np.abs(theirs[-1]).min() > 1e-9


def test_follows_the_authors_update_in_float32():
    for name, ours, theirs in follow_golden("float32"):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6, err_msg=name)


def test_init():
    state = SophiaG().init(model(jnp.bfloat16))
    for count in (state.count, state.refresh_count, state.skipped_updates, state.skipped_refreshes):
        assert (count.dtype, int(count)) == (jnp.int32, 0)
    assert (state.refresh_pending.dtype, bool(state.refresh_pending)) == (jnp.bool_, False)
    assert (state.rho, state.gradient_state) == (None, None)
    assert (state.momentum.weight.dtype, state.curvature.weight.dtype) == (jnp.bfloat16, jnp.float32)
    for tree in (state.momentum, state.curvature):
        assert (tree.steps, tree.width) == (None, None)
        assert [leaf.shape for leaf in jax.tree.leaves(tree)] == [(1, 2), (1,)]
        assert not any(leaf.any() for leaf in jax.tree.leaves(tree))


def test_first_steps_by_hand():
    optimizer = SophiaG(**PLAIN | {"weight_decay": 0.2})
    params = {"w": jnp.asarray([1.0, -2.0])}
    state = optimizer.refresh(optimizer.init(params), {"w": jnp.asarray([16.0, 0.8])})
    assert state.curvature["w"].tolist() == pytest.approx([4, 0.2])  # (1 - 0.75) h_hat
    updates, state = optimizer.update({"w": jnp.asarray([0.8, -0.6])}, state, params)
    # m = [0.4, -0.3], rho h = [2, 0.1]: ratios 0.2 and -3, clipped to -1; decay is 0.1 * 0.2 * w.
    assert updates["w"].tolist() == pytest.approx([-0.02 - 0.02, 0.1 + 0.04])
    assert state.momentum["w"].tolist() == pytest.approx([0.4, -0.3])
    state = optimizer.refresh(state, {"w": jnp.asarray([0.0, 2.0])})
    assert state.curvature["w"].tolist() == pytest.approx([3, 0.65])  # 0.75 h + 0.25 h_hat
    updates, state = optimizer.update({"w": jnp.asarray([0.0, 0.5])}, state, {"w": jnp.zeros(2)})
    # m = [0.2, 0.1], rho h = [1.5, 0.325].
    assert updates["w"].tolist() == pytest.approx([-0.1 * 0.2 / 1.5, -0.1 * 0.1 / 0.325])
    assert (int(state.count), int(state.refresh_count)) == (2, 2)


def test_sign_steps_where_the_curvature_is_zero_or_negative():
    updates, _ = one_step(SophiaH(**PLAIN), [0.5, -0.5, 2e-7, -2e-7, 0.0], [0, -3, -1e-9, 0, -3], [0] * 5)
    assert updates.tolist() == pytest.approx([-0.1, 0.1, -0.1, 0.1, 0.0])


def test_eps_is_the_floor_of_the_denominator():
    # rho h = [0.005, 0.02] and eps = 0.01: the floor holds in the first only, and is not added in the second.
    updates, _ = one_step(SophiaG(**PLAIN | {"eps": 0.01}), [0.005, 0.005], [0.01, 0.04], [0, 0])
    assert updates.tolist() == pytest.approx([-0.1 * 0.5, -0.1 * 0.25])


def test_an_added_eps_flips_the_step_where_the_curvature_is_negative():
    optimizer = ReproducedSophia(**PLAIN | {"eps": 0.5}, denominator="add")
    # rho h + eps = [2, 0.5, -1, 0.25], where a floor of 0.5 would make it [1.5, 0.5, 0.5, 0.5].
    updates, _ = one_step(optimizer, [1.0, 0.25, 0.25, 0.125], [3, 0, -3, -0.5], [0] * 4)
    assert updates.tolist() == pytest.approx([-0.05, -0.05, 0.025, -0.05])


def test_the_estimate_enters_before_or_after_the_update():
    """`update` with an estimate is `refresh` and `update`, in the order that is asked for."""
    params, grads = {"w": jnp.asarray([1.0, -2.0])}, {"w": jnp.asarray([0.8, -0.6])}
    h_hat = {"w": jnp.asarray([16.0, 8.0])}
    for order, wanted in (("before", [-0.02, 0.03]), ("after", [-0.1, 0.1])):
        optimizer = ReproducedSophia(**PLAIN, refresh_order=order)
        state = optimizer.init(params)
        if order == "before":
            by_hand = optimizer.update(grads, optimizer.refresh(state, h_hat), params)
        else:
            updates, after = optimizer.update(grads, state, params)
            by_hand = updates, optimizer.refresh(after, h_hat)
        found = optimizer.update(grads, state, params, h_hat)
        assert_trees_equal(found, by_hand)
        assert found[0]["w"].tolist() == pytest.approx(wanted)
        assert found[1].curvature["w"].tolist() == pytest.approx([4, 2])


PARAMS = eqx.filter(model(), eqx.is_inexact_array)


@pytest.mark.parametrize(
    ("mask", "decays"),
    [
        pytest.param(None, (True, True), id="none"),
        pytest.param(jax.tree.map(lambda leaf: leaf.ndim > 1, PARAMS), (True, False), id="parameters"),
        pytest.param(lambda params: jax.tree.map(lambda leaf: leaf.ndim == 1, params), (False, True), id="function"),
    ],
)
def test_weight_decay_masks(mask, decays):
    optimizer = SophiaG(**PLAIN | {"weight_decay": 0.5}, weight_decay_mask=mask)
    updates, _ = optimizer.update(grads_of([0.0, 0.0], 0.0), optimizer.init(model()), model())
    assert updates.weight.tolist() == [pytest.approx([-0.05, 0.1]) if decays[0] else [0, 0]]
    assert updates.bias.tolist() == pytest.approx([-0.2 * decays[1]])


def corrected(momentum, curvature):
    """Updates over three steps of gradient 1, refreshed with 2 before the first and 4 before the third."""
    switches = {"bias_correct_momentum": momentum, "bias_correct_curvature": curvature}
    optimizer = SophiaG(**PLAIN | {"b2": 0.9, "rho": 1.0} | switches)
    params = {"w": jnp.zeros(1)}
    state = optimizer.init(params)
    found = []
    for h_hat in (20.0, None, 40.0):
        if h_hat is not None:
            state = optimizer.refresh(state, {"w": jnp.asarray([h_hat])})
        updates, state = optimizer.update({"w": jnp.ones(1)}, state, params)
        found.append(-float(updates["w"][0]) / 0.1)
    return found


def test_bias_corrections():
    # m = 1/2, 3/4, 7/8 and h = 2, 2, 5.8; corrected m = 1, 1, 1 and h = 20, 20, 5.8 / 0.19.
    assert corrected(False, False) == pytest.approx([0.25, 0.375, 0.875 / 5.8], rel=1e-5)
    assert corrected(True, False) == pytest.approx([0.5, 0.5, 1 / 5.8], rel=1e-5)
    assert corrected(False, True) == pytest.approx([0.025, 0.0375, 0.875 * 0.19 / 5.8], rel=1e-5)
    assert corrected(True, True) == pytest.approx([0.05, 0.05, 0.19 / 5.8], rel=1e-5)


def test_corrected_curvature_before_the_first_refresh_is_zero():
    updates, _ = one_step(SophiaG(**PLAIN | {"bias_correct_curvature": True}), [0.5, -0.5], [0, 0], [0, 0], refreshes=0)
    assert updates.tolist() == pytest.approx([-0.1, 0.1])


def test_schedules():
    """Learning rate, rho and weight decay at the count of updates before this one; one looks up a table."""
    rates = jnp.asarray([0.1, 0.2, 0.3, 0.4])
    optimizer = SophiaG(
        **PLAIN
        | {
            "learning_rate": lambda count: rates[count],
            "rho": lambda count: 1.0 + count,
            "weight_decay": lambda count: 0.5 * count,
        }
    )
    step = jax.jit(lambda count: one_step(optimizer, [1.0], [2.0], [1.0], count=count)[0])
    for count in (0, 3):
        rate = 0.1 * (count + 1)
        assert step(count).tolist() == pytest.approx([-rate * 1 / (2 * (1 + count)) - rate * 0.5 * count])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"interval": 10}, [0, 10, 20]),
        ({"interval": np.int64(10), "first_refresh": 9}, [9, 19]),
        ({"interval": 4, "first_refresh": np.int32(15)}, [15, 19, 23]),
        ({"interval": 1}, list(range(25))),
        ({"interval": 10, "initial_refreshes": 3}, [0, 1, 2, 10, 20]),
        ({"interval": 10, "initial_refreshes": 12}, [*range(12), 20]),
        ({"interval": 10, "first_refresh": 9, "initial_refreshes": np.int64(2)}, [9, 10, 19]),
    ],
)
def test_refresh_due(settings, steps):
    optimizer = ReproducedSophia(**settings)
    assert np.flatnonzero(jax.vmap(optimizer.refresh_due)(jnp.arange(25))).tolist() == steps
    assert all(optimizer.refresh_due(step) is (step in steps) for step in range(25))


def test_a_gradient_transformation_comes_first():
    """The parameters reach it too, and its state is carried along."""
    optimizer = SophiaG(**PLAIN, gradient_transform=optax.chain(optax.add_decayed_weights(0.5), optax.trace(0.5)))
    params = {"w": jnp.asarray([1.0, -2.0])}
    state = optimizer.init(params)
    for wanted in ([0.25, -0.5], [0.125 + 0.375, -0.25 - 0.75]):
        # Gradients 0, so that what arrives is 0.5 w, then 0.5 w + 0.25 w.
        _, state = optimizer.update({"w": jnp.zeros(2)}, state, params)
        assert state.momentum["w"].tolist() == wanted


def test_metrics():
    optimizer = SophiaH(**PLAIN | {"rho": 0.5, "eps": 0.1})
    # Denominators 1, 0.1, 0.1, 2: the first and the last are not clipped.
    metrics = optimizer.metrics(state_of([-0.9, 0.2, 0.1, 1.2], [2, -3, 0, 4]))
    assert set(metrics) == {"win_rate", "rho", "curvature_norm", "curvature_nonpositive", "momentum_norm"} | {
        "skipped_updates",
        "skipped_refreshes",
        "steps_since_refresh",
    }
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}
    assert metrics["win_rate"] == 0.5
    assert (metrics["rho"], metrics["skipped_updates"], metrics["skipped_refreshes"]) == (0.5, 0, 0)
    assert metrics["curvature_nonpositive"] == 0.5
    assert float(metrics["curvature_norm"]) == pytest.approx(29**0.5)
    assert float(metrics["momentum_norm"]) == pytest.approx(2.3**0.5)


def test_win_rate_is_that_of_the_update_before():
    """With corrections and with rho at the last update's count."""
    shared = PLAIN | {"rho": lambda count: jnp.where(count == 2, 1.0, 1e9)}
    optimizer = SophiaG(**shared | {"bias_correct_momentum": True, "bias_correct_curvature": True})
    # After three updates m / (1 - 0.5^3) = [0.8, 1.2] and h / (1 - 0.75^2) = [1, 1].
    state = state_of([0.7, 1.05], [0.4375, 0.4375], count=3, refreshes=2)
    assert optimizer.metrics(state)["win_rate"] == 0.5
    assert optimizer.metrics(state)["rho"] == 1.0


def test_nothing_is_won_where_the_curvature_is_zero():
    """As in embedding rows that no token has reached: m = 0 is below eps there."""
    metrics = SophiaG(**PLAIN).metrics(state_of([0.0, 0.0, 0.1, 0.0], [0, -1, 4, 4]))
    assert metrics["win_rate"] == 0.5


def test_metrics_of_half_precision_momentum_do_not_underflow():
    optimizer = SophiaG()
    state = optimizer.init({"w": jnp.zeros(4, jnp.float16)})
    state = eqx.tree_at(lambda s: s.momentum["w"], state, jnp.full(4, 1e-5, jnp.float16))
    assert float(optimizer.metrics(state)["momentum_norm"]) == pytest.approx(2e-5, rel=0.01)


def run(optimizer, steps=12):
    """Parameters after some updates and refreshes, in a scan."""
    params = {"w": jnp.asarray([1.0, -2.0, 0.5])}
    grads = jax.random.normal(jax.random.key(0), (steps, 3))

    def step(carry, grad):
        params, state = carry
        refreshed = optimizer.refresh(state, {"w": 5 * grad**2})
        due = optimizer.refresh_due(state.count)
        state = jax.tree.map(lambda new, old: jnp.where(due, new, old), refreshed, state)
        updates, state = optimizer.update({"w": grad}, state, params)
        return (eqx.apply_updates(params, updates), state), optimizer.metrics(state)["win_rate"]

    return jax.lax.scan(step, (params, optimizer.init(params)), grads)


def test_scan_and_a_batch_of_optimizers():
    """Each takes its own steps; those of one are by hand and golden above."""
    rates = [0.0, 0.01, 0.3]
    shared = PLAIN | {"weight_decay": 0.2, "rho": 0.4}
    batch = eqx.filter_vmap(lambda rate: SophiaG(**shared | {"learning_rate": rate}, interval=3))(jnp.asarray(rates))
    (params, state), _ = eqx.filter_jit(eqx.filter_vmap(run))(batch)
    for i, rate in enumerate(rates):
        (wanted, _), _ = eqx.filter_jit(run)(SophiaG(**shared | {"learning_rate": jnp.asarray(rate)}, interval=3))
        np.testing.assert_allclose(params["w"][i], wanted["w"], rtol=2e-6)
    assert state.count.tolist() == [12] * 3
    assert state.refresh_count.tolist() == [4] * 3


def test_more_parameters_than_an_int32_counts():
    optimizer = SophiaG(learning_rate=1e-3)
    model = {"w": jax.ShapeDtypeStruct((3, 2**30), jnp.float32)}
    metrics = jax.eval_shape(lambda model: optimizer.metrics(optimizer.init(model)), model)
    assert metrics["win_rate"].shape == ()
