"""An estimator of the curvature: the square of the batch's own gradient, which costs no pass."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp

from sophia_levanter.config.optimizer import OptimizerConfig, SophiaConfig
from sophia_levanter.optim import Coordinates


class MeanFisher(eqx.Module):
    """B * g^2, with g the mean gradient on the data's own B targets."""

    coordinates: Coordinates = Coordinates()
    gradients = 0.0  # what an estimate costs, in gradients
    forward_mode = False

    def gradient_and_estimate(self, step):
        sums = step.gradient()
        _, mean = sums.mean()
        return sums, jax.tree.map(lambda g: sums.num_targets * jnp.square(g), self.coordinates.project(mean))

    def changes_of_basis(self, num_microbatches):
        return 1


@OptimizerConfig.register_subclass("sophia_mean_fisher")
@dataclass(frozen=True)
class SophiaMeanFisherConfig(SophiaConfig):
    """Sophia with the square of the mean gradient."""

    def build_estimator(self):
        return MeanFisher()
