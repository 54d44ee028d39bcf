import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_levanter.optim import AdamW, Lion, Muon, Soap, SophiaG

STEPS = 6
GRADS = np.random.default_rng(0).normal(size=(STEPS, 6)).astype(np.float32)


class Model(eqx.Module):
    weight: jax.Array
    bias: jax.Array
    steps: jax.Array
    name: str = eqx.field(static=True, default="model")

    def __call__(self, x):
        raise AssertionError("the optimizer must not call the model, nor a mask of its shape")


def start():
    return Model(jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), jnp.asarray([4.0, -1.0]), jnp.int32(7))


def grads_at(step):
    zeros = eqx.filter(start(), eqx.is_inexact_array)
    g = GRADS[step]
    return eqx.tree_at(lambda m: (m.weight, m.bias), zeros, (jnp.asarray(g[:4].reshape(2, 2)), jnp.asarray(g[4:])))


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def trajectory(optimizer, transformation=None):
    """Parameters [step, coordinate] under an optimizer, or under an optax transformation."""
    model = start()
    params = eqx.filter(model, eqx.is_inexact_array)
    state = optimizer.init(model) if transformation is None else transformation.init(params)
    update = eqx.filter_jit((optimizer if transformation is None else transformation).update)
    found = []
    for step in range(STEPS):
        updates, state = update(grads_at(step), state, model if transformation is None else params)
        model, params = eqx.apply_updates(model, updates), eqx.apply_updates(params, updates)
        assert (int(model.steps), model.name) == (7, "model")
        found.append(np.concatenate([np.ravel(params.weight), np.ravel(params.bias)]))
    return np.stack(found)


def rate(count):
    return 0.01 * (count + 1)


@pytest.mark.parametrize("nesterov", [False, True])
def test_adamw_is_optax_adamw(nesterov):
    ours = trajectory(AdamW(rate, 0.8, 0.9, 1e-6, 0.3, matrices, nesterov=nesterov))
    theirs = optax.adamw(rate, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, mask=matrices, nesterov=nesterov)
    np.testing.assert_array_equal(ours, trajectory(None, theirs))


def test_lion_is_optax_lion():
    ours = trajectory(Lion(rate, 0.8, 0.9, 0.3, matrices))
    theirs = trajectory(None, optax.lion(rate, b1=0.8, b2=0.9, weight_decay=0.3, mask=matrices))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("mask", [None, matrices])
def test_adamw_by_hand(mask):
    theta = np.asarray([1, -2, 0.5, 3, 4, -1], np.float64)
    decayed = np.asarray([1, 1, 1, 1, mask is None, mask is None], np.float64)
    m = v = np.zeros(6)
    wanted = []
    for t, g in enumerate(GRADS.astype(np.float64), start=1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        ratio = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        theta = theta - 0.05 * (ratio + 0.3 * decayed * theta)
        wanted.append(theta)
    np.testing.assert_allclose(trajectory(AdamW(0.05, 0.8, 0.9, 1e-3, 0.3, mask)), wanted, rtol=1e-5)


def test_nadamw_by_hand():
    theta = np.asarray([1, -2, 0.5, 3, 4, -1], np.float64)
    m = v = np.zeros(6)
    wanted = []
    for t, g in enumerate(GRADS.astype(np.float64), start=1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        ahead = 0.8 * m / (1 - 0.8 ** (t + 1)) + 0.2 * g / (1 - 0.8**t)
        theta = theta - 0.05 * (ahead / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + 0.3 * theta)
        wanted.append(theta)
    np.testing.assert_allclose(trajectory(AdamW(0.05, 0.8, 0.9, 1e-3, 0.3, nesterov=True)), wanted, rtol=1e-5)


def test_lion_by_hand():
    theta = np.asarray([1, -2, 0.5, 3, 4, -1], np.float64)
    m, wanted = np.zeros(6), []
    for g in GRADS.astype(np.float64):
        theta = theta - 0.05 * (np.sign(0.8 * m + 0.2 * g) + 0.3 * theta)
        m = 0.9 * m + 0.1 * g
        wanted.append(theta)
    np.testing.assert_allclose(trajectory(Lion(0.05, 0.8, 0.9, 0.3)), wanted, rtol=1e-5)


@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap])
def test_mask_tree_of_the_models_class(cls):
    mask = matrices(eqx.filter(start(), eqx.is_inexact_array))
    assert callable(mask)
    by_tree = trajectory(cls(0.05, weight_decay=0.3, weight_decay_mask=mask))
    np.testing.assert_array_equal(by_tree, trajectory(cls(0.05, weight_decay=0.3, weight_decay_mask=matrices)))


