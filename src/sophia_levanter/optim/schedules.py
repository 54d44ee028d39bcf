"""Learning rates as functions of the update count."""

from __future__ import annotations

import optax


def warmup_schedule(kind: str, *, peak: float, final: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear growth from 0 to `peak` over `warmup_steps`, then `cosine` or `linear` decay to `final`, or `constant`.

    The decay ends at `total_steps`, counted from the start. Update 0 has learning rate 0 where there is a warm-up, as
    in the Sophia authors' and nanoGPT's schedule.

    Raises:
        ValueError: if `kind` is none of the three.
    """
    decay_steps = max(total_steps - warmup_steps, 1)
    match kind:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=final / peak)
        case "linear":
            decay = optax.linear_schedule(peak, final, decay_steps)
        case "constant":
            decay = optax.constant_schedule(peak)
        case _:
            raise ValueError(f"schedule is {kind!r}; it must be one of cosine, linear, constant")
    if warmup_steps == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), decay], [warmup_steps])
