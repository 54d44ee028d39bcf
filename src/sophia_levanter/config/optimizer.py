"""The optimizers' settings. Free of jax, so that a command line can be checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import draccus

from sophia_levanter.config.settings import Settings, setting
from sophia_levanter.config.trainer import DTYPES
from sophia_levanter.errors import InputError

SMALLEST_EPS = 1e-37  # float32 makes a smaller one 0


@dataclass(frozen=True)
class OptimizerConfig(Settings, draccus.ChoiceRegistry):
    """Settings of every optimizer: a learning rate with a schedule, and decoupled weight decay.

    Raises:
        InputError: if a value is out of its bounds.
    """

    section: ClassVar[str] = "optimizer"

    learning_rate: float = setting(6e-4, "peak, reached at the end of the warm-up", above=0)
    final_learning_rate: float = setting(1.5e-5, "learning rate at the last step; constant ignores it", low=0)
    schedule: str = setting("cosine", "learning rate after the warm-up", choices=("cosine", "linear", "constant"))
    warmup_steps: int = setting(2000, "steps of linear growth from 0 to learning_rate", low=0)
    weight_decay: float = setting(0.1, "decoupled decay of matrices and embeddings, not of biases and norms", low=0)
    momentum_dtype: str = setting("float32", "dtype of the momentum, or first moment, between steps", choices=DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule != "constant" and self.final_learning_rate > self.learning_rate:
            raise InputError(
                f"optimizer.final_learning_rate is {self.final_learning_rate}; "
                f"it must be between 0 and optimizer.learning_rate, {self.learning_rate}"
            )


@dataclass(frozen=True)
class SophiaConfig(OptimizerConfig):
    """Settings that Sophia-G and Sophia-H share (arXiv 2305.14342, Algorithm 3)."""

    b1: float = setting(0.965, "decay of the momentum m", low=0, below=1)
    b2: float = setting(0.99, "decay of the curvature h, per refresh", low=0, below=1)
    rho: float = setting(0.05, "scale of the curvature; coordinates with |m| >= rho * h take a clipped step", above=0)
    eps: float = setting(1e-12, "floor of rho * h", low=SMALLEST_EPS)
    weight_decay: float = setting(0.2, "decoupled decay of matrices and embeddings, not of biases and norms", low=0)
    interval: int = setting(10, "steps between refreshes of the curvature", low=1)
    bias_correct_momentum: bool = setting(True, "divide m by 1 - b1^steps; the paper does not")
    bias_correct_curvature: bool = setting(True, "divide h by 1 - b2^refreshes; the paper does not")
    curvature_batch_fraction: float = setting(
        1.0, "part of the batch that refreshes the curvature, in whole microbatches", above=0, high=1
    )
    curvature_microbatch_size: int | None = setting(
        None, "sequences in a microbatch of that part; trainer.microbatch_size if not given", low=1
    )
    target_win_rate: float | None = setting(
        None, "adjust rho, starting from its value, until this share of the coordinates is unclipped", above=0, below=1
    )
    denominator: str = setting(
        "max", "max(rho * h, eps), or rho * h + eps as in the authors' code (sophia_g only)", choices=("max", "add")
    )
    refresh_order: str = setting(
        "before", "whether a new estimate enters h before or after the step's update", choices=("before", "after")
    )
    first_refresh: int = setting(0, "first step that refreshes the curvature", low=0)
    initial_refreshes: int = setting(0, "refresh at each of this many first steps, then at the interval", low=0)
    cautious: bool = setting(False, "omit coordinates whose step opposes this batch's gradient")
    basis: str = setting(
        "parameters",
        "where h is diagonal: parameters, or kronecker, the eigenvectors of both sides of each matrix",
        choices=("parameters", "kronecker"),
    )
    basis_b2: float = setting(0.9, "kronecker only: decay of the moments behind the basis, per refresh", low=0, below=1)
    basis_max_size: int = setting(4096, "kronecker only: larger sides of a matrix are not rotated", low=1)
    curvature_dtype: str = setting(
        "float32", "dtype of h between refreshes; bfloat16 loses small changes", choices=DTYPES
    )


@OptimizerConfig.register_subclass("sophia_g")
@dataclass(frozen=True)
class SophiaGConfig(SophiaConfig):
    """Sophia with the Gauss-Newton-Bartlett estimator (Algorithm 2)."""

    curvature_batch_fraction: float = setting(
        0.5, "part of the batch that refreshes the curvature, in whole microbatches", above=0, high=1
    )
    curvature_reduce: str = setting(
        "square_then_average",
        "order of squaring and averaging microbatch gradients; the authors average first",
        choices=("square_then_average", "average_then_square"),
    )
    curvature_labels: str = setting(
        "sampled",
        "labels of the squared gradient: sampled from the model, or the true ones of the data",
        choices=("sampled", "data"),
    )
    curvature_max_grad_norm: float | None = setting(
        None, "clip the sampled gradient to this norm; 1.0 in the authors' code", above=0
    )


@OptimizerConfig.register_subclass("sophia_h")
@dataclass(frozen=True)
class SophiaHConfig(SophiaConfig):
    """Sophia with Hutchinson's estimator (Algorithm 1)."""

    rho: float = setting(0.01, "scale of the curvature; coordinates with |m| >= rho * h take a clipped step", above=0)
    probe: str = setting(
        "rademacher",
        "distribution of the random direction; the paper's is gaussian",
        choices=("rademacher", "gaussian"),
    )
    num_probes: int = setting(1, "random directions that an estimate averages over", low=1)
    curvature_batch_fraction: float = setting(
        0.07, "part of the batch that refreshes the curvature, in whole microbatches", above=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.denominator == "add":
            raise InputError(
                "optimizer.denominator is 'add', and the curvature of sophia_h may be negative, "
                "where an added eps turns the step uphill; use max"
            )


@OptimizerConfig.register_subclass("adamw")
@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019), optax's."""

    b1: float = setting(0.9, "decay of the first moment", low=0, below=1)
    b2: float = setting(0.95, "decay of the second moment", low=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    nesterov: bool = setting(False, "look ahead in the first moment: NAdamW")
    cautious: bool = setting(False, "omit coordinates whose step opposes this batch's gradient")


@OptimizerConfig.register_subclass("lion")
@dataclass(frozen=True)
class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023), optax's."""

    learning_rate: float = setting(1e-4, "peak, reached at the end of the warm-up", above=0)
    final_learning_rate: float = setting(5e-6, "learning rate at the last step; constant ignores it", low=0)
    b1: float = setting(0.95, "weight of the momentum in the step", low=0, below=1)
    b2: float = setting(0.98, "decay of the momentum", low=0, below=1)


@OptimizerConfig.register_subclass("muon")
@dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024), optax's, for the blocks' matrices; AdamW with Nesterov momentum for the rest."""

    beta: float = setting(0.95, "decay of the matrices' momentum", low=0, below=1)
    b1: float = setting(0.9, "decay of the first moment of the rest", low=0, below=1)
    b2: float = setting(0.95, "decay of the second moment of the rest", low=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment and to a matrix's norm", above=0)


@OptimizerConfig.register_subclass("soap")
@dataclass(frozen=True)
class SoapConfig(OptimizerConfig):
    """SOAP (Vyas et al. 2024) on the blocks' matrices; AdamW for the rest."""

    b1: float = setting(0.95, "decay of the first moment", low=0, below=1)
    b2: float = setting(0.95, "decay of the second moments", low=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    interval: int = setting(10, "steps between updates of the basis", low=1)
    basis_max_size: int = setting(4096, "larger sides of a matrix are not rotated", low=1)
