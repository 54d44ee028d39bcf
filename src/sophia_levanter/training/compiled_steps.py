"""The steps that a run takes, compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import equinox as eqx

from sophia_levanter.batch import Batch
from sophia_levanter.optim import Optimizer
from sophia_levanter.partition.mesh import Partition
from sophia_levanter.training.memory import show_bytes, step_bytes
from sophia_levanter.training.step import StepOutput, StepSettings, TrainState, train_step

Step = Callable[[Batch, TrainState], tuple[TrainState, StepOutput]]


@dataclass(frozen=True)
class CompiledSteps:
    """Steps for batches of one size.

    Attributes:
        batch_size: that size.
        optimizer: says when the curvature is due.
        plain: the step without a refresh.
        refreshing: the step with one; `plain` where the optimizer has no curvature.
    """

    batch_size: int
    optimizer: Optimizer
    plain: Step
    refreshing: Step


def compile_steps(
    settings: StepSettings,
    partition: Partition,
    batch: Batch,
    state: TrainState,
    batch_size: int,
    say: Callable[[str], None],
    of: str = "",
) -> CompiledSteps:
    """Compiles the step, and the one that refreshes the curvature where the optimizer has any.

    Steps that this process has compiled already are taken as they are: a run that goes back to a checkpoint, or whose
    batch size changes back, waits for no compiler.

    Args:
        settings: what stays the same over the run.
        partition: the active one.
        batch: one of the size that the steps are for.
        state: where the run is.
        batch_size: that size.
        say: is told what is compiled, how long it took and what memory a step needs.
        of: what kind of steps, for the first of these lines.
    """
    started = time.perf_counter()
    kinds = (False,) if settings.optimizer.estimator is None else (False, True)
    say(f"compiling {len(kinds)} training step(s){of}")
    compiled = []
    for refresh in kinds:
        compiled.append(_jitted(train_step, settings, refresh, partition).lower(batch, state).compile())
    sizes = [sum(size) for step in compiled if (size := step_bytes(step.compiled)) is not None]
    needs = f"; a step needs at most {show_bytes(max(sizes))} on each device" if sizes else ""
    say(f"compiled in {time.perf_counter() - started:.1f} s{needs}")
    return CompiledSteps(batch_size, settings.optimizer, compiled[0], compiled[-1])


@lru_cache(maxsize=8)
def _jitted(step: Callable[..., Any], settings: StepSettings, refresh: bool, partition: Partition) -> Any:
    """A jitted step, whose programs jax keeps. They depend on the partition: tracing reads the active one."""
    return eqx.filter_jit(partial(step, settings, refresh), donate="all-except-first")
