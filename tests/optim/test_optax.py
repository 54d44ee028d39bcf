import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_levanter.optim import ReproducedSophia, SophiaG, SophiaH, WinRateController, sophia_g

SETTINGS = {"b1": 0.5, "b2": 0.75, "rho": 0.5, "eps": 1e-8, "weight_decay": 0.2}
STEPS = 4


class Layer(eqx.Module):
    weight: jax.Array
    bias: jax.Array
    steps: jax.Array
    name: str = eqx.field(static=True, default="layer")

    def __call__(self, x):
        raise AssertionError("a tree of the model's class must not be called")


class Model(eqx.Module):
    encoder: Layer
    decoder: Layer
    scale: jax.Array


def arrays(seed):
    """The differentiable part of a model, of normal numbers."""
    rng = np.random.default_rng(seed)
    a, b, c, d, e = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SHAPES)
    model = Model(Layer(a, b, jnp.int32(3)), Layer(c, d, jnp.int32(4)), e)
    return eqx.filter(model, eqx.is_inexact_array)


SHAPES = [(2, 3), (3,), (3, 2), (2,), ()]
PARAMS = arrays(0)
GRADS = [arrays(1 + step) for step in range(STEPS)]
H_HATS = [jax.tree.map(lambda x: 20 * x**2, arrays(9 + step)) for step in range(STEPS)]
SOME_H_HATS = [None, H_HATS[1], None, H_HATS[3]]


def follow(transformation, h_hats=H_HATS, grads=GRADS):
    """The updates of each step, and the last state; an estimate that is None is not given."""
    params, state, found = PARAMS, transformation.init(PARAMS), []
    update = jax.jit(transformation.update)
    for grad, h_hat in zip(grads, h_hats, strict=True):
        updates, state = update(grad, state, params, **({} if h_hat is None else {"h_hat": h_hat}))
        params = optax.apply_updates(params, updates)
        found.append(updates)
    return found, state


def by_hand(optimizer, h_hats=H_HATS, grads=GRADS):
    params, state, found = PARAMS, optimizer.init(PARAMS), []
    update = eqx.filter_jit(optimizer.update)
    for grad, h_hat in zip(grads, h_hats, strict=True):
        updates, state = update(grad, state, params, h_hat)
        params = eqx.apply_updates(params, updates)
        found.append(updates)
    return found, state


def assert_close(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-5, atol=1e-7), found, wanted)


@pytest.mark.parametrize("order", ["before", "after"])
def test_as_optax_is_the_optimizer(order):
    optimizer = ReproducedSophia(learning_rate=0.1, **SETTINGS, refresh_order=order)
    assert_close(follow(optimizer.as_optax(), SOME_H_HATS), by_hand(optimizer, SOME_H_HATS))


def test_a_model_with_other_leaves_may_be_given_whole():
    """As `eqx.filter_jit` users have it; optax's own transformations need the filtered one."""
    model = Model(Layer(*jax.tree.leaves(PARAMS)[:2], jnp.int32(3)), PARAMS.decoder, PARAMS.scale)
    transformation = SophiaG(0.1, **SETTINGS).as_optax()
    found = eqx.filter_jit(transformation.update)(GRADS[0], transformation.init(model), model, h_hat=H_HATS[0])
    assert_close(found, transformation.update(GRADS[0], transformation.init(PARAMS), PARAMS, h_hat=H_HATS[0]))


def test_a_chain_with_clipping_is_clipping_in_the_optimizer():
    optimizer = SophiaG(0.1, **SETTINGS)
    clip = optax.clip_by_global_norm(1.0)
    found, state = follow(optax.chain(clip, optimizer.as_optax()))
    wanted, _ = by_hand(SophiaG(0.1, **SETTINGS, gradient_transform=clip))
    assert_close(found, wanted)
    assert int(state[1].refresh_count) == STEPS
    assert not np.allclose(found[0].scale, by_hand(optimizer)[0][0].scale)


def test_parameters_are_needed():
    transformation = SophiaG().as_optax()
    with pytest.raises(ValueError, match=r"^params is None; Sophia's update requires the parameters"):
        transformation.update(PARAMS, transformation.init(PARAMS))


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def labels(params):
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", params)


MASKS = {
    "function": lambda params: jax.tree.map(lambda leaf: leaf.ndim != 1, params),
    "tree": jax.tree.map(lambda leaf: leaf.ndim != 1, PARAMS),
    "prefix": eqx.tree_at(lambda p: (p.encoder, p.decoder, p.scale), PARAMS, (True, False, True)),
}


