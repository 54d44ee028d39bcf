"""The optimizer's and the trainer's settings. Free of jax, so that a command line can be checked at once."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import draccus

from sophia_levanter.errors import InputError
from sophia_levanter.files import check_utf8

SCHEDULES = ("cosine", "linear", "constant")
CURVATURE_REDUCTIONS = ("square_then_average", "average_then_square")
CURVATURE_LABELS = ("sampled", "data")
BASES = ("parameters", "kronecker")
MOST_WINDOWS = 2**20  # in a step: a billion tokens of 1,024 each
DTYPES = ("float32", "bfloat16")
SMALLEST_EPS = 1e-37


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{field} is {value!r}; it must be one of {', '.join(choices)}")


def _check_positive(field: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{field} is {value}; it must be above 0")


def _check_at_least_1(field: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{field} is {value}; it must be at least 1")


def _check_beta(field: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"{field} is {value}; it must be in [0, 1)")


@dataclass(frozen=True)
class OptimizerConfig(draccus.ChoiceRegistry):
    """What every optimizer has: a learning rate with a schedule, and decoupled weight decay.

    Raises:
        InputError: if a hyper-parameter is out of its range.
    """

    learning_rate: float = 6e-4  # the peak, reached at the end of the warm-up
    final_learning_rate: float = 1.5e-5  # reached at the last step; constant ignores it
    schedule: str = "cosine"  # after the warm-up: cosine, linear, constant
    warmup_steps: int = 2000  # steps of linear growth from 0 to learning_rate
    weight_decay: float = 0.1  # decoupled; on matrices and embeddings, never on biases and norms
    momentum_dtype: str = "float32"  # of the momentum, or first moment, between steps: float32 or bfloat16

    def __post_init__(self) -> None:
        _check_positive("optimizer.learning_rate", self.learning_rate)
        _check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        if self.schedule != "constant" and not 0 <= self.final_learning_rate <= self.learning_rate:
            raise InputError(
                f"optimizer.final_learning_rate is {self.final_learning_rate}; "
                f"it must be between 0 and optimizer.learning_rate, {self.learning_rate}"
            )
        _check_choice("optimizer.momentum_dtype", self.momentum_dtype, DTYPES)
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise InputError(f"optimizer.{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True)
class SophiaConfig(OptimizerConfig):
    """What Sophia-G and Sophia-H share (arXiv 2305.14342, Algorithm 3)."""

    b1: float = 0.965  # decay of the momentum m
    b2: float = 0.99  # decay of the curvature h, per refresh
    rho: float = 0.05  # scale of the curvature; coordinates with |m| >= rho * h take a clipped step
    eps: float = 1e-12  # floor of rho * h
    weight_decay: float = 0.2  # decoupled; on matrices and embeddings, never on biases and norms
    interval: int = 10  # steps between two refreshes of the curvature
    bias_correct_momentum: bool = True  # divide m by 1 - b1^steps; published: false
    bias_correct_curvature: bool = True  # divide h by 1 - b2^refreshes; published: false
    curvature_batch_fraction: float = 1.0  # part of the batch that refreshes the curvature, in whole microbatches
    curvature_microbatch_size: int | None = None  # rows of a microbatch of that part; none: as trainer's
    target_win_rate: float | None = None  # steer rho, from its value here, so that this share of steps is unclipped
    denominator: str = "max"  # max(rho * h, eps); or add, rho * h + eps, as in the authors' code: sophia_g only
    refresh_order: str = "before"  # a new estimate enters h before the step's update; or after it
    first_refresh: int = 0  # the first step that refreshes the curvature
    initial_refreshes: int = 0  # this many steps from there on refresh it each, before the interval counts
    cautious: bool = False  # leave out the coordinates whose step would go up this batch's gradient
    basis: str = "parameters"  # in which h is diagonal; or kronecker, eigenvectors of both sides of the matrices
    basis_b2: float = 0.9  # kronecker only: decay of the moments behind the basis, per refresh
    basis_max_size: int = 4096  # kronecker only: a side of a matrix with more coordinates than this keeps them
    curvature_dtype: str = "float32"  # of h between refreshes: float32 or bfloat16, which loses small changes

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_beta("optimizer.b1", self.b1)
        _check_beta("optimizer.b2", self.b2)
        _check_choice("optimizer.basis", self.basis, BASES)
        _check_beta("optimizer.basis_b2", self.basis_b2)
        _check_at_least_1("optimizer.basis_max_size", self.basis_max_size)
        _check_choice("optimizer.curvature_dtype", self.curvature_dtype, DTYPES)
        _check_positive("optimizer.rho", self.rho)
        if not self.eps >= SMALLEST_EPS:
            raise InputError(f"optimizer.eps is {self.eps}; it must be at least {SMALLEST_EPS}, or float32 makes it 0")
        if self.curvature_microbatch_size is not None:
            _check_at_least_1("optimizer.curvature_microbatch_size", self.curvature_microbatch_size)
        _check_at_least_1("optimizer.interval", self.interval)
        for name in ("first_refresh", "initial_refreshes"):
            if getattr(self, name) < 0:
                raise InputError(f"optimizer.{name} is {getattr(self, name)}; it must not be negative")
        if self.target_win_rate is not None and not 0 < self.target_win_rate < 1:
            raise InputError(f"optimizer.target_win_rate is {self.target_win_rate}; it must be in (0, 1)")
        _check_choice("optimizer.denominator", self.denominator, ("max", "add"))
        _check_choice("optimizer.refresh_order", self.refresh_order, ("before", "after"))
        if not 0 < self.curvature_batch_fraction <= 1:
            raise InputError(
                f"optimizer.curvature_batch_fraction is {self.curvature_batch_fraction}; it must be in (0, 1]"
            )


@OptimizerConfig.register_subclass("sophia_g")
@dataclass(frozen=True)
class SophiaGConfig(SophiaConfig):
    """Sophia with the Gauss-Newton-Bartlett estimator (Algorithm 2)."""

    curvature_batch_fraction: float = 0.5  # part of the batch that refreshes the curvature, in whole microbatches
    curvature_reduce: str = "square_then_average"  # of microbatch gradients; or average_then_square, as the authors do
    curvature_labels: str = "sampled"  # of the gradient that is squared: drawn from the model; or data, the true labels
    curvature_max_grad_norm: float | None = None  # clip the sampled gradient to this norm; 1.0 in the authors' code

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("optimizer.curvature_reduce", self.curvature_reduce, CURVATURE_REDUCTIONS)
        _check_choice("optimizer.curvature_labels", self.curvature_labels, CURVATURE_LABELS)
        if self.curvature_max_grad_norm is not None:
            _check_positive("optimizer.curvature_max_grad_norm", self.curvature_max_grad_norm)


@OptimizerConfig.register_subclass("sophia_h")
@dataclass(frozen=True)
class SophiaHConfig(SophiaConfig):
    """Sophia with Hutchinson's estimator (Algorithm 1)."""

    rho: float = 0.01  # scale of the curvature; coordinates with |m| >= rho * h take a clipped step
    probe: str = "rademacher"  # distribution of the random direction; or gaussian, as in the paper
    num_probes: int = 1  # random directions that an estimate is averaged over
    curvature_batch_fraction: float = 0.07  # part of the batch that refreshes the curvature, in whole microbatches

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.denominator == "add":
            raise InputError(
                "optimizer.denominator is 'add', and the curvature of sophia_h may be negative, "
                "where an added eps turns the step uphill; use max"
            )
        _check_choice("optimizer.probe", self.probe, ("rademacher", "gaussian"))
        _check_at_least_1("optimizer.num_probes", self.num_probes)


