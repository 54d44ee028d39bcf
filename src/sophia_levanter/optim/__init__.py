"""Sophia-G, Sophia-H and baselines, as Equinox modules for any pytree of parameters.

Needs jax, equinox and optax, and nothing else of this project.
"""

from sophia_levanter.optim.baselines import AdamW, Lion
from sophia_levanter.optim.curvature import gauss_newton_bartlett, hutchinson
from sophia_levanter.optim.protocol import Optimizer
from sophia_levanter.optim.sophia import Sophia, SophiaG, SophiaH, SophiaState

__all__ = [
    "AdamW",
    "Lion",
    "Optimizer",
    "Sophia",
    "SophiaG",
    "SophiaH",
    "SophiaState",
    "gauss_newton_bartlett",
    "hutchinson",
]
