"""Noise of a batch's gradient beside the curvature that Sophia-G estimates: `python -m
sophia_levanter.benchmarks.gradient_noise`.

At some points of a run the parameters are held fixed, and the gradient, before any clipping, and the
Gauss-Newton-Bartlett estimate h are computed on many batches. A target drawn from the model has the expected squared
gradient h; so far as the model is right about the text, the gradient of B targets' mean loss has the variance h / B.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import haliax as hax
import jax
import jmp
import numpy as np
from haliax import NamedArray

from sophia_levanter.batch import Batch, batch_from_windows, count_targets
from sophia_levanter.benchmarks.arguments import parse_with_overrides
from sophia_levanter.benchmarks.models import Vectors, by_kind, train_batches, trained
from sophia_levanter.benchmarks.moments import Moments
from sophia_levanter.benchmarks.timing import Spread, markdown_table, spread
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.optimizer import SophiaConfig
from sophia_levanter.data.batches import TrainBatches
from sophia_levanter.data.prepare import prepare
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.optim import GaussNewtonBartlett, value_grad_and_curvature
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.step import StepSettings, TrainState

QUANTILES = (0.1, 0.5, 0.9, 0.99)
HEADER = (
    "arrays",
    "coordinates",
    "h = 0",
    "B Var(g) / h, each",
    "B Var(g) / h, sums",
    "‖mean g‖² / Var(g)",
    "targets for 1",
    "h at 10 / 50 / 90 / 99 %",
)


class Momentum(NamedTuple):
    """What decides whether noise alone makes Sophia's steps clipped ones.

    Attributes:
        rho: the scale of h.
        b1: the decay of the momentum.
    """

    rho: float
    b1: float


class Noise(NamedTuple):
    """The noise of the gradient of a kind of array.

    Attributes:
        kind: the arrays.
        coordinates: how many.
        without_curvature: the share whose h is 0; they count in nothing but `signal`.
        ratio: B Var(g) / h of single coordinates.
        ratio_of_sums: the sum of B Var(g) over that of h.
        signal: ‖mean g‖² / Var(g), each summed over the coordinates, less what the mean's own noise adds; at least 0.
        targets: in a batch in which that would be 1; infinite where no signal is found.
        curvature: h at `QUANTILES`.
        clipped: the share of coordinates where rho h is below the standard deviation that the gradient's predicted
            noise, h / B, leaves in the momentum; None without `Momentum`.
    """

    kind: str
    coordinates: int
    without_curvature: float
    ratio: Spread
    ratio_of_sums: float
    signal: float
    targets: float
    curvature: tuple[float, ...]
    clipped: float | None


def noise_of(
    kind: str,
    gradient: Moments,
    curvature: np.ndarray | jax.Array,
    *,
    num_targets: float,
    momentum: Momentum | None = None,
) -> Noise:
    """The noise of a kind's gradient.

    Args:
        kind: the arrays.
        gradient: moments of [coordinate] over at least two batches.
        curvature: [coordinate], h.
        num_targets: B, in each batch.
        momentum: Sophia's; None for another optimizer.
    """
    num_batches = int(gradient.number)
    mean, h = np.asarray(gradient.mean, float), np.asarray(curvature, float)
    variance = np.asarray(gradient.squares, float) / (num_batches - 1)
    curved = h > 0
    signal = _ratio(np.sum(np.square(mean) - variance / num_batches), variance.sum())
    return Noise(
        kind,
        h.size,
        1 - float(curved.mean()),
        spread(num_targets * variance[curved] / h[curved]) if curved.any() else Spread(*[float("nan")] * 3),
        _ratio(num_targets * variance[curved].sum(), h.sum()),
        max(0.0, signal),
        num_targets / signal if signal > 0 else float("inf"),
        tuple(np.quantile(h[curved], QUANTILES).tolist()) if curved.any() else (0.0,) * len(QUANTILES),
        None if momentum is None else _clipped_by_noise(h[curved], num_targets, momentum),
    )


def _ratio(over: float, under: float) -> float:
    return float(over / under) if under > 0 else float("nan")


def _clipped_by_noise(h: np.ndarray, num_targets: float, momentum: Momentum) -> float:
    """The share of coordinates whose momentum, of noise alone, is at its standard deviation above rho h."""
    # m = (1 - b1) sum_i b1^i g_i has the variance Var(g) (1 - b1) / (1 + b1).
    left = np.sqrt(h / num_targets * (1 - momentum.b1) / (1 + momentum.b1))
    return float(np.mean(momentum.rho * h < left)) if h.size else float("nan")


def gradient_and_curvature(
    policy: jmp.Policy, model: LanguageModel, batch: Batch, key: jax.Array
) -> tuple[LanguageModel, LanguageModel]:
    """The mean loss's gradient on a batch, and its unbiased GNB estimate with the least variance.

    Args:
        policy: parameters' and compute dtypes.
        model: the model.
        batch: [microbatch, batch, position].
        key: a jax random key for the labels and, where the model has it, dropout.
    """

    def losses(model: LanguageModel, part: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        part = hax.auto_sharded(part)
        label_key, dropout_key = jax.random.split(key)
        uniforms = NamedArray(jax.random.uniform(label_key, part.tokens.array.shape), part.tokens.axes)
        sums = policy.cast_to_compute(model).losses(part, samples=uniforms, key=dropout_key)
        num_targets = count_targets(part)
        return sums[0] / num_targets, sums[1] / num_targets, num_targets

    _, gradient, h_hat = value_grad_and_curvature(losses, model, batch, key=key, estimator=GaussNewtonBartlett())
    return gradient, h_hat


def measure(
    estimate: Callable[[LanguageModel, Batch, jax.Array], tuple[LanguageModel, LanguageModel]],
    kinds: Callable[[LanguageModel], Vectors],
    model: LanguageModel,
    batches: TrainBatches,
    config: TrainConfig,
    *,
    num_batches: int,
    momentum: Momentum | None,
) -> list[Noise]:
    """The noise at a model, over the batches that follow a run's last.

    Args:
        estimate: the gradient and the curvature of a batch.
        kinds: a tree like the model by kind of array.
        model: on one device.
        batches: the run's.
        config: the run.
        num_batches: how many to look at.
        momentum: Sophia's; None for another optimizer.
    """
    trainer, partition = config.trainer, partition_of(devices=jax.devices()[:1])
    moments: tuple[Moments, Moments] | None = None
    add = jax.jit(lambda moments, values: tuple(m.with_value(v) for m, v in zip(moments, values, strict=True)))
    with partition.active():
        for step in range(trainer.num_train_steps, trainer.num_train_steps + num_batches):
            batch = partition.place(batch_from_windows(batches[step], num_microbatches=trainer.num_microbatches))
            # No step of the run has these keys.
            values = estimate(model, batch, jax.random.fold_in(jax.random.key(trainer.seed), step))
            moments = add(moments or tuple(map(Moments.like, values)), values)
    assert moments is not None
    gradients, curvatures = jax.device_get(moments)
    means, squares, h = (kinds(tree) for tree in (gradients.mean, gradients.squares, curvatures.mean))
    num_targets = trainer.batch_size * config.model.seq_len
    return [
        noise_of(
            kind,
            Moments(gradients.number, means[kind], squares[kind]),
            h[kind],
            num_targets=num_targets,
            momentum=momentum,
        )
        for kind in means
    ]


def momentum_of(config: TrainConfig, settings: StepSettings, state: TrainState) -> Momentum | None:
    """Sophia's rho, which a controller may have moved, and b1; None for another optimizer or another basis."""
    if not isinstance(config.optimizer, SophiaConfig) or config.optimizer.basis != "parameters":
        return None
    return Momentum(float(settings.optimizer.metrics(state.optimizer_state)["rho"]), config.optimizer.b1)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each number of steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=Path("config/gpt2_nano_sophia.yaml"))
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 500, 1500], help="where the parameters are held")
    parser.add_argument("--batches", type=int, default=48, help="batches at each of these points")
    try:
        arguments, config = parse_with_overrides(parser, argv)
        _check(arguments.steps, arguments.batches, config)
        _print_tables(config, arguments.steps, arguments.batches)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


