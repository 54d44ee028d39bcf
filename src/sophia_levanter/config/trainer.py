"""Settings for training and sampling. This module does not import jax, so that command lines are checked quickly."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, replace
from typing import ClassVar

from sophia_levanter.config.data import check_name
from sophia_levanter.config.registries import CALLBACKS, METRICS
from sophia_levanter.config.settings import Settings, setting, steps_of
from sophia_levanter.errors import InputError
from sophia_levanter.files import check_utf8

MOST_WINDOWS = 2**20  # maximum sequences per step: a billion tokens at 1,024 tokens each
DTYPES = ("float32", "bfloat16")
OR_FRACTION = "or a fraction of the run if below 1"
TASKS = ("hellaswag", "piqa", "arc", "lambada")


@dataclass(frozen=True)
class BatchSizeChange(Settings):
    """A batch size that takes effect at a given step."""

    section: ClassVar[str] = "trainer.batch_size_changes"

    step: int = setting(MISSING, "first step with this batch size, counting from 0", low=1)
    batch_size: int = setting(MISSING, "sequences per step", low=1, high=MOST_WINDOWS)


@dataclass(frozen=True)
class TaskConfig(Settings):
    """A benchmark to evaluate during training."""

    section: ClassVar[str] = "trainer.tasks"

    task: str = setting(MISSING, "benchmark to run", choices=TASKS)
    file: str = setting(MISSING, "file of questions, in the JSON Lines format of the benchmark", empty="specify a file")
    name: str | None = setting(None, "name in metrics, as in tasks/NAME/accuracy; defaults to the task")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.section, self.title)
        check_utf8(f"{self.section}.file", self.file)

    @property
    def title(self) -> str:
        """The task's name, as used in the names of its metrics."""
        return self.task if self.name is None else self.name


