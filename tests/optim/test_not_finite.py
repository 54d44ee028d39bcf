"""Where a gradient or an estimate is not finite, nothing changes but counts, in every optimizer."""

import jax
import jax.numpy as jnp
import optax
import pytest
from trajectories import assert_trees_equal

from sophia_levanter.optim import AdamW, ReproducedSophia, Soap, SophiaG

BAD = [float("nan"), float("inf"), -float("inf")]
PARAMS = {"w": jnp.asarray([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]]), "b": jnp.ones(2)}
GOOD = jax.tree.map(jnp.ones_like, PARAMS)
# Both have states that must stay: `optax.ema` divides by 1 - decay^count, and the noise has a key.
TRANSFORM = optax.chain(optax.ema(0.5), optax.add_noise(1e-3, 0.5, jax.random.key(0)))


def spoilt():
    """Gradients or estimates with one number that is not finite, in either leaf."""
    for bad in BAD:
        yield GOOD | {"w": GOOD["w"].at[1, 0].set(bad)}
        yield GOOD | {"b": GOOD["b"].at[0].set(bad)}


def all_nonzero(tree):
    return all(leaf.all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("order", "cautious"), [("before", False), ("after", True)])
def test_a_gradient_that_is_not_finite_changes_nothing_but_counts(order, cautious):
    optimizer = ReproducedSophia(
        b1=0.5, rho="auto", weight_decay=0.3, gradient_transform=TRANSFORM, refresh_order=order, cautious=cautious
    )
    update = jax.jit(optimizer.update)
    _, before = update(GOOD, optimizer.init(PARAMS), PARAMS, GOOD)
    _, before = update(GOOD, before, PARAMS, GOOD)
    counted = before._replace(
        count=jnp.int32(3),
        skipped_updates=jnp.int32(1),
        skipped_refreshes=jnp.int32(1),
        refresh_pending=jnp.asarray(True),
        steps_since_refresh=before.steps_since_refresh + 1,
    )
    for grads in spoilt():
        updates, after = update(grads, before, PARAMS, GOOD)
        assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        assert_trees_equal(after, counted)
    updates, after = update(GOOD, after, PARAMS, GOOD)
    assert all_nonzero(updates)
    counts = (after.count, after.refresh_count, after.skipped_updates, after.skipped_refreshes, after.refresh_pending)
    assert [int(count) for count in counts] == [4, 3, 1, 1, 0]
    assert optimizer.metrics(after)["skipped_updates"] == optimizer.metrics(after)["skipped_refreshes"] == 1


@pytest.mark.parametrize("cls", [AdamW, Soap])
def test_the_baselines_are_left_in_the_same_way(cls):
    """All of them by the `update` that they inherit."""
    optimizer = cls(0.1, weight_decay=0.3, gradient_transform=TRANSFORM)
    update = jax.jit(optimizer.update)
    _, before = update(GOOD, optimizer.init(PARAMS), PARAMS)
    counts = [leaf + jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(before.optax_state)]
    for grads in spoilt():
        updates, after = update(grads, before, PARAMS)
        assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        assert_trees_equal(jax.tree.leaves(after.optax_state), counts)
        assert_trees_equal(after.gradient_state, before.gradient_state)
    assert [int(count) for count in optax.tree.get_all_with_path(after.optax_state, "count")[0][1:]] == [2]
    assert all_nonzero(update(GOOD, after, PARAMS)[0])


@pytest.mark.parametrize("given", [{}, {"finite": jnp.asarray(True)}])
def test_an_estimate_that_is_not_finite_skips_that_refresh_only(given):
    optimizer = SophiaG(b1=0.5, b2=0.75, rho="auto")
    _, before = optimizer.update(GOOD, optimizer.init(PARAMS), PARAMS, GOOD)
    counted = before._replace(skipped_refreshes=jnp.int32(1), refresh_pending=jnp.asarray(True))
    without = optimizer.update(GOOD, counted, PARAMS)
    assert all_nonzero(without[0])
    for h_hat in spoilt():
        assert_trees_equal(optimizer.refresh(before, h_hat, **given), counted)
        assert_trees_equal(optimizer.update(GOOD, before, PARAMS, h_hat, **given), without)
    retried = optimizer.refresh(without[1], GOOD)
    assert (int(retried.refresh_count), int(retried.skipped_refreshes), bool(retried.refresh_pending)) == (2, 1, False)


@pytest.mark.parametrize("finite", [False, jnp.asarray(False)])
def test_the_caller_may_know_that_the_gradient_is_not_finite(finite):
    """As when the loss was not, or another process's part of the gradient."""
    optimizer = SophiaG()
    before = optimizer.init(PARAMS)
    updates, after = optimizer.update(GOOD, before, PARAMS, GOOD, finite=finite)
    assert_trees_equal((updates, after.momentum, after.curvature), (before.momentum,) * 2 + (before.curvature,))
    assert (int(after.count), int(after.skipped_updates), int(after.skipped_refreshes)) == (1, 1, 1)
    updates, after = optimizer.update(GOOD, before, PARAMS, finite=not finite)
    assert (int(after.skipped_updates), all_nonzero(updates)) == (0, True)


def test_a_transformation_that_overflows_is_a_gradient_that_is_not_finite():
    optimizer = SophiaG(gradient_transform=optax.scale(1e39))
    _, state = optimizer.update(GOOD, optimizer.init(PARAMS), PARAMS)
    assert int(state.skipped_updates) == 1
    assert jnp.isfinite(state.momentum["w"]).all()


def test_an_estimate_beyond_the_curvatures_dtype_is_skipped():
    optimizer = SophiaG(curvature_dtype=jnp.float16)
    params = {"w": jnp.zeros(1)}
    state = optimizer.refresh(optimizer.init(params), {"w": jnp.full(1, 1e8)})
    assert (float(state.curvature["w"][0]), int(state.skipped_refreshes)) == (0.0, 1)


def test_skipped_updates_do_not_count_in_the_bias_correction():
    """After three gradients that were not finite the first step is as long as without them."""
    optimizer = SophiaG(learning_rate=0.1, b1=0.9, rho=1.0, weight_decay=0.0)
    params, lengths = {"w": jnp.zeros(1)}, []
    for bad in (0, 3):
        state = optimizer.refresh(optimizer.init(params), {"w": jnp.full(1, 4.0)})
        for _ in range(bad):
            _, state = optimizer.update({"w": jnp.full(1, jnp.nan)}, state, params)
        updates, _ = optimizer.update({"w": jnp.ones(1)}, state, params)
        lengths.append(float(updates["w"][0]))
    assert lengths == pytest.approx([-0.025, -0.025], rel=1e-5)


@pytest.mark.parametrize(
    ("order", "given", "expected"),
    [
        ("before", "good bad none good none", [1, 2, 3, 1, 2]),
        ("after", "none good none none bad", [1, 0, 1, 2, 3]),
        ("before", "none none none", [1, 2, 3]),  # sign descent for ever
    ],
)
def test_updates_since_the_last_refresh_are_counted(order, given, expected):
    optimizer = ReproducedSophia(refresh_order=order)
    params = {"w": jnp.asarray([1.0, -2.0])}
    estimates = {"good": params, "bad": {"w": jnp.asarray([1.0, jnp.nan])}, "none": None}
    state, counted = optimizer.init(params), []
    for name in given.split():
        _, state = optimizer.update(params, state, params, estimates[name])
        counted.append(int(optimizer.metrics(state)["steps_since_refresh"]))
    assert counted == expected