@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap])
def test_metrics_and_refresh(cls):
    optimizer = cls(b1=0.5, b2=0.5)
    params = {"w": jnp.zeros(2)}
    state = optimizer.init(params)
    assert optimizer.metrics(state)["momentum_norm"] == 0
    _, state = optimizer.update({"w": jnp.asarray([6.0, 8.0])}, state, params)
    metrics = optimizer.metrics(state)
    assert list(metrics) == ["momentum_norm"]
    assert float(metrics["momentum_norm"]) == pytest.approx(5)
    assert not any(optimizer.refresh_due(step) for step in range(20))


@pytest.mark.parametrize("cls", [AdamW, Lion])
def test_named_arrays(cls):
    named = {"w": hax.named(jnp.asarray([1.0, -2.0]), "embed")}
    optimizer = cls(0.1, weight_decay=0.0)
    updates, _ = optimizer.update(named, optimizer.init(named), named)
    assert updates["w"].axes == named["w"].axes
    assert updates["w"].array.tolist() == pytest.approx([-0.1, 0.1])


@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap])
def test_a_gradient_transformation_comes_first(cls):
    """Clipped inside is clipped by hand."""
    clip = optax.clip_by_global_norm(0.5)
    inside, outside = cls(0.1, gradient_transform=clip), cls(0.1)
    params = {"w": jnp.asarray([1.0, -2.0])}
    ours, theirs = inside.init(params), outside.init(params)
    for scale in (10.0, 0.1, 3.0):
        grads = {"w": scale * jnp.asarray([0.6, 0.8])}
        clipped, _ = clip.update(grads, clip.init(params))
        updates, ours = inside.update(grads, ours, params)
        wanted, theirs = outside.update(clipped, theirs, params)
        np.testing.assert_array_equal(updates["w"], wanted["w"])
        assert inside.metrics(ours) == outside.metrics(theirs)
    assert not np.array_equal(inside.metrics(ours)["momentum_norm"], 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap])
def test_a_gradient_that_is_not_finite_changes_nothing_but_counts(cls, bad):
    optimizer = cls(0.1, weight_decay=0.5, gradient_transform=optax.trace(0.5))
    good = {"w": jnp.ones(2), "b": jnp.ones(1)}
    _, before = optimizer.update(good, optimizer.init(good), good)
    spoilt = good | {"w": jnp.asarray([1.0, bad])}
    updates, after = jax.jit(optimizer.update)(spoilt, before, good)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))

    def compare(new, old):
        wanted = old + 1 if jnp.issubdtype(old.dtype, jnp.integer) else old
        np.testing.assert_array_equal(new, wanted)

    jax.tree.map(compare, after, before)
    assert [int(count) for count in optax.tree.get_all_with_path(after, "count")[0][1:]] == [2]
    updates, _ = optimizer.update(good, after, good)
    assert all(leaf.all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap])
def test_the_caller_may_know_that_the_gradient_is_not_finite(cls):
    optimizer = cls(0.1)
    params = {"w": jnp.ones(2)}
    before = optimizer.init(params)
    updates, after = optimizer.update(params, before, params, finite=jnp.asarray(False))
    assert updates["w"].tolist() == [0, 0]
    assert optimizer.metrics(after)["momentum_norm"] == 0


