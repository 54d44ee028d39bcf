"""Settings of a run, each declared once with its default, help text and bounds. This package does not import jax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sophia_levanter.config.run import TrainConfig

__all__ = ["TrainConfig"]


def __getattr__(name: str) -> Any:
    # Import on first use, because the launcher's process on each host only parses a command line.
    if name in __all__:
        from sophia_levanter.config import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
