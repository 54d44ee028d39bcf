"""Sophia-G, Sophia-H and baseline optimizers as Equinox modules, for any pytree of parameters.

The package depends on jax, numpy, equinox, optax and jaxtyping, but not on the rest of this project.
"""

from sophia_levanter.optim._ademamix import AdEMAMix
from sophia_levanter.optim._baselines import AdamW, BaselineState, Lion, Muon, OptaxOptimizer
from sophia_levanter.optim._gauss_newton import EmpiricalFisher, GaussNewtonBartlett
from sophia_levanter.optim._gradients import GradientSums, RefreshStep, split_microbatches, value_grad_and_curvature
from sophia_levanter.optim._groups import ParameterGroup, ParameterGroups, group_weight_decay, groups_of
from sophia_levanter.optim._hutchinson import Hutchinson
from sophia_levanter.optim._kronecker import Coordinates, KroneckerBasis
from sophia_levanter.optim._likelihood import Bernoulli, Categorical, Likelihood, Normal
from sophia_levanter.optim._norms import CautiousWeightDecay, Hyperball, NormControlState, hyperball_weight_decay
from sophia_levanter.optim._presets import ReproducedSophia, Sophia, SophiaG, SophiaH, sophia_g
from sophia_levanter.optim._protocol import Estimator, MatrixWork, Optimizer
from sophia_levanter.optim._soap import Soap
from sophia_levanter.optim._sophia import AbstractSophia
from sophia_levanter.optim._state import Curvature, Momentum, ScheduledRho, SophiaState, WinRateController
from sophia_levanter.optim._trees import decay_mask_tree

__all__ = [
    "AbstractSophia",
    "AdEMAMix",
    "AdamW",
    "BaselineState",
    "Bernoulli",
    "Categorical",
    "CautiousWeightDecay",
    "Coordinates",
    "Curvature",
    "EmpiricalFisher",
    "Estimator",
    "GaussNewtonBartlett",
    "GradientSums",
    "Hutchinson",
    "Hyperball",
    "KroneckerBasis",
    "Likelihood",
    "Lion",
    "MatrixWork",
    "Momentum",
    "Muon",
    "NormControlState",
    "Normal",
    "OptaxOptimizer",
    "Optimizer",
    "ParameterGroup",
    "ParameterGroups",
    "RefreshStep",
    "ReproducedSophia",
    "ScheduledRho",
    "Soap",
    "Sophia",
    "SophiaG",
    "SophiaH",
    "SophiaState",
    "WinRateController",
    "decay_mask_tree",
    "group_weight_decay",
    "groups_of",
    "hyperball_weight_decay",
    "sophia_g",
    "split_microbatches",
    "value_grad_and_curvature",
]
