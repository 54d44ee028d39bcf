"""Pre-train GPT-2 and Llama models in JAX with the Sophia optimizers (arXiv 2305.14342)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sophia_levanter.api import TrainingResult, train

__version__ = "0.2.0"
__all__ = ["TrainingResult", "train"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that importing only `sophia_levanter.optim` stays fast.
    if name in __all__:
        from sophia_levanter import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