@OptimizerConfig.register_subclass("adamw")
@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019), optax's."""

    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    nesterov: bool = False  # look ahead in the first moment: NAdamW
    cautious: bool = False  # leave out the coordinates whose step would go up this batch's gradient

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_beta("optimizer.b1", self.b1)
        _check_beta("optimizer.b2", self.b2)
        _check_positive("optimizer.eps", self.eps)


@OptimizerConfig.register_subclass("lion")
@dataclass(frozen=True)
class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023), optax's."""

    learning_rate: float = 1e-4  # the peak, reached at the end of the warm-up
    final_learning_rate: float = 5e-6  # reached at the last step; constant ignores it
    b1: float = 0.95  # weight of the momentum in the step
    b2: float = 0.98  # decay of the momentum

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_beta("optimizer.b1", self.b1)
        _check_beta("optimizer.b2", self.b2)


@OptimizerConfig.register_subclass("muon")
@dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024), optax's, for the blocks' matrices; AdamW with Nesterov momentum for the rest."""

    beta: float = 0.95  # decay of the matrices' momentum
    b1: float = 0.9  # decay of the first moment of the rest
    b2: float = 0.95  # decay of the second moment of the rest
    eps: float = 1e-8  # added to the root of the second moment, and to the norm that a matrix is divided by

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "b1", "b2"):
            _check_beta(f"optimizer.{name}", getattr(self, name))
        _check_positive("optimizer.eps", self.eps)


@OptimizerConfig.register_subclass("soap")
@dataclass(frozen=True)
class SoapConfig(OptimizerConfig):
    """SOAP (Vyas et al. 2024) on the blocks' matrices; AdamW for the rest."""

    b1: float = 0.95  # decay of the first moment
    b2: float = 0.95  # decay of the second moments
    eps: float = 1e-8  # added to the root of the second moment
    interval: int = 10  # steps between two turns of the basis
    basis_max_size: int = 4096  # a side of a matrix with more coordinates than this keeps them

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_beta("optimizer.b1", self.b1)
        _check_beta("optimizer.b2", self.b2)
        _check_positive("optimizer.eps", self.eps)
        _check_at_least_1("optimizer.interval", self.interval)
        _check_at_least_1("optimizer.basis_max_size", self.basis_max_size)


