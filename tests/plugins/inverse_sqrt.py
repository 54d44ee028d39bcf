"""A learning-rate schedule: the inverse square root of the steps since the warm-up."""

from dataclasses import dataclass

from sophia_levanter.config.schedule import ScheduleConfig
from sophia_levanter.config.settings import setting


@ScheduleConfig.register_subclass("inverse_sqrt")
@dataclass(frozen=True)
class InverseSqrtSchedule(ScheduleConfig):
    """The peak over the root of the steps since the warm-up, in units of `timescale`."""

    decays = False  # the final learning rate is not looked at

    timescale: int = setting(1000, "steps until the rate has fallen to 0.71 of the peak", low=1)

    def build(self, peak, final, num_steps):
        return lambda count: peak * (self.timescale / (self.timescale + count)) ** 0.5
