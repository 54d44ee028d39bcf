from functools import partial

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest
from haliax import NamedArray

from sophia_levanter.batch import Batch
from sophia_levanter.benchmarks import gradient_noise
from sophia_levanter.benchmarks.gradient_noise import Momentum, gradient_and_curvature, measure, momentum_of, noise_of
from sophia_levanter.benchmarks.moments import Moments
from sophia_levanter.config.command_line import load_config
from sophia_levanter.models.gpt2 import Gpt2, Gpt2Config
from sophia_levanter.training.step import StepSettings, TrainState

TINY = Gpt2Config(num_layers=1, num_heads=2, embed_dim=8, seq_len=4, loss_block_size=4, gradient_checkpointing="none")
KINDS = ["attention qkv", "attention out", "mlp in", "mlp out", "token embedding", "position embedding", "norms"]
COORDINATES = 2000


def moments(values: np.ndarray) -> Moments:
    return Moments(jnp.int32(len(values)), values.mean(0), len(values) * values.var(0))


def normal_gradients(means: float, num_batches: int) -> tuple[Moments, np.ndarray]:
    """Gradients with a mean of either sign, and their true variance, which is another one for each coordinate."""
    random = np.random.default_rng(0)
    variance = np.exp(random.normal(size=COORDINATES))
    mean = means * random.choice([-1, 1], COORDINATES)
    return moments(mean + np.sqrt(variance) * random.normal(size=(num_batches, COORDINATES))), variance


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_ratio_is_that_of_the_true_variances(factor):
    gradient, variance = normal_gradients(2.0, 200)
    noise = noise_of("x", gradient, 50 * variance / factor, num_targets=50)
    # A variance of 200 batches has the relative error sqrt(2 / 199), 0.1; quartiles lie at 0.67 of it.
    assert noise.ratio.median == pytest.approx(factor, rel=0.02)
    assert (noise.ratio.low, noise.ratio.high) == pytest.approx((factor * 0.933, factor * 1.067), rel=0.02)
    assert noise.ratio_of_sums == pytest.approx(factor, rel=0.02)
    assert noise.curvature == pytest.approx(np.quantile(50 * variance / factor, [0.1, 0.5, 0.9, 0.99]))


@pytest.mark.parametrize("means", [0.1, 1.0])
def test_the_signal_is_cleared_of_the_means_own_noise(means):
    gradient, variance = normal_gradients(means, 10)
    noise = noise_of("x", gradient, variance, num_targets=50)
    # Uncleared it would be 0.1 more.
    signal = COORDINATES * means**2 / variance.sum()
    assert noise.signal == pytest.approx(signal, abs=0.02 * (1 + signal))
    assert noise.targets == pytest.approx(50 / noise.signal)


def test_without_signal_no_batch_is_large_enough():
    gradient = moments(np.array([[1.0], [-1.0]]))
    noise = noise_of("x", gradient, np.ones(1), num_targets=50)
    assert (noise.signal, noise.targets) == (0, np.inf)


def test_coordinates_without_curvature_are_left_out_and_counted():
    gradient = moments(np.array([[1.0, 9.0, 3.0, 0.0], [3.0, 1.0, 1.0, 0.0]]))
    noise = noise_of("x", gradient, np.array([4.0, 0.0, 4.0, 0.0]), num_targets=10, momentum=Momentum(1.0, 0.5))
    assert (noise.coordinates, noise.without_curvature) == (4, 0.5)
    # The variance is 2, without bias, and h is 4.
    assert noise.ratio == (5, 5, 5)
    assert noise.ratio_of_sums == 5
    assert noise.curvature == (4, 4, 4, 4)
    assert noise.clipped == 0
    nothing = noise_of("x", gradient, np.zeros(4), num_targets=10, momentum=Momentum(1.0, 0.5))
    assert nothing.without_curvature == 1
    assert np.isnan([nothing.ratio.median, nothing.ratio_of_sums, nothing.clipped]).all()


def test_noise_clips_where_rho_h_is_below_what_momentum_leaves_of_it():
    num_targets, rho, b1 = 50, 0.2, 0.9
    weights = (1 - b1) * b1 ** np.arange(1000)
    # rho h = sqrt(sum(weights^2) h / B)
    border = np.square(weights).sum() / (num_targets * rho**2)
    h = border * np.array([0.5, 0.9, 0.99, 1.01, 1.1, 2, 3, 4])
    gradient = moments(np.random.default_rng(0).normal(size=(3, 8)))
    assert noise_of("x", gradient, h, num_targets=num_targets, momentum=Momentum(rho, b1)).clipped == 3 / 8
    assert noise_of("x", gradient, h, num_targets=num_targets).clipped is None


