"""A run's steps as the trainer compiles them, without data and without parameters in memory."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from sophia_levanter.batch import Batch, batch_from_windows
from sophia_levanter.config import TrainConfig
from sophia_levanter.partition.mesh import Partition
from sophia_levanter.training.step import StepSettings, TrainState, train_step


def abstract_state(config: TrainConfig, partition: Partition, vocab_size: int) -> TrainState:
    """The state of a run as `jax.ShapeDtypeStruct`s with their shardings."""
    settings = StepSettings.of(config)

    def initial_state() -> TrainState:
        model = config.model.build(vocab_size=vocab_size, key=jax.random.key(0))
        return TrainState.init(model, settings.optimizer, settings.policy)

    return partition.abstract(initial_state)


def lower_step(config: TrainConfig, partition: Partition, vocab_size: int, *, refresh: bool) -> jax.stages.Lowered:
    """A step, ready to be compiled.

    Args:
        config: the run; its data are not looked at.
        partition: the devices, which need not be there.
        vocab_size: classes that can be predicted.
        refresh: whether the step refreshes the curvature.
    """
    settings = StepSettings.of(config)

    def batch() -> Batch:
        windows = np.zeros((config.trainer.batch_size, config.model.seq_len + 1), np.int32)
        return batch_from_windows(windows, num_microbatches=config.trainer.num_microbatches)

    step = jax.jit(partial(train_step, settings, refresh), donate_argnums=1)
    with partition.active():
        return step.lower(partition.abstract(batch), abstract_state(config, partition, vocab_size))
