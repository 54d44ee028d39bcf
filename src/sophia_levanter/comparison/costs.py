"""What a training token costs, the refreshes of the curvature counted."""

from __future__ import annotations

from sophia_levanter.comparison.records import Record, config_of
from sophia_levanter.config import TrainConfig
from sophia_levanter.training.config import SophiaConfig, SophiaHConfig
from sophia_levanter.training.optimizers import build_optimizer, curvature_share


def flops_per_token(record: Record) -> float:
    """FLOPs of forward, backward and, spread over all steps, refreshes.

    A refresh by GNB is one more backward pass over its part of the batch, two thirds of a gradient (the forward pass is
    shared); one by Hutchinson is a gradient and its derivative, two gradients for each probe. What optimizers do to
    each parameter is not counted: it does not grow with the tokens. The time tells it.
    """
    config = config_of(record)
    optimizer = config.optimizer
    if not isinstance(optimizer, SophiaConfig):
        return record.flops_per_token
    gradients = 2.0 * optimizer.num_probes if isinstance(optimizer, SophiaHConfig) else 2 / 3
    extra = gradients * curvature_share(optimizer, config.trainer) * _refreshes_per_step(config)
    return record.flops_per_token * (1 + extra)


def seconds_per_step(record: Record) -> float:
    """Median seconds of a step, refreshes spread over all steps, on the machine that did the run."""
    plain, refresh = record.seconds
    if refresh is None or plain is None:
        return plain or refresh or 0.0
    return plain + (refresh - plain) * _refreshes_per_step(config_of(record))


def _refreshes_per_step(config: TrainConfig) -> float:
    """The share of a run's steps that refresh the curvature."""
    steps = config.trainer.num_train_steps
    optimizer = build_optimizer(config.optimizer, steps, None)
    return sum(map(optimizer.refresh_due, range(steps))) / steps


def tokens_per_step(record: Record) -> int:
    """Training tokens in a step."""
    return record.config["trainer.batch_size"] * record.config["model.seq_len"]