@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap])
@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", -1.0), ("b1", 1.0), ("b1", -0.1), ("b2", 1.0), ("b2", -0.1), ("weight_decay", -1.0)],
)
def test_argument_out_of_range(cls, name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value}; it must be in \[0, "):
        cls(**{name: value})


@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap])
def test_argument_of_the_wrong_kind(cls):
    with pytest.raises(
        TypeError, match=r"^learning_rate is '0\.1'; it must be a number or a function of the update count"
    ):
        cls(learning_rate="0.1")
    with pytest.raises(TypeError, match=r"^weight_decay is a function; it must be a number"):
        cls(weight_decay=lambda count: 0.1)


@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap])
def test_models_that_cannot_be_optimized(cls):
    with pytest.raises(ValueError, match="the model has no floating-point array to optimize"):
        cls().init({"steps": jnp.int32(1)})
    with pytest.raises(TypeError, match=r"^model\['z'\] is complex"):
        cls().init({"z": jnp.ones(1, jnp.complex64)})


@pytest.mark.parametrize("cls", [AdamW, Muon, Soap])
def test_eps_out_of_range(cls):
    with pytest.raises(ValueError, match=r"^eps is -1\.0; it must be in \[0, inf\)"):
        cls(eps=-1.0)


def test_nesterov_is_a_switch():
    with pytest.raises(TypeError, match=r"^nesterov is 1; it must be True or False"):
        AdamW(nesterov=1)


@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap])
def test_a_parameter_may_have_the_name_of_the_moment(cls):
    optimizer = cls(b1=0.5, b2=0.5)
    params = {"mu": jnp.zeros(2)}
    _, state = optimizer.update({"mu": jnp.asarray([6.0, 8.0])}, optimizer.init(params), params)
    assert float(optimizer.metrics(state)["momentum_norm"]) == pytest.approx(5)


@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap])
def test_other_trees_are_named(cls):
    params = {"w": jnp.ones(2), "b": jnp.ones(3)}
    optimizer = cls()
    with pytest.raises(ValueError, match=r"grads\['b'\] has shape missing, the parameter has \(3,\)"):
        optimizer.update({"w": jnp.ones(2)}, optimizer.init(params), params)
    with pytest.raises(ValueError, match=r"weight_decay_mask does not fit the parameters: it has nothing for \['b'\]"):
        cls(weight_decay_mask={"w": True}).init(params)


@pytest.mark.parametrize("cls", [SophiaG, AdamW, Lion, Muon, Soap])
def test_the_gradient_transforms_state_stays(cls):
    """Its counts and keys too: `optax.ema` divides by 1 - decay^count."""
    optimizer = cls(gradient_transform=optax.chain(optax.ema(0.9), optax.add_noise(0.1, 0.5, jax.random.key(0))))
    params = {"w": jnp.ones(2)}

    before = optimizer.init(params)
    _, after = optimizer.update({"w": jnp.full(2, jnp.nan)}, before, params)
    leaves = (jax.tree.leaves(state.gradient_state) for state in (before, after))
    for old, new in zip(*leaves, strict=True):
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            old, new = jax.random.key_data(old), jax.random.key_data(new)
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("cls", [AdamW, Lion, Muon, Soap])
def test_a_narrow_momentum(cls):
    """Its dtype stays, and the steps stay near those of a wide one."""
    params = {"w": jnp.asarray([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])}

    def run(optimizer):
        state, steps = optimizer.init(params), []
        for step in range(5):
            updates, state = optimizer.update({"w": jnp.cos(params["w"] + step)}, state, params)
            steps.append(updates["w"])
        return jnp.stack(steps), state

    (narrow, state), (wide, _) = run(cls(0.1, momentum_dtype=jnp.bfloat16)), run(cls(0.1))
    assert jnp.dtype(jnp.bfloat16) in {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert narrow.dtype == jnp.float32
    assert jnp.linalg.norm(narrow - wide) < 0.05 * jnp.linalg.norm(wide)
