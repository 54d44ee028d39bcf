"""Settings of the baseline optimizers. jax is imported only when an optimizer is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sophia_levanter.config.optimizer import FINAL_FRACTION, OptimizerConfig
from sophia_levanter.config.settings import setting, steps_of
from sophia_levanter.config.trainer import OR_FRACTION

if TYPE_CHECKING:
    from sophia_levanter.optim import Optimizer


@OptimizerConfig.register_subclass("adamw")
@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019), from optax."""

    b1: float = setting(0.9, "decay rate of the first moment", low=0, below=1)
    b2: float = setting(0.95, "decay rate of the second moment", low=0, below=1)
    eps: float = setting(1e-8, "added to the square root of the second moment", above=0)
    nesterov: bool = setting(False, "use Nesterov momentum (NAdamW)")
    cautious: bool = setting(False, "skip coordinates whose update opposes the current gradient")

    def build(self, num_train_steps: int) -> Optimizer:
        from sophia_levanter.optim import AdamW

        return AdamW(**self.arguments(AdamW, num_train_steps))


@OptimizerConfig.register_subclass("lion")
@dataclass(frozen=True)
class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023), from optax."""

    learning_rate: float = setting(1e-4, "peak learning rate, reached at the end of the warm-up", above=0)
    final_fraction: float = setting(0.05, FINAL_FRACTION, low=0, high=1)
    b1: float = setting(0.95, "weight of the momentum in the update", low=0, below=1)
    b2: float = setting(0.98, "decay rate of the momentum", low=0, below=1)

    def build(self, num_train_steps: int) -> Optimizer:
        from sophia_levanter.optim import Lion

        return Lion(**self.arguments(Lion, num_train_steps))


@OptimizerConfig.register_subclass("muon")
@dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024), from optax, for matrices in the blocks; AdamW with Nesterov momentum for the rest."""

    beta: float = setting(0.95, "decay rate of the momentum for matrices", low=0, below=1)
    b1: float = setting(0.9, "decay rate of the first moment for all other parameters", low=0, below=1)
    b2: float = setting(0.95, "decay rate of the second moment for all other parameters", low=0, below=1)
    eps: float = setting(1e-8, "added to the square root of the second moment and to each matrix norm", above=0)

    def build(self, num_train_steps: int) -> Optimizer:
        from sophia_levanter.models.language_model import matrix_axes
        from sophia_levanter.optim import Muon

        return Muon(**self.arguments(Muon, num_train_steps), matrices=matrix_axes, mesh_axis="data")


@OptimizerConfig.register_subclass("soap")
@dataclass(frozen=True)
class SoapConfig(OptimizerConfig):
    """SOAP (Vyas et al. 2024) for the matrices in the blocks; AdamW for the rest."""

    b1: float = setting(0.95, "decay rate of the first moment", low=0, below=1)
    b2: float = setting(0.95, "decay rate of the second moments", low=0, below=1)
    eps: float = setting(1e-8, "added to the square root of the second moment", above=0)
    interval: int = setting(10, "steps between basis updates", low=1)
    basis_max_size: int = setting(4096, "largest matrix side to rotate", low=1)

    @property
    def longest_rotated_side(self) -> int:
        return self.basis_max_size

    def build(self, num_train_steps: int) -> Optimizer:
        from sophia_levanter.models.language_model import matrix_axes
        from sophia_levanter.optim import KroneckerBasis, Soap

        basis = KroneckerBasis(matrix_axes, self.b2, self.basis_max_size, mesh_axis="data")
        return Soap(**self.arguments(Soap, num_train_steps), basis=basis)


@OptimizerConfig.register_subclass("ademamix")
@dataclass(frozen=True)
class AdEMAMixConfig(OptimizerConfig):
    """AdEMAMix (Pagliardini et al. 2024): AdamW with a second, slower average of the gradient."""

    b1: float = setting(0.9, "decay rate of the fast average", low=0, below=1)
    b2: float = setting(0.999, "decay rate of the second moment", low=0, below=1)
    b3: float = setting(0.9999, "decay rate of the slow average", low=0, below=1)
    alpha: float = setting(5.0, "weight of the slow average in the update", low=0)
    slow_warmup: float | int | None = setting(
        None, f"steps over which b3 and alpha increase, {OR_FRACTION}; defaults to the whole run", low=0, steps=True
    )
    eps: float = setting(1e-8, "added to the square root of the second moment", above=0)

    def build(self, num_train_steps: int) -> Optimizer:
        from sophia_levanter.optim import AdEMAMix

        return AdEMAMix(**self.arguments(AdEMAMix, num_train_steps) | self.step_counts(num_train_steps))

    def step_counts(self, num_train_steps: int) -> dict[str, int]:
        warmup = num_train_steps if self.slow_warmup is None else steps_of(self.slow_warmup, num_train_steps)
        return {"slow_warmup": warmup}
