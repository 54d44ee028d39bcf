"""How tokens are drawn from a model. Free of jax, so that a command line can be checked at once."""

from __future__ import annotations

from dataclasses import dataclass

from sophia_levanter.config.settings import Settings, setting
from sophia_levanter.errors import InputError

SMALLEST_TEMPERATURE = 1e-6  # logits divided by less may not be finite


@dataclass(frozen=True)
class Sampling(Settings):
    """How a token is drawn: the temperature is applied first, then `top_k`, then `top_p`.

    Raises:
        InputError: if a number is out of its bounds.
    """

    temperature: float = setting(0.8, "divide logits by it; 0 takes the likeliest token", low=0)
    top_k: int | None = setting(None, "draw from this many of the likeliest tokens and ties with the last", low=1)
    top_p: float | None = setting(
        None, "draw from the fewest of the likeliest tokens with this probability together", above=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise InputError(
                f"temperature is {self.temperature}; it must be 0, for the likeliest token, or at least "
                f"{SMALLEST_TEMPERATURE}"
            )
