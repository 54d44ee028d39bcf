"""Variance of the two ways to join microbatches in Gauss-Newton-Bartlett: `python -m
sophia_levanter.benchmarks.gnb_variance`.

`square_then_average` over several microbatches beside `average_then_square`, one averaged gradient squared: many draws
of labels on one fixed batch of text, at initialisation and after some steps of training, with all targets and with a
different share of them masked in each microbatch. Both estimate the same diagonal: the means are compared too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from sophia_levanter.batch import Batch, batch_from_windows
from sophia_levanter.benchmarks.models import Rows, Vectors, by_kind, train_batches, trained
from sophia_levanter.benchmarks.moments import Moments
from sophia_levanter.benchmarks.timing import Spread, markdown_table, spread
from sophia_levanter.config.command_line import load_config
from sophia_levanter.data.prepare import prepare
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.optim import GaussNewtonBartlett

ESTIMATORS = tuple(GaussNewtonBartlett(reduction=r) for r in ("square_then_average", "average_then_square"))
PyTree = Any


class BothReductions(GaussNewtonBartlett):
    """The estimates of both `ESTIMATORS`, from the same draws and backward passes."""

    def accumulated(self, grad_sum: Any, num_targets: jax.Array) -> tuple:
        return tuple(estimator.accumulated(grad_sum, num_targets) for estimator in ESTIMATORS)

    def finished(self, total: tuple, num_targets: jax.Array) -> tuple:
        return tuple(e.finished(part, num_targets) for e, part in zip(ESTIMATORS, total, strict=True))


class Comparison(NamedTuple):
    """`square_then_average` over `average_then_square`, for a kind of array.

    Attributes:
        kind: the arrays.
        variance: the ratio of the variances, each summed over the coordinates.
        coordinates: the same ratio for single coordinates.
        mean: the ratio of the means, each summed over the coordinates.
        mean_bound: the 95 % bound on that ratio's distance from 1.
    """

    kind: str
    variance: float
    coordinates: Spread
    mean: float
    mean_bound: float


def embedding_rows(tokens: np.ndarray, vocab_size: int) -> Rows:
    """The rows of the token embedding by how often they are read; padding is left out.

    Args:
        tokens: [microbatch, ...] what the model reads. A frequent token is in every microbatch, a rare one in at most
            one.
        vocab_size: tokens that can be read.
    """
    counts = np.array([[token in part for part in tokens] for token in range(vocab_size)]).sum(axis=1)
    frequent, rare = counts == len(tokens), counts <= 1
    kinds = {"frequent": frequent & ~rare, "between": ~frequent & ~rare, "rare": rare}
    return {f"token embedding, {kind}": tuple(np.flatnonzero(which).tolist()) for kind, which in kinds.items()}


def moments_over_draws(
    estimate: Callable[[jax.Array], PyTree], key: jax.Array, num_draws: int
) -> tuple[Moments, PyTree]:
    """Mean and variance of each coordinate of an estimate, and the sum over each array's coordinates in each draw.

    Args:
        estimate: from a jax random key to a tree of arrays.
        key: a jax random key; draw i has `fold_in(key, i)`.
        num_draws: how many.
    """

    # Several draws share a forward pass.
    at_once = math.gcd(num_draws, 10)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(num_draws)).reshape(-1, at_once)

    def add(moments: Moments, x: PyTree) -> tuple[Moments, PyTree]:
        return moments.with_value(x), jax.tree.map(jnp.sum, x)

    moments, sums = jax.lax.scan(
        lambda moments, keys: jax.lax.scan(add, moments, jax.vmap(estimate)(keys)),
        Moments.like(jax.eval_shape(estimate, key)),
        keys,
    )
    return moments, jax.tree.map(jnp.ravel, sums)


def compare(model: LanguageModel, batch: Batch, *, num_draws: int, seed: int = 0) -> list[Comparison]:
    """Both estimates of a model's curvature on a batch, over the same draws of labels.

    Args:
        model: the model.
        batch: [microbatch, batch, position].
        num_draws: of the labels of the whole batch.
        seed: of the draws.
    """
    rows = embedding_rows(np.asarray(batch.tokens.array), model.vocab_size)
    (squared, averaged), (squared_sums, averaged_sums) = jax.device_get(
        _both_over_draws(model, batch, rows, jax.random.key(seed), num_draws)
    )
    return [
        _compare_kind(kind, squared[kind], averaged[kind], squared_sums[kind], averaged_sums[kind]) for kind in squared
    ]


@eqx.filter_jit
def _both_over_draws(
    model: LanguageModel, batch: Batch, rows: Rows, key: jax.Array, num_draws: int
) -> tuple[list[Vectors], list[Vectors]]:
    """For each estimator the squares of `Moments`, and the sums of `moments_over_draws`."""

    def estimate(key: jax.Array) -> list[Vectors]:
        both = BothReductions()(LanguageModel.__call__, model, batch.tokens, key=key, weights=batch.weights)
        return [by_kind(h_hat, rows) for h_hat in both]

    moments, sums = moments_over_draws(estimate, key, num_draws)
    return moments.squares, sums


def ragged_weights(shape: tuple[int, int], num_microbatches: int, seed: int = 0) -> np.ndarray:
    """float32 [row, position] ones and zeros: microbatch i of n keeps (i + 1) / n of its positions, at random."""
    rows, _ = shape
    share = (1 + np.arange(rows) * num_microbatches // rows) / num_microbatches
    return (np.random.default_rng(seed).random(shape) < share[:, None]).astype(np.float32)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison at initialisation and after training, with all targets and with ragged masks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("config/gpt2_nano_sophia.yaml"))
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--microbatches", type=int, default=8)
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config)
    data = prepare(config.data, print)
    batches = train_batches(config, data)
    # One that no step of the run sees.
    windows = batches[config.trainer.num_train_steps]
    num_targets = (windows.shape[0], windows.shape[1] - 1)
    masks: Mapping[str, np.ndarray | None] = {
        "all targets": None,
        "ragged masks": ragged_weights(num_targets, arguments.microbatches),
    }
    rows = []
    for steps, state in trained(config, batches, data.tokenizer.vocab_size, (0, arguments.steps)):
        for mask, weights in masks.items():
            batch = batch_from_windows(windows, weights, num_microbatches=arguments.microbatches)
            for c in compare(state.model, batch, num_draws=arguments.draws):
                means = f"{c.mean:.3f} ± {c.mean_bound:.3f}"
                rows.append((steps, mask, c.kind, f"{c.variance:.3f}", c.coordinates, means))
    print(
        f"square_then_average over {arguments.microbatches} microbatches, over average_then_square; {arguments.draws} "
        "draws of labels. Ratios of variances: each summed over coordinates, and median and quartiles of single "
        "coordinates. Ratios of means: with their 95 % bounds.\n"
    )
    print(markdown_table(["steps", "batch", "arrays", "variance", "variance of a coordinate", "mean"], rows))


def _compare_kind(
    kind: str, squared: np.ndarray, averaged: np.ndarray, squared_sums: np.ndarray, averaged_sums: np.ndarray
) -> Comparison:
    """From sums of squares of each coordinate, and the sums over coordinates in each draw."""
    # The draws are the same, so that the difference varies less than its two parts.
    difference = squared_sums.astype(float) - averaged_sums
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    level = averaged_sums.astype(float).mean()
    moving = averaged > 0
    return Comparison(
        kind,
        float(squared.sum(dtype=float) / averaged.sum(dtype=float)),
        spread(squared[moving] / averaged[moving]),
        float(1 + difference.mean() / level),
        float(1.96 * error / level),
    )


if __name__ == "__main__":
    main()
