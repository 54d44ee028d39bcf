"""Pre-train GPT-2 language models in JAX with the Sophia optimizers (arXiv 2305.14342)."""

__version__ = "0.1.0"
