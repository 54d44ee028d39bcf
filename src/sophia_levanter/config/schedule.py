"""Learning rate schedules for the steps after the warm-up. jax is imported only when a schedule is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from draccus import ChoiceRegistry

from sophia_levanter.config.settings import Settings, not_defined, setting, steps_of

Schedule = Callable[[Any], Any]


@dataclass(frozen=True)
class ScheduleConfig(Settings, ChoiceRegistry):
    """The learning rate after the warm-up.

    Attributes:
        decays: whether the schedule ends at `optimizer.final_learning_rate`.
    """

    section: ClassVar[str] = "optimizer.schedule"
    decays: ClassVar[bool] = True

    def build(self, peak: float, final: float, num_steps: int) -> Schedule:
        """Build the learning rate as a function of the number of updates since the warm-up.

        Args:
            peak: the learning rate after 0 updates.
            final: the learning rate after `num_steps` updates.
            num_steps: number of updates from the end of the warm-up to the end of the run, at least 1.
        """
        raise not_defined(self, "build")


@ScheduleConfig.register_subclass("cosine")
@dataclass(frozen=True)
class CosineSchedule(ScheduleConfig):
    """Half-cosine decay from the peak to the final learning rate."""

    def build(self, peak: float, final: float, num_steps: int) -> Schedule:
        import optax

        return optax.cosine_decay_schedule(peak, num_steps, alpha=final / peak)


@ScheduleConfig.register_subclass("linear")
@dataclass(frozen=True)
class LinearSchedule(ScheduleConfig):
    """Linear decay from the peak to the final learning rate."""

    def build(self, peak: float, final: float, num_steps: int) -> Schedule:
        import optax

        return optax.linear_schedule(peak, final, num_steps)


@ScheduleConfig.register_subclass("constant")
@dataclass(frozen=True)
class ConstantSchedule(ScheduleConfig):
    """Constant learning rate, equal to the peak."""

    decays: ClassVar[bool] = False

    def build(self, peak: float, final: float, num_steps: int) -> Schedule:
        import optax

        return optax.constant_schedule(peak)


@ScheduleConfig.register_subclass("wsd")
@dataclass(frozen=True)
class WarmupStableDecaySchedule(ScheduleConfig):
    """Constant at the peak, then decay to the final learning rate (arXiv 2404.06395; 1-sqrt: arXiv 2405.18392)."""

    decay: float | int = setting(
        0.2, "number of decay steps, or a fraction of the steps after the warm-up if below 1", above=0, steps=True
    )
    shape: str = setting("linear", "shape of the decay", choices=("linear", "cosine", "1-sqrt"))

    def build(self, peak: float, final: float, num_steps: int) -> Schedule:
        import jax.numpy as jnp

        decay = min(max(1, steps_of(self.decay, num_steps)), num_steps)
        remaining = {
            "linear": lambda share: 1 - share,
            "cosine": lambda share: (1 + jnp.cos(jnp.pi * share)) / 2,
            "1-sqrt": lambda share: 1 - jnp.sqrt(share),
        }[self.shape]

        def rate(count: Any) -> Any:
            share = jnp.clip((count - (num_steps - decay)) / decay, 0, 1)
            return final + (peak - final) * remaining(share)

        return rate


@ScheduleConfig.register_subclass("inverse_sqrt")
@dataclass(frozen=True)
class InverseSqrtSchedule(ScheduleConfig):
    """Inverse square root decay: the peak times sqrt(timescale / (timescale + steps since the warm-up))."""

    decays: ClassVar[bool] = False

    timescale: int = setting(10_000, "steps after the warm-up until the learning rate drops to 0.71 of the peak", low=1)

    def build(self, peak: float, final: float, num_steps: int) -> Schedule:
        return lambda count: peak * (self.timescale / (self.timescale + count)) ** 0.5
