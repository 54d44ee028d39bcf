"""The reports that a run prints when it starts and when it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from statistics import fmean
from typing import TYPE_CHECKING

import jax

from sophia_levanter.config.assembly import describe_transfer
from sophia_levanter.config.groups import check_groups
from sophia_levanter.config.optimizer import OptimizerConfig
from sophia_levanter.config.settings import steps_of
from sophia_levanter.config.trainer import Sampling
from sophia_levanter.data.batches import bigram_bits_per_byte
from sophia_levanter.data.tokenizer import printable
from sophia_levanter.errors import counted
from sophia_levanter.models.language_model import LanguageModel, count_parameters, paths_on_hyperball
from sophia_levanter.models.sampling import generate
from sophia_levanter.tracking.console import show_duration
from sophia_levanter.training.costs import bytes_by_kind, show_bytes

if TYPE_CHECKING:
    from sophia_levanter.config import TrainConfig
    from sophia_levanter.partition.mesh import Partition
    from sophia_levanter.run.run import Run
    from sophia_levanter.training.loop import Loop
    from sophia_levanter.training.step import TrainState

PROMPT_TOKENS = 32


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    Attributes:
        run_dir: the run directory, with `config.yaml` and `metrics.jsonl`.
        step: the number of training steps taken, including steps before the run was resumed.
        metrics: the last value of each metric, keyed by its name in `metrics.jsonl`, such as `train/loss`.
        best_step: the step with the lowest validation loss, measured on the set `trainer.best_by` if specified; None
            before the first evaluation.
        best_validation_loss: the validation loss at `best_step`, in nats per token.
        checkpoint: the path or URL of the last checkpoint.
        stopped_by: the signal that stopped the run before its last step; None if the run completed.
    """

    run_dir: Path
    step: int
    metrics: Mapping[str, float]
    best_step: int | None
    best_validation_loss: float | None
    checkpoint: str
    stopped_by: Signals | None = None

    @property
    def train_loss(self) -> float | None:
        """The mean loss on the last batch, in nats per token."""
        return self.metrics.get("train/loss")

    @property
    def validation_loss(self) -> float | None:
        """The last validation loss in nats per token, averaged over the sets, or None before the first evaluation."""
        return self.metrics.get("validation/loss")


def describe_start(run: Run) -> None:
    """Print a description of the run: its model, data, optimizer, batches, devices and files."""
    config, data, schedule = run.config, run.data, run.config.optimizer
    trainer, model, tracking = config.trainer, config.model, config.tracking
    state = run.partition.abstract(run.initial_state)
    attention = attention_of(config, run.partition)
    estimator, kind = run.settings.optimizer.estimator, schedule.schedule
    swapped = estimator is not None and estimator.forward_mode and attention not in ("blocked", "xla")
    warmup_steps = steps_of(schedule.warmup, trainer.num_train_steps)
    decay = f" to {schedule.last_learning_rate:g}" if kind.decays else ""
    curvature, transfer = schedule.describe_curvature(trainer), describe_transfer(config)
    minutes = trainer.checkpoint_minutes
    changes = "".join(f", batch size {size} from step {step:,}" for step, size in trainer.size_changes)
    trackers = ["metrics.jsonl"]
    trackers += [f"wandb ({tracking.wandb})"] if tracking.wandb else []
    trackers += ["tensorboard"] if tracking.tensorboard else []
    rows = [
        (
            "model",
            f"{model.title}, {count_parameters(state.model):,} parameters, {model.describe()}",
        ),
        ("data", f"{data.train.num_tokens:,} training and {_validation_tokens(run)}"),
        *([("documents", "attention and positions restart at each document")] if config.data.mask_documents else []),
        ("tokenizer", f"{data.tokenizer.name}, {data.tokenizer.vocab_size:,} tokens"),
        ("optimizer", describe_optimizer(schedule, state.model)),
        *(("group", line) for line in describe_groups(schedule, state.model)),
        *([("parametrization", transfer)] if transfer else []),
        (
            "schedule",
            f"{counted(trainer.num_train_steps, 'step')}, learning rate {schedule.learning_rate:g} after "
            f"{counted(warmup_steps, 'warm-up step')}, then {kind.get_choice_name(type(kind))}{decay}",
        ),
        (
            "batch",
            f"{trainer.batch_size} x {model.seq_len} tokens in "
            f"{counted(trainer.num_microbatches, 'microbatch')}{changes}",
        ),
        *([("curvature", curvature)] if curvature else []),
        *(
            [("attention", attention + (", xla in the curvature pass, which needs forward-mode derivatives" * swapped))]
            if attention
            else []
        ),
        ("devices", describe_mesh(run.partition)),
        ("memory", _state_bytes(state)),
        *([("checkpoints", f"every {trainer.checkpoint_interval:,} steps or {minutes:g} min")] if minutes else []),
        ("run directory", str(run.directory.path)),
        ("tracking", ", ".join(trackers)),
    ]
    run.console.rows(rows)


