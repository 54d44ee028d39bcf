"""What a training token of a recorded run cost, the refreshes of the curvature and work on whole matrices counted."""

from __future__ import annotations

from sophia_levanter.comparison.records import Record, config_of
from sophia_levanter.training.costs import flops_per_step, refreshes_per_step


def flops_per_token(record: Record) -> float:
    """FLOPs of a step, all counted, over its tokens."""
    return flops_per_step(config_of(record), record.flops_per_token) / tokens_per_step(record)


def seconds_per_step(record: Record) -> float:
    """Median seconds of a step, refreshes spread over all steps, on the machine that did the run."""
    plain, refresh = record.seconds
    if refresh is None or plain is None:
        return plain or refresh or 0.0
    return plain + (refresh - plain) * refreshes_per_step(config_of(record))


def tokens_per_step(record: Record) -> int:
    """Training tokens in a step."""
    return record.config["trainer.batch_size"] * record.config["model.seq_len"]
