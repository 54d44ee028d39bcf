"""A metric: the norm of the gradient of each transformer block."""

import haliax as hax
import jax
import jax.numpy as jnp

from sophia_levanter.config.registries import register_metric


@register_metric("grad_norm_per_layer")
def grad_norm_per_layer(step):
    leaves = jax.tree.leaves(step.grads.blocks, is_leaf=lambda x: isinstance(x, hax.NamedArray))
    squares = [
        hax.sum(hax.square(leaf.astype(jnp.float32)), axis=[a for a in leaf.axes if a.name != "layers"])
        for leaf in leaves
    ]
    norms = jnp.sqrt(sum(square.array for square in squares))
    return {f"layer_{i}": norm for i, norm in enumerate(norms)}
