"""Sophia-G and Sophia-H, and the settings under which they were published."""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import optax

from sophia_levanter.optim.gauss_newton import GaussNewtonBartlett
from sophia_levanter.optim.hutchinson import Hutchinson
from sophia_levanter.optim.protocol import Estimator, Scalar, ScalarOrSchedule
from sophia_levanter.optim.sophia import Sophia
from sophia_levanter.optim.trees import WeightDecayMask
from sophia_levanter.optim.win_rate import WinRateController, rho_or_controller

PyTree = Any

# arXiv 2305.14342, Algorithm 3 and section 3.1.
_UNCORRECTED = {"bias_correct_momentum": False, "bias_correct_curvature": False}
_PAPER: dict[str, Any] = _UNCORRECTED | {"b1": 0.96, "b2": 0.99, "eps": 1e-12, "weight_decay": 0.2, "interval": 10}
# github.com/Liuhong99/Sophia, commit a7e1572: h is refreshed after every tenth update.
_AUTHORS: dict[str, Any] = _PAPER | {
    "b1": 0.965,
    "eps": 1e-15,
    "denominator": "add",
    "refresh_order": "after",
    "first_refresh": 9,
}


class SophiaG(Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimator; h never is negative.

    See `Sophia` for the other arguments. `estimate(outputs_fn, model, key=key)` takes the model's outputs, such as
    logits, and gives B * g^2 for targets drawn from the model's own distribution (Algorithm 2); B, the number of
    targets, is included.

    Args:
        estimator: a `GaussNewtonBartlett`, which holds the likelihood (categorical, if not said otherwise) and how
            microbatches are joined.
    """

    estimator: Estimator = GaussNewtonBartlett()

    @classmethod
    def paper(cls, **overrides: Any) -> SophiaG:
        """As in the paper: no bias correction, one averaged gradient squared, gradients clipped to norm 1."""
        estimator = GaussNewtonBartlett(reduction="average_then_square")
        return cls(**{**_PAPER, "rho": 0.05, "estimator": estimator, "gradient_transform": _clip()} | overrides)

    @classmethod
    def authors(cls, **overrides: Any) -> SophiaG:
        """As in the authors' code: rho h + eps, h refreshed after steps 9, 19, ..., both gradients clipped.

        The update is theirs to rounding if the estimate given after step 9 is taken on a batch of its own, at the
        parameters after that step.
        """
        estimator = GaussNewtonBartlett(reduction="average_then_square", max_grad_norm=1.0)
        return cls(**{**_AUTHORS, "rho": 0.05, "estimator": estimator, "gradient_transform": _clip()} | overrides)


class SophiaH(Sophia):
    """Sophia with Hutchinson's estimator; h may be negative, where the step is a sign step.

    See `Sophia` for the other arguments. `estimate(loss_fn, model, key=key)` takes the scalar mean loss and gives
    u * (H u) (Algorithm 1).

    Args:
        estimator: a `Hutchinson`, which holds the kind and number of probes.
    """

    rho: ScalarOrSchedule | WinRateController = eqx.field(default=0.01, converter=rho_or_controller(0.01))
    estimator: Estimator = Hutchinson()

    @classmethod
    def paper(cls, **overrides: Any) -> SophiaH:
        """As in the paper: no bias correction, Gaussian probes, gradients clipped to norm 1."""
        return cls(**{**_PAPER, "estimator": Hutchinson("gaussian"), "gradient_transform": _clip()} | overrides)

    @classmethod
    def authors(cls, **overrides: Any) -> SophiaH:
        """The update of the authors' code, which has no Sophia-H, over Hutchinson's estimator.

        Their denominator rho h + eps turns the step around where h is negative. It is here for comparison, and the
        only optimizer that takes `denominator="add"` with this estimator.
        """
        return _AuthorsSophiaH(
            **{**_AUTHORS, "estimator": Hutchinson("gaussian"), "gradient_transform": _clip()} | overrides
        )

    @classmethod
    def optax(cls, **overrides: Any) -> SophiaH:
        """As `optax.contrib.sophia` (0.2.8): m corrected, h used before it is refreshed, eps 1e-8, decay 1e-4."""
        settings: dict[str, Any] = {"b1": 0.965, "b2": 0.99, "eps": 1e-8, "weight_decay": 1e-4, "interval": 10}
        return cls(**{**settings, "bias_correct_curvature": False, "refresh_order": "after"} | overrides)

    @classmethod
    def levanter(cls, **overrides: Any) -> SophiaH:
        """As Levanter's `sophia-h` means to be (commit 0251ebf): m corrected, h refreshed after steps 9, 19, ...."""
        settings: dict[str, Any] = {"b1": 0.96, "b2": 0.99, "eps": 1e-12, "weight_decay": 0.1, "interval": 10}
        late: dict[str, Any] = {"bias_correct_curvature": False, "refresh_order": "after", "first_refresh": 9}
        return cls(**{**settings, **late, "estimator": Hutchinson("gaussian")} | overrides)


class _AuthorsSophiaH(SophiaH):
    """What `SophiaH.authors()` gives."""

    _adds_to_signed: ClassVar[bool] = True


def sophia_g(
    learning_rate: ScalarOrSchedule = 6e-4,
    b1: Scalar = 0.965,
    b2: Scalar = 0.99,
    rho: ScalarOrSchedule | WinRateController | str = 0.05,
    eps: Scalar = 1e-12,
    weight_decay: ScalarOrSchedule = 0.2,
    weight_decay_mask: WeightDecayMask = None,
    bias_correct_momentum: bool = True,
    bias_correct_curvature: bool = True,
    denominator: str = "max",
    refresh_order: str = "before",
) -> optax.GradientTransformationExtraArgs:
    """Sophia as an optax transformation from its hyper-parameters, as `optax.inject_hyperparams` needs it.

    The arguments are `Sophia`'s, of which it lacks `cautious` and `basis`; Sophia-H differs in rho (0.01) and in the
    estimates that it is given. When to estimate and how is not the transformation's business: `interval` and the
    estimator belong to a `SophiaG` beside it. A `weight_decay_mask` that is a function must be named in
    `inject_hyperparams(..., static_args="weight_decay_mask")`, or it is taken for a schedule.
    """
    return Sophia(**locals()).as_optax()


def _clip() -> optax.GradientTransformation:
    return optax.clip_by_global_norm(1.0)