def _check(steps: Sequence[int], num_batches: int, config: TrainConfig) -> None:
    if num_batches < 2:
        raise InputError(f"--batches is {num_batches}; a variance needs at least 2")
    last = config.trainer.num_train_steps
    for step in steps:
        if not 0 <= step <= last:
            raise InputError(f"--steps has {step}; it must be between 0 and trainer.num_train_steps, {last}")


def _print_tables(config: TrainConfig, steps: Sequence[int], num_batches: int) -> None:
    data = prepare(config.data, print)
    batches, vocab_size = train_batches(config, data), data.tokenizer.vocab_size
    settings = StepSettings.of(config)
    estimate = eqx.filter_jit(partial(gradient_and_curvature, settings.policy))
    # The vocabulary's padding is left out.
    kinds = partial(by_kind, rows={"token embedding": tuple(range(vocab_size))}, each_matrix=True)
    trainer = config.trainer
    by_chance = spread(np.random.default_rng(0).f(num_batches - 1, num_batches * trainer.num_microbatches, 100_000))
    print(
        f"{num_batches} batches of B = {trainer.batch_size * config.model.seq_len} targets at fixed parameters. "
        "Coordinates whose h is 0 are left out of ratios and quantiles of h. Were each coordinate's "
        f"B Var(g) / h exactly 1, their medians and quartiles would be about {by_chance}."
    )
    for step, state in trained(config, batches, vocab_size, steps):
        momentum = momentum_of(config, settings, state)
        noises = measure(estimate, kinds, state.model, batches, config, num_batches=num_batches, momentum=momentum)
        print(f"\nAfter {step} steps:\n\n{_table(noises, momentum)}", flush=True)


def _table(noises: Sequence[Noise], momentum: Momentum | None) -> str:
    header = [*HEADER]
    if momentum is not None:
        header.append(f"ρ h < σ of m, ρ = {momentum.rho:.3g}, b1 = {momentum.b1:.3g}")
    return markdown_table(header, [_cells(noise) for noise in noises])


def _cells(noise: Noise) -> list[object]:
    return [
        noise.kind,
        noise.coordinates,
        f"{noise.without_curvature:.1%}",
        noise.ratio,
        f"{noise.ratio_of_sums:.3f}",
        f"{noise.signal:.4f}",
        f"{noise.targets:.3g}",
        " / ".join(f"{h:.2e}" for h in noise.curvature),
        *([] if noise.clipped is None else [f"{noise.clipped:.1%}"]),
    ]


if __name__ == "__main__":
    main()
