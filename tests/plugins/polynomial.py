"""A learning-rate schedule: a power of the share of the run that is left."""

from dataclasses import dataclass

from sophia_levanter.config.schedule import ScheduleConfig
from sophia_levanter.config.settings import setting


@ScheduleConfig.register_subclass("polynomial")
@dataclass(frozen=True)
class PolynomialSchedule(ScheduleConfig):
    """From the peak to the final learning rate, as `(1 - count / num_steps) ** power`."""

    power: float = setting(2.0, "exponent of the decay", above=0)

    def build(self, peak, final, num_steps):
        return lambda count: final + (peak - final) * (1 - count / num_steps) ** self.power
