"""An optimizer: Adan (Xie et al. 2022, arXiv 2208.06677), optax's."""

from dataclasses import dataclass
from typing import Any

import optax

from sophia_levanter.config.optimizer import OptimizerConfig
from sophia_levanter.config.settings import setting
from sophia_levanter.optim import OptaxOptimizer, decay_mask_tree


class Adan(OptaxOptimizer):
    learning_rate: Any
    b1: float
    b2: float
    b3: float
    weight_decay: float
    weight_decay_mask: Any

    def transformation(self, params):
        return optax.chain(
            optax.scale_by_adan(self.b1, self.b2, self.b3),
            optax.add_decayed_weights(self.weight_decay, decay_mask_tree(self.weight_decay_mask, params)),
            optax.scale_by_learning_rate(self.learning_rate),
        )


@OptimizerConfig.register_subclass("adan")
@dataclass(frozen=True)
class AdanConfig(OptimizerConfig):
    """Adan: AdamW with a moment of the gradient's change."""

    b1: float = setting(0.98, "decay of the gradient's average", low=0, below=1)
    b2: float = setting(0.92, "decay of the average of its change", low=0, below=1)
    b3: float = setting(0.99, "decay of the second moment", low=0, below=1)

    def build(self, num_train_steps):
        return Adan(**self.arguments(Adan, num_train_steps))
