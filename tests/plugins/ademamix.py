"""An optimizer: AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137), optax's."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import optax
from optax.contrib import scale_by_ademamix

from sophia_levanter.config.optimizer import OptimizerConfig
from sophia_levanter.config.settings import setting
from sophia_levanter.optim import OptaxOptimizer, decay_mask_tree


class AdEMAMix(OptaxOptimizer):
    learning_rate: Any
    b1: float
    b2: float
    b3: float
    alpha: float
    weight_decay: float
    weight_decay_mask: Any
    momentum_dtype: Any = eqx.field(static=True)

    def transformation(self, params):
        return optax.chain(
            scale_by_ademamix(self.b1, self.b2, self.b3, self.alpha, mu_dtype=self.momentum_dtype),
            optax.add_decayed_weights(self.weight_decay, decay_mask_tree(self.weight_decay_mask, params)),
            optax.scale_by_learning_rate(self.learning_rate),
        )


@OptimizerConfig.register_subclass("ademamix")
@dataclass(frozen=True)
class AdEMAMixConfig(OptimizerConfig):
    """AdEMAMix: AdamW with a second, slower average of the gradient."""

    b1: float = setting(0.9, "decay of the fast average", low=0, below=1)
    b2: float = setting(0.999, "decay of the second moment", low=0, below=1)
    b3: float = setting(0.9999, "decay of the slow average", low=0, below=1)
    alpha: float = setting(5.0, "weight of the slow average in the step", low=0)

    def build(self, num_train_steps):
        return AdEMAMix(**self.arguments(AdEMAMix, num_train_steps))