@pytest.mark.parametrize(("mask", "masked_by_optax"), [("function", False), ("tree", True), ("prefix", False)])
def test_groups_may_have_different_learning_rates(mask, masked_by_optax):
    """Sophia goes coordinate by coordinate, so that each group is as under its rate alone, estimate and mask too."""
    rates = {"matrix": 0.1, "vector": 0.02}
    settings = SETTINGS | {"weight_decay_mask": MASKS[mask]}
    groups = {name: SophiaG(rate, **settings).as_optax() for name, rate in rates.items()}
    transformation = optax.multi_transform(groups, labels, mask_compatible_extra_args=masked_by_optax)
    found, state = follow(transformation, SOME_H_HATS)
    alone = {name: by_hand(SophiaG(rate, **settings), SOME_H_HATS) for name, rate in rates.items()}
    for step in range(STEPS):
        wanted = [alone[name][0][step] for name in rates]
        assert_close(
            found[step], jax.tree.map(lambda is_matrix, m, v: m if is_matrix else v, matrices(PARAMS), *wanted)
        )
    for name in rates:
        inner = state.inner_states[name].inner_state
        assert int(inner.refresh_count) == 2
        h, whole = jax.tree.leaves(inner.curvature), jax.tree.leaves(alone[name][1].curvature)
        assert_close(h, [leaf for leaf in whole if (leaf.ndim > 1) == (name == "matrix")])


def test_a_mask_that_fits_no_parameter_is_found_in_a_group_too():
    wrong = {"a": True, "b": True, "typo": False}
    groups = {name: SophiaG(weight_decay_mask=wrong).as_optax() for name in "xy"}
    transformation = optax.multi_transform(groups, {"a": "x", "b": "y"})
    params = {"a": jnp.ones(1), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"\['typo'\] is not a parameter"):
        transformation.update(params, transformation.init(params), params)


def test_frozen_parameters_and_a_group_without_any():
    groups = {"matrix": SophiaH(0.1).as_optax(), "vector": optax.set_to_zero(), "other": SophiaG(0.1).as_optax()}
    found, state = follow(optax.multi_transform(groups, labels))
    wanted, _ = by_hand(SophiaH(0.1))
    for ours, theirs in zip(found, wanted, strict=True):
        expected = jax.tree.map(lambda leaf: leaf if leaf.ndim > 1 else 0 * leaf, theirs)
        assert_close(ours, expected)
    assert jax.tree.leaves(state.inner_states["other"].inner_state.momentum) == []


def test_apply_if_finite():
    """A bad gradient reaches Sophia not at all, not even its counts; the steps after it are as if it were left out."""
    optimizer = SophiaG(0.1, **SETTINGS)
    bad = jax.tree.map(lambda x: x * jnp.nan, GRADS[1])
    found, state = follow(optax.apply_if_finite(optimizer.as_optax(), 3), grads=[GRADS[0], bad, *GRADS[2:]])
    wanted, inner = by_hand(optimizer, [H_HATS[0], *H_HATS[2:]], [GRADS[0], *GRADS[2:]])
    assert_close([found[0], *found[2:]], wanted)
    assert_close(state.inner_state, inner)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found[1]))
    assert int(state.total_notfinite) == 1


def test_multi_steps_take_the_estimate_of_the_last_micro_step():
    optimizer = SophiaG.paper(learning_rate=0.1, rho="auto")
    transformation = optax.MultiSteps(optimizer.as_optax(), 2).gradient_transformation()  # one `update`, compiled once
    mean = [jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[i : i + 2]) for i in (0, 2)]
    wanted, inner = by_hand(optimizer, [H_HATS[1], H_HATS[3]], mean)
    for h_hats in (SOME_H_HATS, H_HATS):
        found, state = follow(transformation, h_hats)
        assert_close([found[1], found[3]], wanted)
        assert_close(state.inner_opt_state, inner)
        assert not any(leaf.any() for step in (0, 2) for leaf in jax.tree.leaves(found[step]))
    _, early = follow(transformation, [H_HATS[0], None, H_HATS[2], None])
    assert int(early.inner_opt_state.refresh_count) == 0