@dataclass(frozen=True)
class TrainerConfig(Settings):
    """Training length, batches, precision, evaluation, checkpoints and output.

    Raises:
        InputError: if a value is out of bounds, the microbatch size does not divide a batch size, or two tasks have the
            same name.
    """

    section: ClassVar[str] = "trainer"

    num_train_steps: int = setting(100_000, "number of optimizer steps in the run", low=1, high=2**31 - 1)
    batch_size: int = setting(480, "sequences per step", low=1, high=MOST_WINDOWS)
    batch_size_changes: tuple[BatchSizeChange, ...] = setting(
        (), "batch size changes during the run: [{step: 1000, batch_size: 960}, ...]"
    )
    microbatch_size: int | None = setting(
        None, "sequences per microbatch in gradient accumulation; defaults to the whole batch", low=1
    )
    seed: int = setting(
        0, "seed for the initial weights, data order, dropout and curvature samples", low=0, high=2**32 - 1
    )
    parameter_dtype: str = setting("float32", "dtype in which parameters are stored", choices=DTYPES)
    compute_dtype: str = setting("float32", "dtype of activations and matrix products", choices=DTYPES)
    max_grad_norm: float | None = setting(1.0, "clip gradients to this global norm", above=0)
    loss_spike_factor: float | None = setting(
        None, "skip steps whose loss exceeds this multiple of the recent mean", above=1
    )
    ema_decay: float | None = setting(
        None,
        "decay rate of an exponential moving average of the weights, such as 0.999; if unset, no average is kept",
        above=0,
        below=1,
    )
    lawa_every: float | int | None = setting(
        None,
        f"steps between weight snapshots to average, {OR_FRACTION}; if unset, no average is kept",
        above=0,
        steps=True,
    )
    lawa_snapshots: int = setting(
        5, "number of snapshots to average; each uses as much memory as the parameters", low=1
    )
    max_skipped_steps: int = setting(10, "consecutive skipped steps before the run fails or rolls back", low=1)
    max_rollbacks: int = setting(
        0, "maximum number of rollbacks to the last good checkpoint; each skips the data seen since then", low=0
    )
    evaluate_every: float | int = setting(
        0.05, f"steps between evaluations, {OR_FRACTION}; a final one runs at the end", above=0, steps=True
    )
    evaluation_windows: int | None = setting(512, "number of evenly spaced sequences per evaluation; null: all", low=1)
    tasks: tuple[TaskConfig, ...] = setting(
        (), "benchmarks to evaluate: [{task: hellaswag, file: hellaswag_val.jsonl}, ...]"
    )
    tasks_every: float | int = setting(
        0.25, f"steps between task evaluations, {OR_FRACTION}; a final one runs at the end", above=0, steps=True
    )
    checkpoint_every: float | int = setting(
        1000, f"steps between checkpoints, {OR_FRACTION}; a final one is saved at the end", above=0, steps=True
    )
    checkpoint_minutes: float | None = setting(
        None, "also save when the last checkpoint is this many minutes old", above=0
    )
    checkpoint_dir: str | None = setting(
        None, "path or bucket URL (gs://, s3://) for checkpoints; defaults to run_dir/checkpoints"
    )
    keep_checkpoints: int = setting(2, "number of most recent checkpoints to keep", low=1)
    keep_every: int | None = setting(None, "permanently keep checkpoints at multiples of this many steps", low=1)
    keep_best: bool = setting(True, "keep the checkpoint with the lowest validation loss (see best_by)")
    best_by: str | None = setting(
        None, "validation set whose loss selects the best checkpoint; defaults to the mean over all sets"
    )
    cast_checkpoint: bool = setting(
        False, "when resuming, convert arrays that were saved in a different floating-point dtype"
    )
    step_timeout: int | None = setting(
        3600, "abort the run if a step, evaluation batch or save takes longer than this many seconds", low=1
    )
    metrics: tuple[str, ...] = setting((), "registered metrics to compute at each step, such as those from a plug-in")
    callbacks: tuple[str, ...] = setting((), "registered callbacks to run between steps, such as those from a plug-in")
    statistics_every: float | int | None = setting(
        None,
        f"steps between per-layer statistics of each array, {OR_FRACTION}; if unset, none are computed",
        above=0,
        steps=True,
    )
    log_every: float | int = setting(
        10,
        f"steps between progress lines when stdout is not a terminal, {OR_FRACTION}; prints at least every ten seconds",
        above=0,
        steps=True,
    )
    sample_tokens: int = setting(200, "number of tokens to sample at the end of the run", low=0)
    profile_steps: str | None = setting(None, "range FIRST:END of steps to trace into run_dir/profile, END excluded")
    initial_weights: str | None = setting(
        None,
        "initial weights: directory saved by transformers (GPT-2, Llama, Qwen3) or nanoGPT ckpt.pt; random if unset",
    )
    run_dir: str | None = setting(None, "directory for config, metrics and checkpoints; defaults to runs/NAME-TIME")

    def __post_init__(self) -> None:
        super().__post_init__()
        METRICS.check(self.metrics)
        CALLBACKS.check(self.callbacks)
        check_utf8("trainer.checkpoint_dir", self.checkpoint_dir or "")
        if re.match(r"(gs|s3):(?!//)", self.checkpoint_dir or ""):
            raise InputError(f"trainer.checkpoint_dir is {self.checkpoint_dir}; use a path or a gs:// or s3:// URL")
        if self.microbatch_size is not None and self.batch_size % self.microbatch_size:
            raise InputError(
                f"trainer.microbatch_size {self.microbatch_size} does not divide trainer.batch_size {self.batch_size}"
            )
        self._check_batch_size_changes()
        titles = [task.title for task in self.tasks]
        for title in titles:
            if titles.count(title) > 1:
                raise InputError(f"trainer.tasks contains several tasks named {title}; give each a unique name")
        if self.ema_decay is not None and self.lawa_every is not None:
            raise InputError(
                f"trainer.ema_decay {self.ema_decay} and trainer.lawa_every {self.lawa_every} cannot be combined; "
                "specify only one"
            )
        if self.lawa_every is not None and self.lawa_every > self.num_train_steps:
            raise InputError(
                f"trainer.lawa_every {self.lawa_every} exceeds trainer.num_train_steps {self.num_train_steps}"
            )
        if self.profile_steps is not None and not self.profiled_steps:
            raise InputError(
                f"trainer.profile_steps is {self.profile_steps!r}; it must be FIRST:END with FIRST < END, such as 10:15"
            )
        if self.profiled_steps.stop > self.num_train_steps:
            raise InputError(
                f"trainer.profile_steps is {self.profile_steps}, but trainer.num_train_steps is {self.num_train_steps}"
            )

    def _check_batch_size_changes(self) -> None:
        steps = [change.step for change in self.batch_size_changes]
        if steps != sorted(set(steps)):
            raise InputError(f"trainer.batch_size_changes has steps {steps}; steps must be strictly increasing")
        for change in self.batch_size_changes:
            if change.step >= self.num_train_steps:
                raise InputError(
                    f"trainer.batch_size_changes contains step {change.step}, which is never reached: "
                    f"trainer.num_train_steps is {self.num_train_steps}"
                )
            self.at_step(change.step)  # raises if this batch size is invalid

    @property
    def evaluation_interval(self) -> int:
        """Number of steps between evaluations on the validation text."""
        return self._interval(self.evaluate_every)

    @property
    def tasks_interval(self) -> int:
        """Number of steps between evaluations on the tasks."""
        return self._interval(self.tasks_every)

    @property
    def best_metric(self) -> str:
        """The name, in metrics.jsonl, of the loss used to select the best checkpoint."""
        return "validation/loss" if self.best_by is None else f"validation/{self.best_by}/loss"

    @property
    def checkpoint_interval(self) -> int:
        """Number of steps between checkpoints."""
        return self._interval(self.checkpoint_every)

    @property
    def lawa_interval(self) -> int | None:
        """Number of steps between weight snapshots; None if no snapshots are taken."""
        return None if self.lawa_every is None else self._interval(self.lawa_every)

    @property
    def keeps_average(self) -> bool:
        """Whether the run keeps an average of its weights."""
        return self.ema_decay is not None or self.lawa_every is not None

    @property
    def log_interval(self) -> int:
        """Number of steps between progress lines."""
        return self._interval(self.log_every)

    @property
    def statistics_interval(self) -> int | None:
        """Number of steps between array statistics; None if they are disabled."""
        return None if self.statistics_every is None else self._interval(self.statistics_every)

    def statistics_due(self, step: int) -> bool:
        """Return whether array statistics are computed at `step`, counting from 0."""
        return self.statistics_interval is not None and step % self.statistics_interval == 0

    def _interval(self, every: float) -> int:
        return max(1, steps_of(every, self.num_train_steps))

    @property
    def profiled_steps(self) -> range:
        """The steps in `profile_steps`. The range is empty if `profile_steps` is unset, empty or not FIRST:END."""
        first, colon, end = (self.profile_steps or "").partition(":")
        if not (colon and re.fullmatch(r"[0-9]{1,9}", first) and re.fullmatch(r"[0-9]{1,9}", end)):
            return range(0)
        return range(int(first), int(end))

    def at_step(self, step: int) -> TrainerConfig:
        """Return these settings with the batch size in effect at `step` and without batch size changes."""
        if not self.batch_size_changes:
            return self
        sizes = [change.batch_size for change in self.batch_size_changes if change.step <= step]
        return replace(self, batch_size=sizes[-1] if sizes else self.batch_size, batch_size_changes=())

    @property
    def size_changes(self) -> list[tuple[int, int]]:
        """`(step, batch size)` for each batch size change."""
        return [(change.step, change.batch_size) for change in self.batch_size_changes]

    @property
    def parts(self) -> list[TrainerConfig]:
        """One copy of these settings for each batch size, without batch size changes."""
        return [self.at_step(step) for step in (0, *(change.step for change in self.batch_size_changes))]

    @property
    def gradient_microbatch_size(self) -> int:
        """Number of sequences per microbatch."""
        return self.microbatch_size or self.batch_size

    @property
    def num_microbatches(self) -> int:
        """Number of microbatches per step."""
        return self.batch_size // self.gradient_microbatch_size


SMALLEST_TEMPERATURE = 1e-6  # logits divided by a smaller value may not be finite


@dataclass(frozen=True)
class Sampling(Settings):
    """How to sample a token: the temperature is applied first, then `top_k`, then `top_p`."""

    temperature: float = setting(0.8, "sampling temperature; 0 always selects the most likely token", low=0)
    top_k: int | None = setting(None, "sample only from the top_k most likely tokens and any tied with the last", low=1)
    top_p: float | None = setting(
        None, "sample from the smallest set of most likely tokens with at least this total probability", above=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise InputError(f"temperature is {self.temperature}; it must be 0 or at least {SMALLEST_TEMPERATURE}")