@pytest.mark.parametrize(("by_the_model", "low", "high"), [(True, 0.85, 1.15), (False, 2, 100)])
def test_the_noise_is_the_curvature_where_the_model_is_right(by_the_model, low, high):
    """Targets drawn from the model itself: then B Var(g) = h, and the mean gradient is 0."""
    model = jax.tree.map(lambda x: 8 * x, Gpt2.init(TINY, vocab_size=11, key=jax.random.key(0)))
    policy = jmp.get_policy("float32")
    axes = hax.make_axes(microbatch=2, batch=3, position=4)

    def estimate(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, 3)
        tokens = NamedArray(jax.random.randint(keys[0], (2, 3, 4), 0, 11), axes)
        logits = model(tokens).rearrange((*axes, ...)).array
        targets = jax.random.categorical(keys[1], logits if by_the_model else jnp.zeros_like(logits))
        batch = Batch(tokens, NamedArray(targets, axes), hax.ones(axes))
        both = gradient_and_curvature(policy, model, batch, keys[2])
        return tuple(part.blocks.stacked.mlp.c_fc.weight.array.ravel() for part in both)

    gradients, curvatures = eqx.filter_jit(jax.lax.map)(estimate, jax.random.split(jax.random.key(1), 400))
    noise = noise_of("mlp in", moments(np.asarray(gradients, float)), curvatures.mean(0), num_targets=24)
    assert low < noise.ratio_of_sums < high
    assert low < noise.ratio.median < high
    assert noise.signal < 0.002 if by_the_model else noise.signal > 0.01


def test_the_batches_come_after_the_runs_last(tiny):
    config = load_config(tiny)
    seen = []

    class Batches:
        def __getitem__(self, step: int) -> np.ndarray:
            return np.full((4, 9), step, np.int32)

    def estimate(model, batch, key):
        seen.append(jax.random.key_data(key).tolist())
        value = batch.tokens.array[0, 0, :2].astype(jnp.float32)
        return {"a": value, "b": 2 * value[:1]}, {"a": 2 * value, "b": value[:1] - 13}

    a, b = measure(estimate, dict, None, Batches(), config, num_batches=3, momentum=None)
    assert seen == [jax.random.key_data(jax.random.fold_in(jax.random.key(0), step)).tolist() for step in (12, 13, 14)]
    # 12, 13 and 14 have the variance 1; B is 32.
    assert (a.kind, a.coordinates, b.kind, b.coordinates) == ("a", 2, "b", 1)
    assert a.ratio_of_sums == pytest.approx(32 * 1 / 26)
    assert a.signal == pytest.approx(13**2 - 1 / 3)
    assert b.without_curvature == 1


def test_rho_is_the_one_that_the_controller_has_come_to(tiny):
    model = eqx.filter_jit(partial(Gpt2.init, TINY, vocab_size=11))(key=jax.random.key(0))

    def found(*overrides: tuple[str, str]) -> Momentum | None:
        config = load_config(tiny, overrides)
        settings = StepSettings.of(config)
        state = TrainState.init(model, settings.optimizer)
        if getattr(state.optimizer_state, "rho", None) is not None:
            state = eqx.tree_at(lambda s: s.optimizer_state.rho, state, jnp.float32(0.7))
        return momentum_of(config, settings, state)

    assert found() == (0.5, 0.965)
    assert found(("optimizer.target_win_rate", "0.3"), ("optimizer.b1", "0.9")) == (pytest.approx(0.7), 0.9)
    assert found(("optimizer.type", "adamw")) is None


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table's rows, its header first."""
    parts = [part for part in text.split("\n\n") if part.startswith("|")]
    return [[[c.strip() for c in line.split("|")[1:-1]] for line in part.strip().splitlines()] for part in parts]


def test_main_prints_a_table_for_each_number_of_steps(tiny, capsys):
    gradient_noise.main(["--config", str(tiny), "--steps", "0", "1", "--batches", "6", "--optimizer.b1=0.9"])
    printed = capsys.readouterr().out
    assert "After 0 steps:" in printed and "After 1 steps:" in printed
    for table in tables(printed):
        assert [row[0] for row in table[2:]] == KINDS
        assert {len(row) for row in table} == {9}
        assert table[0][-1] == "ρ h < σ of m, ρ = 0.5, b1 = 0.9"
        # The vocabulary's padding is no coordinate.
        assert table[2 + KINDS.index("token embedding")][1] == str(257 * 16)
        # Six batches of 32 targets, at a model that is near its beginning.
        assert all(0.3 < float(row[4]) < 3 for row in table[2:])
    assert len(tables(printed)) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0", "13"], "--steps has 13; it must be between 0 and trainer.num_train_steps, 12"),
        (["--batches", "1"], "--batches is 1; a variance needs at least 2"),
        (["--optimizer.rho", "0"], "optimizer.rho is 0"),
        (["--rho", "1"], "unknown option '--rho'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tiny, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        gradient_noise.main(["--config", str(tiny), "--steps", "0", *words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