@pytest.mark.parametrize("skip", [None, optax.skip_not_finite])
def test_multi_steps_and_a_gradient_that_is_not_finite(skip):
    """Without `skip_not_finite` no later step trains, and `skipped_updates` says so; with it a micro step is lost."""
    optimizer = SophiaG(0.1, **SETTINGS)
    transformation = optax.MultiSteps(optimizer.as_optax(), 2, should_skip_update_fn=skip).gradient_transformation()
    for bad, value in ((0, jnp.nan), (2, jnp.inf), (3, -jnp.inf)):
        grads = [*GRADS, *GRADS]
        grads[bad] = jax.tree.map(lambda x, value=value: x * value, grads[bad])
        found, state = follow(transformation, [H_HATS[0]] * 8, grads)
        moved = sum(any(leaf.any() for leaf in jax.tree.leaves(updates)) for updates in found)
        skipped = int(optimizer.metrics(state.inner_opt_state)["skipped_updates"])
        assert (moved, skipped, int(state.gradient_step)) == (
            (bad // 2, 4 - bad // 2, 4) if skip is None else (3, 0, 3)
        )


def run_eagerly(transformation, steps, h_hat_at=()):
    params = {"w": jnp.ones(2)}
    state = transformation.init(params)
    for step in range(steps):
        _, state = transformation.update(params, state, params, h_hat=params if step in h_hat_at else None)


@pytest.mark.parametrize(
    ("wrap", "updates"),
    [
        (lambda: SophiaG(interval=2).as_optax(), 3),
        (lambda: ReproducedSophia(interval=3, first_refresh=2).as_optax(), 6),
        (lambda: optax.chain(optax.clip(1.0), SophiaG(interval=1).as_optax()), 2),
    ],
)
def test_updates_without_any_estimate_are_warned_of_once(wrap, updates):
    with pytest.warns(UserWarning) as found:
        run_eagerly(wrap(), updates + 2)
    (message,) = [str(warning.message) for warning in found]
    assert message == (
        f"h_hat was None in all {updates} updates so far, so Sophia reduces to sign descent; "
        "pass an estimate when refresh_due(step) is True: update(grads, state, params, h_hat=h_hat)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_eagerly(wrap(), updates - 1)


@pytest.mark.parametrize("h_hat_at", [(0,), (2,), (0, 2, 4)])
def test_updates_with_an_estimate_are_not_warned_of(h_hat_at):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_eagerly(SophiaG(interval=2).as_optax(), 6, h_hat_at)
        run_eagerly(SophiaG(interval=2).as_optax(), 6, range(6))


def test_traced_updates_without_an_estimate_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        follow(SophiaG(interval=1).as_optax(), [None] * STEPS)


def test_inject_hyperparams_with_numbers_and_schedules():
    table = jnp.asarray([0.4, 0.2, 0.1, 0.05])
    schedules = {
        "learning_rate": lambda count: table[count],
        "rho": optax.linear_schedule(0.5, 0.1, STEPS),
        "weight_decay": lambda count: 0.1 * count,
    }
    shared = {"b1": 0.5, "b2": 0.75, "eps": 1e-8, "bias_correct_momentum": True}
    found, state = follow(optax.inject_hyperparams(sophia_g)(**shared, **schedules))
    wanted, inner = by_hand(SophiaG(**shared, **schedules))
    assert_close(found, wanted)
    assert_close(state.inner_state, inner)
    hyperparams = {name: float(value) for name, value in state.hyperparams.items()}
    assert hyperparams == pytest.approx(
        {"learning_rate": 0.05, "b1": 0.5, "b2": 0.75, "rho": 0.2, "eps": 1e-8, "weight_decay": 0.3}
    )


def test_a_learning_rate_may_be_changed_in_the_state():
    transformation = optax.inject_hyperparams(sophia_g)(learning_rate=0.1, b2=0.75, weight_decay_mask=MASKS["tree"])
    state = transformation.init(PARAMS)
    update = jax.jit(transformation.update)
    before, _ = update(GRADS[0], state, PARAMS, h_hat=H_HATS[0])
    state.hyperparams["learning_rate"] = jnp.asarray(0.3)
    after, state = update(GRADS[0], state, PARAMS, h_hat=H_HATS[0])
    assert_close(after, jax.tree.map(lambda leaf: 3 * leaf, before))
    assert before.scale != 0
    assert float(optax.tree.get(state, "learning_rate")) == pytest.approx(0.3)


def test_inject_hyperparams_with_a_mask_function_and_a_controller():
    given = {"learning_rate": 0.1, "rho": "auto", "weight_decay_mask": MASKS["function"]}
    make = optax.inject_hyperparams(sophia_g, static_args="weight_decay_mask")
    wanted, inner = by_hand(SophiaG(**given))
    for rho in ("auto", WinRateController()):
        found, state = follow(make(**given | {"rho": rho}))
        assert_close((found, state.inner_state), (wanted, inner))
    assert float(inner.rho) != 0.05


def test_parameters_in_the_state_are_found_as_optax_does():
    """`optax.tree.map_params` is how optax's users place or cast what is like the parameters."""
    transformation = optax.chain(optax.clip(1.0), SophiaG(rho="auto").as_optax())
    state = optax.tree.map_params(transformation, lambda leaf: leaf + 1, transformation.init(PARAMS))[1]
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    assert_close((state.momentum, state.curvature), (ones, ones))
    assert (int(state.count), float(state.rho)) == (0, pytest.approx(0.05))


def test_a_group_without_parameters_keeps_a_number_as_rho():
    groups = {name: SophiaG(rho="auto").as_optax() for name in "ab"}
    transformation = optax.multi_transform(groups, {"w": "a"})
    params = {"w": jnp.ones(2)}
    state = transformation.init(params)
    for _ in range(2):
        _, state = transformation.update(params, state, params, h_hat=params)
    assert jnp.isfinite(state.inner_states["b"].inner_state.rho)


def test_lookups_as_in_optax():
    state = optax.chain(optax.clip(1.0), SophiaH().as_optax()).init({"w": jnp.ones(2)})
    assert optax.tree.get(state, "curvature") is not None
    assert int(optax.tree.get(state, "count")) == 0
