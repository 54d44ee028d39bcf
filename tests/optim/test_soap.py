import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers
from trajectories import normal, rate, run

from sophia_levanter.optim import KroneckerBasis, Soap
from sophia_levanter.optim._soap import rotation_due

STEPS = 9


@pytest.mark.parametrize(("max_size", "both"), [(4, True), (3, False)])
def test_soap_by_hand(max_size, both):
    """Algorithm 3, with the second moment rotated as a diagonal is, on both sides or on the shorter one."""
    grads = [normal(3, 4, seed=seed) for seed in range(STEPS)]
    theta = np.asarray(normal(3, 4, seed=99), np.float64)
    found = run(
        Soap(rate, 0.8, 0.7, 1e-3, 0.3, interval=3, basis=KroneckerBasis(b2=0.7, max_size=max_size)),
        {"w": jnp.asarray(theta, jnp.float32)},
        [{"w": g} for g in grads],
    )
    left, right, q_left, q_right = np.zeros((3, 3)), np.zeros((4, 4)), np.eye(3), np.eye(4)
    m, v = np.zeros((3, 4)), np.zeros((3, 4))
    for t, g in enumerate(np.asarray(grads, np.float64)):
        left, right = 0.7 * left + 0.3 * g @ g.T, 0.7 * right + 0.3 * g.T @ g
        if t in (0, 1, 2, 3, 6):
            old = q_left, q_right
            q_left = np.linalg.qr(left @ q_left)[0]
            q_right = np.linalg.qr(right @ q_right)[0] if both else q_right
            v = (q_left.T @ old[0]) ** 2 @ v @ ((q_right.T @ old[1]) ** 2).T
        m = 0.8 * m + 0.2 * g
        v = 0.7 * v + 0.3 * (q_left.T @ g @ q_right) ** 2
        ratio = (q_left.T @ m @ q_right) / (1 - 0.8 ** (t + 1)) / (np.sqrt(v / (1 - 0.7 ** (t + 1))) + 1e-3)
        theta = theta - 0.01 * (t + 1) * (q_left @ ratio @ q_right.T + 0.3 * theta)
        np.testing.assert_allclose(found[t]["w"], theta, rtol=1e-4, atol=1e-5, err_msg=f"after step {t}")


def test_the_other_leaves_follow_optax_adamw():
    matrices = {"w": MuonDimensionNumbers(), "embedding": None, "norm": None}

    def tree(seed):
        return {"w": normal(3, 4, seed=seed), "embedding": normal(5, 4, seed=seed), "norm": normal(4, seed=seed)}

    mask = {"w": True, "embedding": True, "norm": False}
    grads = [tree(seed) for seed in range(STEPS)]
    found = run(Soap(rate, 0.8, 0.9, 1e-6, 0.3, mask, basis=KroneckerBasis(matrices)), tree(9), grads)
    adamw = optax.adamw(rate, 0.8, 0.9, 1e-6, weight_decay=0.3, mask=mask)
    params, state = tree(9), adamw.init(tree(9))
    for step in range(STEPS):
        updates, state = jax.jit(adamw.update)(grads[step], state, params)
        params = optax.apply_updates(params, updates)
        for name in ("embedding", "norm"):
            np.testing.assert_allclose(found[step][name], params[name], rtol=1e-6, atol=1e-7)
    assert float(jnp.max(jnp.abs(found[-1]["w"] - params["w"]))) > 1e-3


def test_the_matrices_of_a_stack_are_separate():
    stacked = [normal(2, 6, 4, seed=seed) for seed in range(STEPS + 1)]
    optimizer = Soap(rate, basis=KroneckerBasis({"w": MuonDimensionNumbers((1,), (2,))}, b2=0.95))
    together = run(optimizer, {"w": stacked[0]}, [{"w": g} for g in stacked[1:]])
    apart = run(Soap(rate), dict(enumerate(stacked[0])), [dict(enumerate(g)) for g in stacked[1:]])
    for ours, theirs in zip(together, apart, strict=True):
        for layer in range(2):
            np.testing.assert_allclose(ours["w"][layer], theirs[layer], rtol=1e-3, atol=1e-5)


def test_when_the_basis_is_rotated():
    assert [step for step in range(12) if rotation_due(step, 4)] == [0, 1, 2, 3, 4, 8]


def test_counts_out_of_range():
    with pytest.raises(ValueError, match=r"^interval is 0; it must be"):
        Soap(interval=0)
    with pytest.raises(ValueError, match=r"^max_size is 0; it must be"):
        Soap(basis=KroneckerBasis(max_size=0))
    with pytest.raises(TypeError, match=r"^basis is None; it must be a KroneckerBasis"):
        Soap(basis=None)
