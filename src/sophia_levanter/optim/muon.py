"""Muon, optax's: AdamW with the steps of matrices orthogonalised."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import optax

from sophia_levanter.optim.baselines import OptaxOptimizer, check_shared
from sophia_levanter.optim.checks import check_number
from sophia_levanter.optim.matrices import Matrices, matrices_tree
from sophia_levanter.optim.protocol import Scalar, ScalarOrSchedule
from sophia_levanter.optim.trees import WeightDecayMask, decay_mask_tree

PyTree = Any
# Liu et al. 2025, section 2.2: the root mean square of AdamW's steps, so that the learning rate is on its scale.
ADAMW_RMS = 0.2


class Muon(OptaxOptimizer):
    """Muon (Jordan et al. 2024), `optax.contrib.muon`, scaled and decayed as in Liu et al. 2025 (arXiv 2502.16982).

    The step of an in x out matrix is learning_rate * 0.2 * sqrt(max(in, out)) times its Nesterov momentum,
    orthogonalised by five Newton-Schulz iterations: singular values come out between about 0.7 and 1.2, not at 1. All
    other parameters take the steps of AdamW with Nesterov momentum, at the same learning rate.

    Args:
        learning_rate: a number or a function of the update count, for all parameters.
        beta: decay of the matrices' momentum, in [0, 1).
        b1: decay of the first moment of the other parameters, in [0, 1).
        b2: decay of their second moment, in [0, 1).
        eps: added to the root of their second moment, and to the norm that a matrix is divided by at first.
        weight_decay: decoupled decay of all parameters, multiplied by the learning rate.
        weight_decay_mask: a tree (or prefix) of bools, or a function from parameters to one; None decays every leaf.
        matrices: a tree (or prefix), or a function from parameters to one, of optax's `MuonDimensionNumbers` where a
            parameter is orthogonalised and None elsewhere. They number its input (reduction) and output axes; each
            index of the axes left is a matrix of its own. None takes the leaves with two axes, embeddings too.
        momentum_dtype: of momentum and first moment; None for the parameters'.
        gradient_transform: an optax transformation that the gradient goes through first; None for none.

    Raises:
        TypeError, ValueError: if a hyper-parameter that is a concrete number is out of its range; from `init` and
            `update`, if `matrices` does not fit the parameters.
    """

    learning_rate: ScalarOrSchedule = 6e-4
    beta: Scalar = 0.95
    b1: Scalar = 0.9
    b2: Scalar = 0.95
    eps: Scalar = 1e-8
    weight_decay: Scalar = 0.1
    weight_decay_mask: WeightDecayMask = None
    matrices: Matrices = None
    momentum_dtype: Any = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_shared(self)
        check_number("beta", self.beta, low=0, high=1)
        check_number("eps", self.eps, low=0)

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        """The optax transformation for these parameters."""
        matrices = matrices_tree(self.matrices, params)
        direction = optax.contrib.muon(
            1.0,
            beta=self.beta,
            eps=self.eps,
            adam_b1=self.b1,
            adam_b2=self.b2,
            mu_dtype=self.momentum_dtype,
            # A function, since a tree of a model's class may itself be callable.
            muon_weight_dimension_numbers=lambda _: matrices,
            consistent_rms=ADAMW_RMS,
        )
        # optax's own decay has no mask for Adam's group. The direction is downhill already, hence the signs.
        return optax.chain(
            direction,
            optax.add_decayed_weights(-self.weight_decay, decay_mask_tree(self.weight_decay_mask, params)),
            optax.scale_by_learning_rate(self.learning_rate, flip_sign=False),
        )
