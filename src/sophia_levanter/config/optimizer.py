"""Optimizer settings. jax is imported only when an optimizer is built."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from draccus import ChoiceRegistry

from sophia_levanter.config.assembly import build_optimizer as build_optimizer
from sophia_levanter.config.groups import GroupConfig
from sophia_levanter.config.schedule import CosineSchedule, Schedule, ScheduleConfig
from sophia_levanter.config.settings import Settings, not_defined, setting, steps_of
from sophia_levanter.config.trainer import DTYPES, OR_FRACTION, TrainerConfig
from sophia_levanter.errors import InputError

if TYPE_CHECKING:
    from sophia_levanter.optim import Estimator, Optimizer, ParameterGroup

FINAL_FRACTION = "final learning rate as a fraction of the peak; ignored by constant and inverse_sqrt"
RHO = "scale of the curvature; updates are clipped where |m| >= rho * h; auto adjusts rho to reach target_win_rate"
SMALLEST_EPS = 1e-37  # smaller values become 0 in float32


@dataclass(frozen=True)
class OptimizerConfig(Settings, ChoiceRegistry):
    """Settings shared by all optimizers, such as the learning rate, its schedule and decoupled weight decay."""

    section: ClassVar[str] = "optimizer"

    learning_rate: float = setting(6e-4, "peak learning rate, reached at the end of the warm-up", above=0)
    final_fraction: float = setting(0.025, FINAL_FRACTION, low=0, high=1)
    final_learning_rate: float | None = setting(None, "final learning rate; overrides final_fraction", low=0)
    schedule: ScheduleConfig = field(default_factory=CosineSchedule)
    warmup: float | int = setting(
        0.02, f"number of linear warm-up steps, {OR_FRACTION}", low=0, steps=True, former="warmup_steps"
    )
    weight_decay: float = setting(0.1, "decoupled weight decay; not applied to biases and norms", low=0)
    momentum_dtype: str = setting("float32", "dtype in which the momentum (first moment) is stored", choices=DTYPES)
    groups: tuple[GroupConfig, ...] = setting(
        (), "parameter groups with their own settings: [{match: wte|wpe, learning_rate: 0.1 x, weight_decay: 0}, ...]"
    )
    hyperball: bool = setting(False, "keep the norm of each matrix fixed; learning_rate is the angle of each update")
    cautious_weight_decay: bool = setting(False, "decay only coordinates that the update does not move away from zero")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule.decays and self.last_learning_rate > self.learning_rate:
            raise InputError(
                f"optimizer.final_learning_rate is {self.final_learning_rate}; it must be between 0 and "
                f"optimizer.learning_rate {self.learning_rate}; or use optimizer.final_fraction, which scales with it"
            )

    @property
    def last_learning_rate(self) -> float:
        """The final learning rate of a decaying schedule."""
        given = self.final_learning_rate
        return self.final_fraction * self.learning_rate if given is None else given

    def check_run(self, trainer: TrainerConfig) -> None:
        """Check that the optimizer's settings fit the run.

        Raises:
            InputError: if they conflict with the trainer's settings; the message names the fields.
        """
        steps = trainer.num_train_steps
        if self.warmup > steps:
            raise InputError(f"optimizer.warmup {self.warmup} exceeds trainer.num_train_steps {steps}")

    def build(self, num_train_steps: int) -> Optimizer:
        """Build the optimizer for a run of `num_train_steps` steps."""
        raise not_defined(self, "build")

    @property
    def parameter_groups(self) -> list[ParameterGroup]:
        """The parameter groups, in the form expected by optimizers."""
        return [group.build(self.learning_rate) for group in self.groups]

    @property
    def decay_arguments(self) -> dict[str, Any]:
        """`weight_decay` and `weight_decay_mask`, in the form expected by optimizers."""
        from sophia_levanter.models.language_model import decay_mask, hyperball_matrices, parameter_roles
        from sophia_levanter.optim import group_weight_decay, hyperball_weight_decay

        rate = self.weight_decay
        mask: Any = decay_mask
        if any(group.weight_decay is not None for group in self.groups):
            rate, mask = 1.0, group_weight_decay(self.parameter_groups, rate, mask, parameter_roles)
        if self.hyperball:
            mask = hyperball_weight_decay(hyperball_matrices, mask)
        return {"weight_decay": rate, "weight_decay_mask": mask}

    def build_schedule(self, num_train_steps: int) -> Schedule:
        """Build the learning rate as a function of the step, including the warm-up.

        With a warm-up, the learning rate is 0 at step 0, as in nanoGPT and in the Sophia authors' code.
        """
        import optax

        warmup_steps = steps_of(self.warmup, num_train_steps)
        num_steps = max(num_train_steps - warmup_steps, 1)
        decay = self.schedule.build(self.learning_rate, self.last_learning_rate, num_steps)
        if warmup_steps == 0:
            return decay
        warmup = optax.linear_schedule(0.0, self.learning_rate, warmup_steps)
        return optax.join_schedules([warmup, decay], [warmup_steps])

    def arguments(self, optimizer: type, num_train_steps: int) -> dict[str, Any]:
        """Return keyword arguments for the class `optimizer`, limited to the parameters of its constructor.

        These are the fields specific to this configuration's type, `learning_rate` as a schedule over
        `num_train_steps`, `weight_decay`, `weight_decay_mask` and `momentum_dtype`.

        Raises:
            InputError: if a group has a weight decay, but the class takes a `weight_decay` and no `weight_decay_mask`.
        """
        import jax.numpy as jnp

        common = {common.name for common in dataclasses.fields(OptimizerConfig)}
        taken = set(inspect.signature(getattr(optimizer, "__init__")).parameters)  # noqa: B009
        # With `cautious_weight_decay`, a wrapper applies the decay.
        if "weight_decay" in taken and "weight_decay_mask" not in taken and not self.cautious_weight_decay:
            self._check_same_decay(optimizer)
        own = [own.name for own in dataclasses.fields(self) if own.name in taken - common]
        shared = self.decay_arguments | {
            "learning_rate": self.build_schedule(num_train_steps),
            "momentum_dtype": jnp.dtype(self.momentum_dtype),
        }
        return {name: getattr(self, name) for name in own} | {name: shared[name] for name in shared if name in taken}

    def _check_same_decay(self, optimizer: type) -> None:
        """Check that no group has a weight decay, because the class `optimizer` does not take a weight decay mask."""
        for group in self.groups:
            if group.weight_decay is not None:
                raise InputError(
                    f"optimizer.groups or model.parametrization mup sets weight_decay {group.weight_decay:g} for some "
                    f"parameters, but {optimizer.__qualname__} decays all parameters alike; add the field "
                    "weight_decay_mask to it, or remove weight_decay from the groups"
                )

    @property
    def longest_rotated_side(self) -> int | None:
        """The longest matrix side that a Kronecker basis rotates; None without a basis."""
        return None

    def step_counts(self, num_train_steps: int) -> dict[str, int]:
        """Return step counts other than the warm-up for a run of `num_train_steps` steps, keyed by field."""
        return {}

    def curvature_microbatches(self, trainer: TrainerConfig) -> tuple[int, int] | None:
        """Return the number and size of the microbatches in a curvature refresh; None if curvature is not estimated."""
        return None

    def describe_curvature(self, trainer: TrainerConfig) -> str | None:
        """Describe when the curvature is refreshed and on how much of the batch; None if curvature is not estimated."""
        return None


@dataclass(frozen=True)
class SophiaConfig(OptimizerConfig):
    """Settings shared by Sophia-G and Sophia-H (arXiv 2305.14342, Algorithm 3)."""

    b1: float = setting(0.965, "decay rate of the momentum m", low=0, below=1)
    b2: float = setting(0.99, "decay rate of the curvature h, per refresh", low=0, below=1)
    rho: float | Literal["auto"] = setting(0.05, RHO, above=0, choices=("auto",))
    eps: float = setting(1e-12, "lower bound on rho * h", low=SMALLEST_EPS)
    weight_decay: float = setting(0.2, "decoupled weight decay; not applied to biases and norms", low=0)
    interval: int = setting(10, "steps between curvature refreshes", low=1)
    bias_correct_momentum: bool = setting(True, "divide m by 1 - b1^steps (not in the paper)")
    bias_correct_curvature: bool = setting(True, "divide h by 1 - b2^refreshes (not in the paper)")
    curvature_batch_fraction: float = setting(
        1.0, "fraction of the batch used to refresh the curvature, rounded to whole microbatches", above=0, high=1
    )
    curvature_microbatch_size: int | None = setting(
        None, "sequences per curvature microbatch; defaults to trainer.microbatch_size", low=1
    )
    target_win_rate: float | None = setting(
        None, "adjust rho so that this fraction of coordinates is unclipped; 0.3 if rho is auto", above=0, below=1
    )
    denominator: str = setting(
        "max", "max(rho * h, eps), or rho * h + eps as in the authors' code (sophia_g only)", choices=("max", "add")
    )
    refresh_order: str = setting(
        "before", "whether to refresh h before or after the update", choices=("before", "after")
    )
    first_refresh: int = setting(0, "index of the first step that refreshes the curvature", low=0)
    initial_refreshes: int = setting(0, "number of initial steps that each refresh h, before interval applies", low=0)
    cautious: bool = setting(False, "skip coordinates whose update opposes the current gradient")
    basis: str = setting(
        "parameters",
        "basis in which h is diagonal; kronecker uses the eigenvectors of both sides of each matrix",
        choices=("parameters", "kronecker"),
    )
    basis_b2: float = setting(0.9, "kronecker only: decay rate of the basis moments, per refresh", low=0, below=1)
    basis_max_size: int = setting(4096, "kronecker only: largest matrix side to rotate", low=1)
    curvature_dtype: str = setting(
        "float32", "dtype in which h is stored; bfloat16 loses small changes", choices=DTYPES
    )

    def check_run(self, trainer: TrainerConfig) -> None:
        super().check_run(trainer)
        if self.first_refresh >= trainer.num_train_steps:
            raise InputError(
                f"optimizer.first_refresh {self.first_refresh} is never reached: "
                f"trainer.num_train_steps is {trainer.num_train_steps}"
            )
        own = self.curvature_microbatch_size
        for part in trainer.parts:
            if own is not None and part.batch_size % own:
                raise InputError(
                    f"optimizer.curvature_microbatch_size {own} does not divide trainer.batch_size {part.batch_size}"
                )

    def build(self, num_train_steps: int) -> Optimizer:
        import jax.numpy as jnp

        from sophia_levanter.models.language_model import matrix_axes
        from sophia_levanter.optim import KroneckerBasis, ReproducedSophia, Sophia, WinRateController

        given = self.arguments(Sophia, num_train_steps) | {"curvature_dtype": jnp.dtype(self.curvature_dtype)}
        given["estimator"] = self.build_estimator()
        if self.rho == "auto" or self.target_win_rate is not None:
            initial: Any = type(self).rho if self.rho == "auto" else self.rho
            given["rho"] = WinRateController(target=self.target_win_rate or 0.3, initial=initial)
        basis = KroneckerBasis(matrix_axes, self.basis_b2, self.basis_max_size, mesh_axis="data")
        given["basis"] = basis if self.basis == "kronecker" else None
        choices = {name: getattr(self, name) for name in ("denominator", "refresh_order", "first_refresh")}
        if choices == {"denominator": "max", "refresh_order": "before", "first_refresh": 0}:
            return Sophia(**given)
        return ReproducedSophia(**given, **choices)

    def build_estimator(self) -> Estimator:
        """Build the curvature estimator."""
        raise not_defined(self, "build_estimator")

    def curvature_microbatches(self, trainer: TrainerConfig) -> tuple[int, int]:
        size = self.curvature_microbatch_size or trainer.gradient_microbatch_size
        return max(1, round(self.curvature_batch_fraction * trainer.batch_size / size)), size

    @property
    def longest_rotated_side(self) -> int | None:
        return self.basis_max_size if self.basis == "kronecker" else None

    def describe_curvature(self, trainer: TrainerConfig) -> str:
        count, size = self.curvature_microbatches(trainer)
        first = f" and in each of the first {self.initial_refreshes}" if self.initial_refreshes else ""
        basis = ", in a Kronecker basis" if self.basis == "kronecker" else ""
        target = f" for a win rate of {self.target_win_rate:g}" if self.target_win_rate else ""
        share = count * size / trainer.batch_size
        return f"every {self.interval} steps{first}, on {share:.0%} of the batch{basis}, rho {self.rho}{target}"


@OptimizerConfig.register_subclass("sophia_g")
@dataclass(frozen=True)
class SophiaGConfig(SophiaConfig):
    """Sophia with the Gauss-Newton-Bartlett estimator (Algorithm 2).

    The model itself computes the losses for sampled labels (`LanguageModel.losses`), so the estimator used by `build`
    does not need a likelihood.
    """

    curvature_batch_fraction: float = setting(
        0.5, "fraction of the batch used to refresh the curvature, rounded to whole microbatches", above=0, high=1
    )
    curvature_reduce: str = setting(
        "square_then_average",
        "order of squaring and averaging microbatch gradients; the authors' code averages first",
        choices=("square_then_average", "average_then_square"),
    )
    curvature_labels: str = setting(
        "sampled",
        "labels for the squared gradient: sampled from the model, or the true labels from the data",
        choices=("sampled", "data"),
    )
    curvature_extra_pass: bool = setting(
        True,
        "use an extra backward pass for the estimate; if false, the part of the batch that refreshes the curvature "
        "uses only sampled labels and does not contribute to the gradient",
    )
    curvature_max_grad_norm: float | None = setting(
        None, "clip the sampled gradient to this norm; 1.0 in the authors' code", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature_labels == "data" and not self.curvature_extra_pass:
            raise InputError(
                "optimizer.curvature_extra_pass is false, but curvature_labels data needs no extra pass; set "
                "curvature_extra_pass to true, or curvature_labels to sampled"
            )

    def build_estimator(self) -> Estimator:
        from sophia_levanter.optim import EmpiricalFisher, GaussNewtonBartlett

        given: dict[str, Any] = {"reduction": self.curvature_reduce, "max_grad_norm": self.curvature_max_grad_norm}
        if self.curvature_labels == "data":
            return EmpiricalFisher(**given)
        return GaussNewtonBartlett(**given, extra_pass=self.curvature_extra_pass)

    def check_run(self, trainer: TrainerConfig) -> None:
        super().check_run(trainer)
        for part in trainer.parts:
            count, size = self.curvature_microbatches(part)
            if not self.curvature_extra_pass and count * size >= part.batch_size:
                raise InputError(
                    f"optimizer.curvature_extra_pass is false, but optimizer.curvature_batch_fraction "
                    f"{self.curvature_batch_fraction} leaves none of the {part.batch_size} sequences "
                    "for the gradient; set trainer.microbatch_size or a smaller fraction"
                )


@OptimizerConfig.register_subclass("sophia_h")
@dataclass(frozen=True)
class SophiaHConfig(SophiaConfig):
    """Sophia with Hutchinson's estimator (Algorithm 1)."""

    rho: float | Literal["auto"] = setting(0.01, RHO, above=0, choices=("auto",))
    probe: str = setting(
        "rademacher",
        "distribution of the random probes; the paper uses gaussian",
        choices=("rademacher", "gaussian"),
    )
    num_probes: int = setting(1, "number of random probes to average per estimate", low=1)
    curvature_batch_fraction: float = setting(
        0.07, "fraction of the batch used to refresh the curvature, rounded to whole microbatches", above=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.denominator == "add":
            raise InputError(
                "optimizer.denominator is 'add', but sophia_h's curvature may be negative, which can reverse the step; "
                "use max"
            )

    def build_estimator(self) -> Estimator:
        from sophia_levanter.optim import Hutchinson

        return Hutchinson(self.probe, self.num_probes)
