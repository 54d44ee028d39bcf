"""What the curvature costs in time: `python -m sophia_levanter.benchmarks.refresh_time`.

The amortised step, ((k - 1) plain steps + 1 with a refresh) / k, over AdamW's step on the same model, loss and batch,
through the trainer's own step; all timed in turns in one process. Beside Sophia-G and Sophia-H stand
`optax.contrib.sophia` (Hutchinson inside the update, under `lax.cond`), and Sophia-G's estimate from a forward and
backward pass of its own in place of the shared forward.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from haliax import NamedArray

from sophia_levanter.batch import Batch, batch_from_windows, count_targets
from sophia_levanter.benchmarks.timing import Spread, markdown_table, seconds_in_turns, spread
from sophia_levanter.command_line import load_config
from sophia_levanter.config import TrainConfig
from sophia_levanter.models.gpt2 import Gpt2, decay_mask
from sophia_levanter.optim import Sophia
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.optimizers import build_step_settings
from sophia_levanter.training.step import StepSettings, TrainState, train_step

PyTree = Any
Step = Callable[[Batch, TrainState], tuple[TrainState, Any]]
VOCAB_SIZE = 257
MODELS = {
    "nano": (),
    "25M": (("model.num_layers", "8"), ("model.embed_dim", "512"), ("model.scan_unroll", "8")),
}
# What stands in the numerator: the name, the plain step and the step with a refresh.
VARIANTS = (
    ("Sophia-G, whole batch", "sophia plain", "sophia_g whole"),
    ("Sophia-G, half the batch", "sophia plain", "sophia_g half"),
    ("Sophia-H, a fifteenth of the batch", "sophia plain", "sophia_h"),
    ("Sophia-G, whole batch, a second forward and backward", "sophia plain", "two passes"),
    ("optax.contrib.sophia, whole batch", "optax plain", "optax whole"),
    ("optax.contrib.sophia, a fifteenth of the batch", "optax plain", "optax fifteenth"),
)


class Cost(NamedTuple):
    """A variant's amortised step and its refresh, each over AdamW's step of the same round."""

    variant: str
    amortised: Spread
    plain: Spread
    refresh: Spread


class OptaxSophia(eqx.Module):
    """`optax.contrib.sophia` as the training step takes an optimizer.

    Args:
        learning_rate: a number.
        loss_fn: model -> the mean loss that Hutchinson's estimate is taken of.
    """

    learning_rate: float
    loss_fn: Callable[[Gpt2], jax.Array]

    def init(self, model: Gpt2) -> PyTree:
        return self._transformation().init(model)

    def update(
        self, grads: PyTree, state: PyTree, model: Gpt2, h_hat: Any = None, *, finite: jax.Array | None = None
    ) -> Any:
        return self._transformation().update(grads, state, model)

    def refresh_due(self, step: int) -> bool:
        return False

    def metrics(self, state: PyTree) -> dict[str, jax.Array]:
        return {}

    def _transformation(self) -> optax.GradientTransformation:
        hutchinson = optax.contrib.hutchinson_estimator_diag_hessian()

        def estimate(updates: PyTree, state: PyTree, params: PyTree = None, **_: Any) -> tuple[PyTree, PyTree]:
            return hutchinson.update(updates, state, params, obj_fn=self.loss_fn)

        own = optax.GradientTransformationExtraArgs(hutchinson.init, estimate)
        return optax.contrib.sophia(self.learning_rate, weight_decay_mask=decay_mask, hessian_diagonal_fn=own)


def optax_step(settings: StepSettings, rows: int, batch: Batch, state: TrainState) -> tuple[TrainState, Any]:
    """A step of `optax.contrib.sophia`, which looks at its own count to see whether a refresh is due.

    Args:
        settings: all but the optimizer.
        rows: how many rows of the batch the estimate is taken on, at one time.
        batch: [microbatch, batch, position].
        state: the state before.
    """

    def first_rows(x: NamedArray) -> NamedArray:
        return x.flatten_axes(("microbatch", "batch"), "batch")[{"batch": slice(0, rows)}]

    part = jax.tree.map(first_rows, batch, is_leaf=lambda x: isinstance(x, NamedArray))
    optimizer = OptaxSophia(1e-4, lambda model: model.losses(part)[0] / count_targets(part))
    return train_step(dataclasses.replace(settings, optimizer=optimizer), False, batch, state)


def two_pass_step(settings: StepSettings, batch: Batch, state: TrainState) -> tuple[TrainState, Any]:
    """A Sophia-G step whose estimate has a forward pass of its own."""
    optimizer = settings.optimizer
    assert isinstance(optimizer, Sophia)
    key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
    h_hat = optimizer.estimate(Gpt2.__call__, state.model, batch.tokens, key=key, weights=batch.weights)
    refreshed = optimizer.refresh(state.optimizer_state, h_hat)
    state, output = train_step(settings, False, batch, dataclasses.replace(state, optimizer_state=refreshed))
    return state, (output, optimizer.metrics(state.optimizer_state))


class _Run:
    """Steps that are compiled for one kind of state, and take turns with it."""

    def __init__(self, config: TrainConfig, settings: StepSettings, batch: Batch, optimizer: Any = None) -> None:
        def initial_state() -> TrainState:
            model = Gpt2.init(config.model, vocab_size=VOCAB_SIZE, key=jax.random.key(0))
            return TrainState.init(model, settings.optimizer if optimizer is None else optimizer)

        self.batch = batch
        self.state = partition_of(devices=jax.devices()[:1]).made(initial_state)

    def step(self, function: Step, *, count: int | None = None) -> Callable[[], PyTree]:
        """What takes one step of the shared state; with `count` its optimizer is made to believe that many before."""
        step: Any = eqx.filter_jit(function, donate="all-except-first")
        compiled = step.lower(self.batch, self.state).compile()

        def run() -> PyTree:
            if count is not None:
                counted = optax.tree.set(self.state.optimizer_state, count=jnp.int32(count))
                self.state = dataclasses.replace(self.state, optimizer_state=counted)
            self.state, output = compiled(self.batch, self.state)
            return self.state, output

        return run


def runs(path: Path, overrides: Sequence[tuple[str, str]], batch_size: int) -> dict[str, Callable[[], PyTree]]:
    """The steps that are timed, by name.

    Args:
        path: a Sophia-G configuration.
        overrides: as for `load_config`.
        batch_size: windows in a step, a multiple of 30; the gradient takes half of them at a time.
    """
    fifteenth = batch_size // 15
    shape = [("trainer.batch_size", str(batch_size)), ("trainer.microbatch_size", str(batch_size // 2))]

    def config_of(*more: tuple[str, str]) -> TrainConfig:
        return load_config(path, [*overrides, *shape, *more])

    def settings_of(*more: tuple[str, str]) -> StepSettings:
        config = config_of(*more)
        return build_step_settings(config.optimizer, config.trainer, decay_mask)

    config = config_of()
    windows = np.random.default_rng(0).integers(0, VOCAB_SIZE, (batch_size, config.model.seq_len + 1), dtype=np.int32)
    batch = partition_of(devices=jax.devices()[:1]).place(batch_from_windows(windows, num_microbatches=2))
    adamw = settings_of(("optimizer.type", "adamw"))
    whole = settings_of(("optimizer.curvature_batch_fraction", "1.0"))
    half = settings_of(("optimizer.curvature_batch_fraction", "0.5"))
    sophia_h = settings_of(
        ("optimizer.type", "sophia_h"),
        ("optimizer.curvature_batch_fraction", str(1 / 15)),
        ("optimizer.curvature_microbatch_size", str(fifteenth)),
    )
    theirs = OptaxSophia(1e-4, lambda model: jnp.zeros(()))
    for_adamw, for_sophia = _Run(config, adamw, batch), _Run(config, whole, batch)
    for_optax = _Run(config, adamw, batch, theirs)
    return {
        "adamw": for_adamw.step(partial(train_step, adamw, False)),
        "sophia plain": for_sophia.step(partial(train_step, whole, False)),
        "sophia_g whole": for_sophia.step(partial(train_step, whole, True)),
        "sophia_g half": for_sophia.step(partial(train_step, half, True)),
        "sophia_h": for_sophia.step(partial(train_step, sophia_h, True)),
        "two passes": for_sophia.step(partial(two_pass_step, whole)),
        "optax plain": for_optax.step(partial(optax_step, adamw, batch_size), count=1),
        "optax whole": for_optax.step(partial(optax_step, adamw, batch_size), count=0),
        "optax fifteenth": for_optax.step(partial(optax_step, adamw, fifteenth), count=0),
    }


def measure(
    path: Path, overrides: Sequence[tuple[str, str]], *, batch_size: int, rounds: int, interval: int = 10
) -> list[Cost]:
    """The cost of all variants; the arguments are those of `runs`."""
    with partition_of(devices=jax.devices()[:1]).active():
        seconds = seconds_in_turns(runs(path, overrides, batch_size), rounds)
    over_adamw = {name: s / seconds["adamw"] for name, s in seconds.items()}
    return [
        Cost(
            name,
            spread(((interval - 1) * over_adamw[plain] + over_adamw[refresh]) / interval),
            spread(over_adamw[plain]),
            spread(over_adamw[refresh]),
        )
        for name, plain, refresh in VARIANTS
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the amortised step of each variant over AdamW's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("config/gpt2_nano_sophia.yaml"))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=30, help="windows in a step, a multiple of 30")
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--interval", type=int, default=10, help="steps between two refreshes")
    arguments = parser.parse_args(argv)
    if arguments.batch_size % 30:
        parser.error(f"--batch_size is {arguments.batch_size}; it must be a multiple of 30")
    rows = []
    for model in arguments.models:
        overrides = [*MODELS[model], ("model.seq_len", str(arguments.seq_len))]
        costs = measure(
            arguments.config,
            overrides,
            batch_size=arguments.batch_size,
            rounds=arguments.rounds,
            interval=arguments.interval,
        )
        rows += [(model, *cost) for cost in costs]
    print(
        f"Steps of {arguments.batch_size} x {arguments.seq_len} tokens over AdamW's, a refresh every "
        f"{arguments.interval} steps: medians and quartiles over {arguments.rounds} rounds.\n"
    )
    print(markdown_table(["model", "optimizer", "amortised step", "plain step", "step with refresh"], rows))


if __name__ == "__main__":
    main()
