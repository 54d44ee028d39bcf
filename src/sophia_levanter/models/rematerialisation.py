"""What a block keeps of its forward pass for the backward pass, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from sophia_levanter.partition.mesh import is_split


def checkpointed(policy: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its intermediate results kept as a policy says.

    Args:
        policy: `none` computes nothing again, but gathers parameters that are split again; `full` keeps nothing; `dots`
            keeps the results of matrix products (not the attention's, which are quadratic in the positions); `offload`
            keeps the same in the host's memory.
        function: of arrays.
    """
    if policy == "none" and not is_split():
        return function
    policies = jax.checkpoint_policies
    chosen: Callable[..., Any] = {
        "none": _all_but_gathered,
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[policy]
    # Inside a scan nothing of the forward pass is there for XLA to reuse.
    return eqx.filter_checkpoint(function, policy=chosen, prevent_cse=False)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whole parameters are the results of sharding constraints, and so not kept."""
    return primitive.name != "sharding_constraint"