@dataclass(frozen=True)
class BatchSizeChange:
    """Another batch size from a step on.

    Raises:
        InputError: if a number is below 1.
    """

    step: int  # the first step with it, counted from 0
    batch_size: int  # windows in a step

    def __post_init__(self) -> None:
        for name in ("step", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"trainer.batch_size_changes: {name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class TrainerConfig:
    """How long, how wide and where to train.

    Raises:
        InputError: if a count is out of its range or the batch does not divide into microbatches.
    """

    num_train_steps: int = 100_000  # optimizer steps in the whole run
    batch_size: int = 480  # windows in a step
    batch_size_changes: tuple[BatchSizeChange, ...] = ()  # other sizes later: [{step: 1000, batch_size: 960}, ...]
    microbatch_size: int | None = None  # windows whose gradient is computed at one time; the batch if not given
    seed: int = 0  # of the initial weights, the data order, dropout and curvature samples
    parameter_dtype: str = "float32"  # of the parameters between steps: float32 or bfloat16
    compute_dtype: str = "float32"  # of activations and matrix products: float32 or bfloat16
    max_grad_norm: float | None = 1.0  # gradients with a larger global norm are scaled down to it
    loss_spike_factor: float | None = None  # steps whose loss is above so many times its recent mean change nothing
    max_skipped_steps: int = 10  # steps in a row that were skipped for their loss or gradient before the run gives up
    max_rollbacks: int = 0  # times that it goes back to its last good checkpoint, and past the data since, instead
    evaluate_every: int = 1000  # steps between two validation losses; one more comes at the end
    evaluation_windows: int | None = 512  # windows in a validation loss, spread evenly; all if not given
    checkpoint_every: int = 1000  # steps between two checkpoints; one more comes at the end
    checkpoint_dir: str | None = None  # checkpoints go to this path, gs:// or s3://; run_dir/checkpoints if not given
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    keep_every: int | None = None  # checkpoints at multiples of so many steps are kept for ever
    keep_best: bool = True  # the checkpoint with the lowest validation loss is kept
    cast_checkpoint: bool = False  # on resuming, convert arrays that were saved in another floating-point dtype
    step_timeout: int | None = 3600  # seconds that a step, evaluation batch or save may take before the run ends
    log_every: int = 10  # steps between two lines of progress where there is no terminal
    sample_tokens: int = 200  # tokens of text generated at the end of the run
    profile_steps: str | None = None  # FIRST:END, steps to trace into run_dir/profile, END not among them
    initial_weights: str | None = None  # a Hugging Face GPT-2 folder or nanoGPT's ckpt.pt; drawn by seed if not given
    run_dir: str | None = None  # config, metrics and checkpoints go here; runs/NAME-TIME if not given

    def __post_init__(self) -> None:
        counts = ("num_train_steps", "batch_size", "max_skipped_steps", "evaluate_every", "checkpoint_every")
        for name in (*counts, "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"trainer.{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_size > MOST_WINDOWS:
            raise InputError(f"trainer.batch_size is {self.batch_size}; it must be at most {MOST_WINDOWS}")
        if self.num_train_steps >= 2**31:
            raise InputError(f"trainer.num_train_steps is {self.num_train_steps}; it must be below {2**31}")
        if self.run_dir == "":
            raise InputError("trainer.run_dir is empty; leave it out for a directory of its own under runs/")
        check_utf8("trainer.checkpoint_dir", self.checkpoint_dir or "")
        if re.match(r"(gs|s3):(?!//)", self.checkpoint_dir or ""):
            raise InputError(f"trainer.checkpoint_dir is {self.checkpoint_dir}; write a path, gs:// or s3://")
        if self.initial_weights == "":
            raise InputError("trainer.initial_weights is empty; leave it out for weights drawn by trainer.seed")
        if self.checkpoint_dir == "":
            raise InputError(
                "trainer.checkpoint_dir is empty; leave it out for the folder checkpoints in the run's own"
            )
        for name in ("microbatch_size", "evaluation_windows", "keep_every", "step_timeout"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"trainer.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"trainer.seed is {self.seed}; it must be between 0 and {2**32 - 1}")
        for name in ("sample_tokens", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise InputError(f"trainer.{name} is {getattr(self, name)}; it must not be negative")
        if self.microbatch_size is not None and self.batch_size % self.microbatch_size:
            raise InputError(
                f"trainer.microbatch_size {self.microbatch_size} does not divide trainer.batch_size {self.batch_size}"
            )
        steps = [change.step for change in self.batch_size_changes]
        if steps != sorted(set(steps)):
            raise InputError(f"trainer.batch_size_changes are at the steps {steps}; each must be above the one before")
        for change in self.batch_size_changes:
            if change.step >= self.num_train_steps:
                raise InputError(
                    f"trainer.batch_size_changes has the step {change.step}, which is never reached: "
                    f"trainer.num_train_steps is {self.num_train_steps}"
                )
            self.at_step(change.step)  # whether this size would do as the only one
        if self.max_grad_norm is not None:
            _check_positive("trainer.max_grad_norm", self.max_grad_norm)
        if self.loss_spike_factor is not None and not self.loss_spike_factor > 1:
            raise InputError(f"trainer.loss_spike_factor is {self.loss_spike_factor}; it must be above 1")
        for name in ("parameter_dtype", "compute_dtype"):
            _check_choice(f"trainer.{name}", getattr(self, name), DTYPES)
        if self.profile_steps is not None and not self.profiled_steps:
            raise InputError(
                f"trainer.profile_steps is {self.profile_steps!r}; it must be FIRST:END, FIRST below END, like 10:15"
            )
        if self.profiled_steps.stop > self.num_train_steps:
            raise InputError(
                f"trainer.profile_steps is {self.profile_steps}, but trainer.num_train_steps is {self.num_train_steps}"
            )

    @property
    def profiled_steps(self) -> range:
        """The steps that `profile_steps` names; empty if it names none or is not FIRST:END."""
        first, colon, end = (self.profile_steps or "").partition(":")
        if not (colon and re.fullmatch(r"[0-9]{1,9}", first) and re.fullmatch(r"[0-9]{1,9}", end)):
            return range(0)
        return range(int(first), int(end))

    def at_step(self, step: int) -> TrainerConfig:
        """The same with the batch size of a step, and no changes."""
        if not self.batch_size_changes:
            return self
        sizes = [change.batch_size for change in self.batch_size_changes if change.step <= step]
        return replace(self, batch_size=sizes[-1] if sizes else self.batch_size, batch_size_changes=())

    @property
    def size_changes(self) -> list[tuple[int, int]]:
        """`(step, batch size)` of each change."""
        return [(change.step, change.batch_size) for change in self.batch_size_changes]

    @property
    def parts(self) -> list[TrainerConfig]:
        """The same with each of its batch sizes, and no changes."""
        return [self.at_step(step) for step in (0, *(change.step for change in self.batch_size_changes))]

    @property
    def num_microbatches(self) -> int:
        return self.batch_size // (self.microbatch_size or self.batch_size)
