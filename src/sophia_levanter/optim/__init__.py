"""Sophia-G, Sophia-H and baselines, as Equinox modules for any pytree of parameters.

Needs jax, equinox and optax, and nothing else of this project.
"""

from sophia_levanter.optim.baselines import AdamW, Lion
from sophia_levanter.optim.gauss_newton import EmpiricalFisher, GaussNewtonBartlett, GaussNewtonHutchinson
from sophia_levanter.optim.hutchinson import Hutchinson
from sophia_levanter.optim.kronecker import KroneckerBasis
from sophia_levanter.optim.likelihood import Bernoulli, Categorical, Likelihood, Normal
from sophia_levanter.optim.microbatch import split_microbatches
from sophia_levanter.optim.muon import Muon
from sophia_levanter.optim.protocol import Optimizer
from sophia_levanter.optim.shared_forward import value_grad_and_curvature
from sophia_levanter.optim.soap import Soap
from sophia_levanter.optim.sophia import Sophia, SophiaState
from sophia_levanter.optim.variants import SophiaG, SophiaH, sophia_g
from sophia_levanter.optim.win_rate import WinRateController

__all__ = [
    "AdamW",
    "Bernoulli",
    "Categorical",
    "EmpiricalFisher",
    "GaussNewtonBartlett",
    "GaussNewtonHutchinson",
    "Hutchinson",
    "KroneckerBasis",
    "Likelihood",
    "Lion",
    "Muon",
    "Normal",
    "Optimizer",
    "Soap",
    "Sophia",
    "SophiaG",
    "SophiaH",
    "SophiaState",
    "WinRateController",
    "sophia_g",
    "split_microbatches",
    "value_grad_and_curvature",
]
