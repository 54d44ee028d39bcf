"""The names that the Sophia authors' training scripts log, for dashboards that were made for them.

After https://github.com/Liuhong99/Sophia, train_sophiag.py and train_adam.py; docs/tracking.md says what differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

_SAME = {
    "validation/loss": "val/loss",
    "train/learning_rate": "lr",
    "train/parameter_norm": "param_norm",
    "optim/win_rate": "train/win_rate",
    "optim/curvature_norm": "hessian_norm2",
    "optim/momentum_norm": "momentum_norm",
}


class AuthorsMetrics:
    """A run's metrics by the authors' names, beside `train/loss`, which is theirs and ours.

    Args:
        max_grad_norm: that gradients are clipped to; None for no clipping.
    """

    def __init__(self, max_grad_norm: float | None) -> None:
        self._max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self._steps = 0
        self._clipped_steps = 0

    def of(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Those that the step's metrics give; `train/clip_rate` is over the steps of this process."""
        named = {"iter": float(step)} | {theirs: metrics[ours] for ours, theirs in _SAME.items() if ours in metrics}
        if "train/mfu" in metrics:
            named["mfu"] = 100 * metrics["train/mfu"]
        if "train/grad_norm" in metrics:
            self._steps += 1
            self._clipped_steps += metrics["train/grad_norm"] > self._max_grad_norm
            named["train/clip_rate"] = self._clipped_steps / self._steps
        return named