def _validation_tokens(run: Run) -> str:
    """Return text such as `9,000 validation tokens` or, for named sets, `9,000 validation tokens: books 4,000, ...`."""
    sizes = {name: tokens.num_tokens for name, tokens in run.data.validation_sets.items()}
    each = ", ".join(f"{name} {size:,}" for name, size in sizes.items() if name)
    return f"{sum(sizes.values()):,} validation tokens" + (f": {each}" if each else "")


def describe_optimizer(config: OptimizerConfig, model: LanguageModel) -> str:
    """Describe the optimizer and its weight decay in a line such as `adamw, weight decay 0.1; hyperball: ...`."""
    cautious = ", cautious" if config.cautious_weight_decay else ""
    line = f"{config.get_choice_name(type(config))}, weight decay {config.weight_decay:g}{cautious}"
    if not config.hyperball:
        return line
    arrays = counted(len(paths_on_hyperball(model)), "array")
    return f"{line}; hyperball: the matrices in {arrays} keep their norms and do not decay"


def describe_groups(config: OptimizerConfig, model: LanguageModel) -> Iterator[str]:
    """Yield a line for each parameter group, such as `wte|wpe: 2 arrays, learning rate 6e-05, weight decay 0`.

    If some of the group's arrays have fixed norms on a hyperball, the line ends with text such as `weight decay 0.1
    for the 2 arrays not on a sphere`.
    """
    found = check_groups(config.parameter_groups, model)
    kept = paths_on_hyperball(model) if config.hyperball else set()
    for index, group in enumerate(config.parameter_groups):
        paths = {path for path, number in found.items() if number == index}
        arrays = counted(len(paths), "array")
        decay = "" if group.weight_decay is None else f", weight decay {group.weight_decay:g}"
        if group.weight_decay and kept & paths:
            decay += f" for the {counted(len(paths - kept), 'array')} not on a sphere"
        name = group.match if group.role is None else f"role {group.role}"
        yield f"{name}: {arrays}, learning rate {group.learning_rate * config.learning_rate:g}{decay}"


def _state_bytes(state: TrainState) -> str:
    """Describe the memory that the state uses, such as `9.8 MiB of state per device: parameters 3.3 MiB, ...`."""
    kinds = bytes_by_kind(state)
    parts = ", ".join(f"{kind} {show_bytes(size)}" for kind, size in kinds.items() if size >= 1024)
    return f"{show_bytes(sum(kinds.values()))} of state per device: {parts}"


def attention_of(config: TrainConfig, partition: Partition) -> str | None:
    """Return the attention implementation that a run uses, or None if its model has no choice of implementations.

    Raises:
        InputError: if the configured implementation cannot be used on these devices.
    """
    split = partition.mesh.shape["sequence"] > 1
    return config.model.attention_on(
        partition.platform,
        config.trainer.compute_dtype,
        split_positions=split,
        documents=config.data.mask_documents,
    )


