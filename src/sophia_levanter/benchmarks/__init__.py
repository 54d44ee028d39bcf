"""Measurements: each is a module to run, and prints ratios of things timed side by side."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as sophia_levanter.main does, before jax is imported
