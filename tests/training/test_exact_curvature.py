"""The curvature that a step estimates, against exact mathematics."""

import dataclasses

import equinox as eqx
import haliax as hax
import jax
import jax.flatten_util
import jax.numpy as jnp
import jmp
import numpy as np
import pytest
from test_step import TINY, gap, take_step, tiny_model, windows

from sophia_levanter.batch import Batch, batch_from_sequences
from sophia_levanter.config import model as model_config
from sophia_levanter.models.gpt2 import Gpt2, Gpt2Config
from sophia_levanter.optim import EmpiricalFisher, SophiaG, SophiaH
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.step import StepSettings, TrainState, train_step


def flat(tree) -> jax.Array:
    return jax.flatten_util.ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))[0]


def test_the_curvature_of_true_labels_is_that_of_the_training_gradient():
    """B (mean gradient)^2 of each of two microbatches with different numbers of targets, by jax.grad."""
    weights = np.ones((4, TINY.seq_len), np.float32)
    weights[1, 3:] = 0
    batch = batch_from_sequences(windows(4), weights, num_microbatches=2)
    params, static = eqx.partition(tiny_model(), eqx.is_inexact_array)
    vector, unravel = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    @jax.grad
    def mean_gradient(vector, tokens, targets, weights):
        logits = eqx.combine(unravel(vector), static)(hax.named(tokens, ("batch", "position")))
        scores = jax.nn.log_softmax(logits.rearrange(("batch", "position", "vocab")).array)
        return -jnp.sum(weights * jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]) / jnp.sum(weights)

    parts = [[x.array[i] for x in (batch.tokens, batch.targets, batch.weights)] for i in range(2)]
    sizes = [part[2].sum() for part in parts]
    assert sizes[0] != sizes[1]
    # Each microbatch's estimate is size * g^2; they are averaged by their sizes.
    squares = [size * (size * mean_gradient(vector, *part) ** 2) for size, part in zip(sizes, parts, strict=True)]
    state, _ = take_step(StepSettings(SophiaG(b2=0.0, estimator=EmpiricalFisher())), batch)
    assert gap(flat(state.optimizer_state.curvature), sum(squares) / sum(sizes)) < 1e-5


MICRO = Gpt2Config(
    num_layers=1, num_heads=2, embed_dim=4, seq_len=4, mlp_ratio=2, loss_block_size=3, gradient_checkpointing="full"
)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "compute", "devices"),
    [
        ("g", "float32", 2),
        ("h", "float32", 2),
        pytest.param("g", "bfloat16", 8, marks=SLOW),
        pytest.param("h", "bfloat16", 8, marks=SLOW),
    ],
)
def test_the_estimates_of_the_step_have_the_exact_diagonal_as_their_mean(kind, compute, devices, monkeypatch):
    """Sharded, two microbatches, blocked loss, recomputed layers: against jax.hessian and J^T S J."""
    vocab_size, draws = 5, 1500 if kind == "g" else 6000
    # Padding to 8 classes and not to 128 makes thousands of draws cheap.
    monkeypatch.setattr(model_config, "VOCAB_MULTIPLE", 8)
    config = dataclasses.replace(MICRO, initializer_range=0.5)
    model = eqx.filter_jit(Gpt2.init)(config, vocab_size=vocab_size, key=jax.random.key(3))
    rows = 2 * max(devices, 4)
    tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, MICRO.seq_len + 1), dtype=np.int32)
    exact = exact_diagonal(kind, model, tokens)

    optimizer = (SophiaG if kind == "g" else SophiaH)(b2=0.0)
    policy = jmp.get_policy(f"params=float32,compute={compute},output=float32")
    settings = StepSettings(optimizer, policy=policy)
    partition = partition_of(devices=jax.devices()[:devices])
    batch = partition.place(batch_from_sequences(tokens, num_microbatches=2))
    state = partition.place(TrainState.init(model, optimizer))

    @eqx.filter_jit
    def estimates(batch: Batch, state: TrainState) -> jax.Array:
        def draw(step: jax.Array) -> jax.Array:
            at = eqx.tree_at(lambda s: s.step, state, step)
            return flat(train_step(settings, True, batch, at)[0].optimizer_state.curvature)

        # Draws run in groups: one at a time, the devices would mostly wait for each other.
        return jax.lax.map(draw, jnp.arange(draws, dtype=jnp.int32), batch_size=100)

    with partition.active():
        drawn = np.asarray(estimates(batch, state), np.float64)
    mean, error = drawn.mean(0), drawn.std(0) / np.sqrt(draws)
    rounding = 0.0 if compute == "float32" else 0.05 * np.abs(exact).max()
    assert np.all(np.abs(mean - exact) <= 5 * error + rounding + 1e-6)
    # The bound is tight enough to tell: over all, the mean is known within a few per cent.
    assert np.linalg.norm(mean - exact) < 0.1 * np.linalg.norm(exact)


def exact_diagonal(kind: str, model: Gpt2, tokens: np.ndarray) -> np.ndarray:
    """The diagonal of the mean loss's Hessian (h) or of its Gauss-Newton matrix (g)."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    inputs, targets = hax.named(tokens[:, :-1], ("batch", "position")), tokens[:, 1:].reshape(-1)

    def logits(v: jax.Array) -> jax.Array:
        return (
            eqx.combine(unravel(v), static)(inputs)
            .rearrange(("batch", "position", "vocab"))
            .array.reshape(targets.size, -1)
        )

    def loss(v: jax.Array) -> jax.Array:
        z = logits(v)
        return jnp.mean(jax.nn.logsumexp(z, -1) - z[jnp.arange(targets.size), targets])

    if kind == "h":
        return np.diag(np.asarray(jax.jit(jax.hessian(loss))(vector), np.float64))

    @jax.jit
    def gauss_newton(v: jax.Array) -> jax.Array:
        """sum_i J_i^T (diag p_i - p_i p_i^T) J_i, its diagonal, over the number of positions."""
        jacobian, p = jax.jacrev(logits)(v), jax.nn.softmax(logits(v), -1)
        squares = jnp.einsum("ncp,nc->p", jacobian**2, p)
        return (squares - jnp.sum(jnp.einsum("ncp,nc->np", jacobian, p) ** 2, 0)) / targets.size

    return np.asarray(gauss_newton(vector), np.float64)
