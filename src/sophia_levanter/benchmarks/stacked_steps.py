"""One process of `runs_per_hour`: trains one run, or several in one vmapped step, and counts its steps.

`python -m sophia_levanter.benchmarks.stacked_steps --config FILE --runs N --seconds S` prints the line "ready" once it
has compiled and taken a step, waits for a line, trains for S seconds and prints {"tokens": ..., "seconds": ...}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sophia_levanter.batch import Batch, batch_from_windows
from sophia_levanter.command_line import load_config
from sophia_levanter.config import TrainConfig
from sophia_levanter.data.tokenizer import load_tokenizer
from sophia_levanter.models.gpt2 import Gpt2, decay_mask
from sophia_levanter.optim.protocol import value_at
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.optimizers import build_step_settings
from sophia_levanter.training.step import StepOutput, StepSettings, TrainState, train_step

READY = "ready"
Step = Callable[[Batch, TrainState], tuple[TrainState, StepOutput]]


def initial_state(config: TrainConfig, settings: StepSettings, vocab_size: int, seed: int | jax.Array) -> TrainState:
    """The state of a run with a seed before its first step."""
    model = Gpt2.init(config.model, vocab_size=vocab_size, key=jax.random.key(seed))
    return TrainState.init(model, settings.optimizer, settings.policy)


def step_of_run(
    settings: StepSettings, batch: Batch, state: TrainState, seed: jax.Array, rate: jax.Array
) -> tuple[TrainState, StepOutput]:
    """The trainer's plain step of a run that has its own seed, and `rate` times the schedule's learning rate."""
    schedule = settings.optimizer.learning_rate
    optimizer = replace(
        settings.optimizer,  # type: ignore[type-var]  # all optimizers are modules, and so dataclasses
        learning_rate=lambda count: rate * value_at("learning_rate", schedule, count),
    )
    own = replace(settings, optimizer=optimizer, seed=seed)  # type: ignore[arg-type]  # traced under vmap
    return train_step(own, False, batch, state)


def stacked(
    config: TrainConfig, vocab_size: int, seeds: Sequence[int], rates: Sequence[float]
) -> tuple[Step, TrainState]:
    """Several runs in one step, and their states before the first.

    Args:
        config: what the runs share.
        vocab_size: tokens that can be predicted.
        seeds: [run], in place of `trainer.seed`.
        rates: [run], factors of the learning rate.

    Returns:
        The step, whose batch, state and output have the axis `run` in front of all others, and such a state.
    """
    settings = build_step_settings(config.optimizer, config.trainer, decay_mask)
    each_seed, each_rate = jnp.asarray(seeds, jnp.uint32), jnp.asarray(rates, jnp.float32)

    def step(batch: Batch, state: TrainState) -> tuple[TrainState, StepOutput]:
        return jax.vmap(partial(step_of_run, settings))(batch, state, each_seed, each_rate)

    return step, eqx.filter_jit(jax.vmap(partial(initial_state, config, settings, vocab_size)))(each_seed)


def stacked_batches(batches: Sequence[Batch]) -> Batch:
    """The runs' batches as one, with an axis in front of the named ones."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


def compiled_step(config: TrainConfig, num_runs: int) -> tuple[Step, Batch, TrainState]:
    """The step that is timed, its batch of random tokens and its first state; one run's is the trainer's own."""
    vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    random = np.random.default_rng(0)
    trainer, shape = config.trainer, (config.trainer.batch_size, config.model.seq_len + 1)
    batches = [
        batch_from_windows(random.integers(0, vocab_size, shape, np.int32), num_microbatches=trainer.num_microbatches)
        for _ in range(num_runs)
    ]
    if num_runs == 1:
        settings = build_step_settings(config.optimizer, trainer, decay_mask)
        step: Step = partial(train_step, settings, False)
        batch, state = batches[0], initial_state(config, settings, vocab_size, trainer.seed)
    else:
        seeds = [(trainer.seed + i) % 2**32 for i in range(num_runs)]
        step, state = stacked(config, vocab_size, seeds, [0.5**i for i in range(num_runs)])
        batch = stacked_batches(batches)
    # By leaf: the named axes know nothing of the runs in front.
    on_one_device = NamedSharding(partition_of(devices=jax.devices()[:1]).mesh, PartitionSpec())
    batch, state = jax.device_put((batch, state), on_one_device)
    jitted: Any = eqx.filter_jit(step, donate="all-except-first")
    return jitted.lower(batch, state).compile(), batch, state


def steps_within(step: Step, batch: Batch, state: TrainState, seconds: float) -> tuple[int, float]:
    """How many steps are done in a time, one more begun while the last is awaited as in the trainer; and that time.

    Args:
        step: compiled, and run before.
        batch: for all steps.
        state: the first step takes its buffers over.
        seconds: no step begins later than this.
    """
    started = time.perf_counter()
    state, output = step(batch, state)
    num_steps = 1
    while time.perf_counter() - started < seconds:
        before = output
        state, output = step(batch, state)
        num_steps += 1
        jax.block_until_ready(before.metrics)
    jax.block_until_ready((state.step, output))
    return num_steps, time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    """Print "ready", wait for a line, and print the tokens and seconds of the steps that follow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=1, help="how many are trained in one step")
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config)
    with partition_of(devices=jax.devices()[:1]).active():
        step, batch, state = compiled_step(config, arguments.runs)
        state, output = step(batch, state)
        jax.block_until_ready(output.metrics)
        print(READY, flush=True)
        sys.stdin.readline()
        num_steps, seconds = steps_within(step, batch, state, arguments.seconds)
    tokens = num_steps * arguments.runs * config.trainer.batch_size * config.model.seq_len
    print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