def describe_mesh(partition: Partition) -> str:
    """Describe the mesh in text such as `8 TPU v4 devices, data 4 x model 2, embed over data`."""
    mesh = partition.mesh
    return ", ".join([counted(mesh.size, f"{mesh.devices.flat[0].device_kind} device"), *describe_layout(partition)])


def describe_layout(partition: Partition) -> list[str]:
    """Return phrases such as `data 4 x model 2` and `embed over data`, or an empty list for a single device."""
    axes = " x ".join(f"{name} {size}" for name, size in partition.mesh.shape.items() if size > 1)
    parameters = {name: over for name, over in partition.parameters.items() if name != "batch"}
    split = [f"{name} over {' and '.join(over)}" for name, over in parameters.items() if "data" in over]
    return [axes, *split] if axes else []


def describe_end(run: Run, loop: Loop, state: TrainState) -> None:
    """Print the work done, the losses (with a byte-bigram baseline), the last checkpoint and a sample of text."""
    numbers, tokenizer, step = loop.monitor.trackers.last, run.data.tokenizer, int(state.step)
    sets = [batches.token_sequences() for batches in run.validation.values()]
    bigram = fmean(bigram_bits_per_byte(run.data.train, sequences, tokenizer) for sequences in sets)
    skipped, best = int(state.skipped_steps), loop.evaluating.best
    since = f" since step {loop.first_step:,}" if loop.first_step else ""
    rows = [
        (
            "done",
            f"{counted(step, 'step')}, {loop.tokens:,} tokens, {show_duration(loop.seconds)}{since}, "
            f"{loop.tokens_per_second:,.0f} tokens/s, {counted(loop.data_stalls, 'step')} waited for data",
        ),
        (
            "training",
            f"{numbers['train/loss']:.4f} nats per token at the last step, {run.console.smoothed_loss:.4f} smoothed",
        ),
        (
            "validation",
            f"{numbers['validation/loss']:.4f} nats per token, {numbers['validation/bits_per_byte']:.4f} bits per "
            f"byte; a byte-bigram model trained on the same text reaches {bigram:.4f}",
        ),
    ]
    for name in filter(None, run.validation):
        loss, bits = (numbers[f"validation/{name}/{key}"] for key in ("loss", "bits_per_byte"))
        rows.append((f"validation {name}", f"{loss:.4f} nats per token, {bits:.4f} bits per byte"))
    if best is not None:
        metric, best_by = run.config.trainer.best_metric, run.config.trainer.best_by
        of = f" on {best_by}" if best_by else ""
        rows.append(("best validation", f"{best[metric]:.4f} nats per token{of}, after step {best['step']:,}"))
    if "optim/win_rate" in numbers:
        rows.append(("win rate", f"{numbers['optim/win_rate']:.1%} of coordinates took an unclipped step"))
    if skipped:
        rows.append(("skipped", f"{counted(skipped, 'step')}, because of loss spikes or non-finite values"))
    rows.append(("checkpoint", str(loop.saved)))
    run.console.rows(rows, notices=("done", "validation", "checkpoint"))
    if run.config.trainer.sample_tokens:
        run.console.paragraph(f"sample (prompt in brackets):\n{_sample(run, state)}")


def _sample(run: Run, state: TrainState) -> str:
    data, trainer = run.data, run.config.trainer
    prompt = data.validation.read(0, min(PROMPT_TOKENS, data.validation.num_tokens))
    keys = jax.random.key(trainer.seed)[None]
    with run.partition.active():
        model = jax.jit(run.settings.policy.cast_to_compute)(state.model)
        steps = generate(
            model,
            [prompt.tolist()],
            trainer.sample_tokens,
            keys=keys,
            sampling=Sampling(),
            document_end=data.document_end,
        )
        drawn = [token for row in steps for token in row if token is not None]
    return printable(f"[{data.tokenizer.decode(prompt)}]{data.tokenizer.decode(drawn)}")
