"""Learning-rate schedules after the warm-up. Free of jax until one is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from draccus import ChoiceRegistry

from sophia_levanter.config.settings import Settings, not_defined

Schedule = Callable[[Any], Any]


@dataclass(frozen=True)
class ScheduleConfig(Settings, ChoiceRegistry):
    """Learning rate after the warm-up.

    Attributes:
        decays: whether it ends at `optimizer.final_learning_rate`.
    """

    section: ClassVar[str] = "optimizer.schedule"
    decays: ClassVar[bool] = True

    def build(self, peak: float, final: float, num_steps: int) -> Schedule:
        """The learning rate as a function of the number of updates since the warm-up.

        Args:
            peak: its value at 0.
            final: its value at `num_steps`.
            num_steps: updates from the end of the warm-up to the end of the run, at least 1.
        """
        raise not_defined(self, "build")


@ScheduleConfig.register_subclass("cosine")
@dataclass(frozen=True)
class CosineSchedule(ScheduleConfig):
    """Half a cosine from the peak to the final learning rate."""

    def build(self, peak: float, final: float, num_steps: int) -> Schedule:
        import optax

        return optax.cosine_decay_schedule(peak, num_steps, alpha=final / peak)


@ScheduleConfig.register_subclass("linear")
@dataclass(frozen=True)
class LinearSchedule(ScheduleConfig):
    """A straight line from the peak to the final learning rate."""

    def build(self, peak: float, final: float, num_steps: int) -> Schedule:
        import optax

        return optax.linear_schedule(peak, final, num_steps)


@ScheduleConfig.register_subclass("constant")
@dataclass(frozen=True)
class ConstantSchedule(ScheduleConfig):
    """The peak learning rate to the end."""

    decays: ClassVar[bool] = False

    def build(self, peak: float, final: float, num_steps: int) -> Schedule:
        import optax

        return optax.constant_schedule(peak)
