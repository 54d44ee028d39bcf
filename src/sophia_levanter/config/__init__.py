"""All settings of a training run: each is declared once, with its default, help text and bounds. Free of jax."""

from sophia_levanter.config.run import TrainConfig

__all__ = ["TrainConfig"]
