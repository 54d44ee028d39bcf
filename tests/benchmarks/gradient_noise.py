"""The noise of the gradient beside what Sophia-G's curvature says of it: `python tests/benchmarks/gradient_noise.py`.

The script trains the run of `--config` and any `--SECTION.FIELD VALUE`. After each number of `--steps` it holds the
parameters fixed and computes, on many batches, the gradient before clipping and the Gauss-Newton-Bartlett estimate h.
As far as the model is right about the text, the gradient of the mean loss of B targets has the variance h / B, so that
B Var(g) / h is 1. The critical batch is the number of targets at which ‖mean g‖² equals the variance; beside the one
measured here stands the one that the optimizer's metrics tell from its state (`optim/critical_batch_tokens`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jmp
import numpy as np
from benchmark_tables import print_table, spread
from haliax import NamedArray

from sophia_levanter.batch import Batch, batch_from_sequences, count_targets
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import parse_command_line
from sophia_levanter.data.batches import TrainBatches
from sophia_levanter.data.corpora import prepare
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.optim import GaussNewtonBartlett, value_grad_and_curvature
from sophia_levanter.training.step import StepSettings, TrainState, train_step

HEADER = [
    "array",
    "coordinates",
    "h = 0",
    "B Var(g) / h, each",
    "B Var(g) / h, sums",
    "critical batch",
    "by the metrics",
]
Estimate = Callable[[LanguageModel, Batch, jax.Array], tuple[LanguageModel, LanguageModel]]
Arrays = dict[str, np.ndarray]


def trained(
    config: TrainConfig, batch_at: Callable[[int], Batch], vocab_size: int, num_steps: int
) -> Iterator[TrainState]:
    """The state of a run before its first step and after each one; the next step takes over its buffers."""
    settings = StepSettings.of(config)
    model = config.model.build(vocab_size=vocab_size, key=jax.random.key(config.trainer.seed))
    state = TrainState.init(model, settings.optimizer, settings.policy)
    steps: dict[bool, Any] = {
        refresh: eqx.filter_jit(partial(train_step, settings, refresh), donate="all-except-first")
        for refresh in (False, True)
    }
    yield state
    for step in range(num_steps):
        state, _ = steps[bool(settings.optimizer.refresh_due(step))](batch_at(step), state)
        yield state


def gradient_and_curvature(
    policy: jmp.Policy, model: LanguageModel, batch: Batch, key: jax.Array
) -> tuple[LanguageModel, LanguageModel]:
    """The gradient of the mean loss on a batch [microbatch, batch, position], and the estimate h."""

    def losses(model: LanguageModel, part: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        label_key, dropout_key = jax.random.split(key)
        uniforms = NamedArray(jax.random.uniform(label_key, part.tokens.array.shape), part.tokens.axes)
        loss, sampled = policy.cast_to_compute(model).losses(part, samples=uniforms, key=dropout_key)
        return loss / count_targets(part), sampled / count_targets(part), count_targets(part)

    _, gradient, h = value_grad_and_curvature(losses, model, batch, key=key, estimator=GaussNewtonBartlett())
    return gradient, h


def moments(estimate: Estimate, model: LanguageModel, batches: Iterable[Batch], key: jax.Array) -> Arrays:
    """Mean and unbiased variance of the gradient over batches, and the mean of h: float64 [3, coordinate]."""
    totals: Arrays = {}
    count = 0
    for batch in batches:
        gradient, h = map(_by_name, estimate(model, batch, jax.random.fold_in(key, count)))
        for name, g in gradient.items():
            totals[name] = totals.get(name, 0.0) + np.stack([g, np.square(g), h[name]])
        count += 1
    return {
        name: np.stack([g / count, (squares - np.square(g) / count) / (count - 1), h / count])
        for name, (g, squares, h) in totals.items()
    }


def _by_name(tree: Any) -> Arrays:
    """The arrays by the names that they have in the optimizer's metrics, as float64 vectors."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.ravel().astype(float) for path, x in leaves}


def row(name: str, found: np.ndarray, *, num_targets: int, num_batches: int, by_metrics: float) -> list[object]:
    """A line of the table. Coordinates whose h is 0, such as padding of the vocabulary, are not in its ratios.

    Args:
        name: of an array.
        found: [3, coordinate] as from `moments`.
        num_targets: B, in each batch.
        num_batches: number of batches; the noise that they leave in the mean gradient is taken off the signal.
        by_metrics: the critical batch that the optimizer's metrics tell.
    """
    mean, variance, h = found
    curved = h > 0
    signal = np.sum(np.square(mean) - variance / num_batches)
    return [
        name,
        h.size,
        f"{1 - curved.mean():.1%}",
        spread(num_targets * variance[curved] / h[curved]) if curved.any() else "nan",
        f"{num_targets * variance[curved].sum() / h.sum():.3f}" if curved.any() else "nan",
        f"{num_targets * variance.sum() / signal if signal > 0 else np.inf:.3g}",
        f"{by_metrics:.3g}",
    ]


def rows(found: Arrays, metrics: dict[str, Any], *, num_targets: int, num_batches: int) -> Iterator[list[object]]:
    """A row for each array and one for all of them together; `metrics` are the optimizer's."""
    of = partial(row, num_targets=num_targets, num_batches=num_batches)
    for name, values in found.items():
        ratio = float(metrics.get(f"signal_to_noise/{name}", np.nan))
        yield of(name, values, by_metrics=num_targets / ratio if ratio else np.inf)
    together = np.concatenate(list(found.values()), axis=1)
    yield of("all", together, by_metrics=float(metrics.get("critical_batch_tokens", np.nan)))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each number of steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="config/gpt2_nano_sophia.yaml")
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1000], help="where the parameters are held fixed")
    parser.add_argument("--batches", type=int, default=64, help="number of batches there, at least 2")
    arguments, overrides = parser.parse_known_args(argv)
    config = parse_command_line(["--config", arguments.config, *overrides]).config
    assert config is not None
    trainer, data = config.trainer, prepare(config.data, print)
    windows = TrainBatches(data.train, seq_len=config.model.seq_len, batch_size=trainer.batch_size, seed=trainer.seed)
    settings, num_targets = StepSettings.of(config), trainer.batch_size * config.model.seq_len
    estimate = eqx.filter_jit(partial(gradient_and_curvature, settings.policy))

    def batch_at(step: int) -> Batch:
        return batch_from_sequences(windows[step], num_microbatches=trainer.num_microbatches)

    # No step of the run has these batches.
    later = range(trainer.num_train_steps, trainer.num_train_steps + arguments.batches)
    states = trained(config, batch_at, data.tokenizer.vocab_size, max(arguments.steps))
    for step, state in enumerate(states):
        if step in arguments.steps:
            found = moments(estimate, state.model, map(batch_at, later), jax.random.key(trainer.seed))
            metrics = settings.optimizer.metrics(state.optimizer_state, num_targets)
            print(f"\nAfter {step} steps, on {len(later)} batches of {num_targets} targets:\n")
            print_table(HEADER, rows(found, metrics, num_targets=num_targets, num_batches=len(later)))


if __name__ == "__main__":
    main()
