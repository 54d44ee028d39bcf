"""A training run from its configuration: build the parts, start or restore, train, and say how it went."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import jax

from sophia_levanter import checkpoint
from sophia_levanter.checkpoint import Restored
from sophia_levanter.checkpoint.storage import step_name
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.build import encode
from sophia_levanter.config.command_line import dump_config
from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.tokenizer import token_byte_lengths
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.partition.messages import PATIENCE, Processes
from sophia_levanter.partition.processes import (
    check_agreement,
    is_first_process,
    start_processes,
    wait_for_all,
)
from sophia_levanter.tracking.background import CLOSE_SECONDS
from sophia_levanter.tracking.console import Console
from sophia_levanter.tracking.jsonl import JsonLines
from sophia_levanter.tracking.trackers import Others, Trackers, start_others
from sophia_levanter.training.callbacks import (
    Evaluating,
    Logging,
    Monitor,
    RegisteredCallback,
    Saving,
    SkippedSteps,
    TrainingFailed,
)
from sophia_levanter.training.checkpoints import RunCheckpoints
from sophia_levanter.training.environment import fixed_settings, recorded_environment
from sophia_levanter.training.evaluation import Evaluator
from sophia_levanter.training.initial_weights import read_initial_weights
from sophia_levanter.training.loading import BatchLoader
from sophia_levanter.training.loop import Loop
from sophia_levanter.training.parts import Parts, build_parts
from sophia_levanter.training.profile import Profiling
from sophia_levanter.training.resuming import best_so_far, check_not_begun, go_back, resume, with_saved_rows
from sophia_levanter.training.run_directory import RunDirectory
from sophia_levanter.training.run_tokenizer import keep_tokenizer, with_kept_tokenizer
from sophia_levanter.training.step import StepSettings, TrainState
from sophia_levanter.training.stopping import StopRequest
from sophia_levanter.training.summary import describe_end, describe_start
from sophia_levanter.training.throughput import peak_flops
from sophia_levanter.training.watchdog import Watchdog

# For trackers to end in where the run was told to stop.
STOPPED_SECONDS = 10.0


@dataclass(frozen=True)
class TrainingResult:
    """How a run went.

    Attributes:
        run_dir: the run directory, with `config.yaml` and `metrics.jsonl`.
        step: training steps done, those before a resume included.
        metrics: the last value of each metric by its name in `metrics.jsonl`, such as `train/loss`.
        best_step: the step of the lowest validation loss; None before the first evaluation.
        best_validation_loss: that loss, in nats per token.
        checkpoint: the path or URL of the last checkpoint.
        stopped_by: the signal that ended the run before its last step; None where it ran to the end.
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
        """The mean loss of the last step's batch, in nats per token."""
        return self.metrics.get("train/loss")

    @property
    def validation_loss(self) -> float | None:
        """The last validation loss, in nats per token; None before the first evaluation."""
        return self.metrics.get("validation/loss")


@fixed_settings()
def run(config: TrainConfig, directory: RunDirectory, *, quiet: bool = False) -> TrainingResult:
    """Train as configured, in a run directory. The caller puts back its handlers of SIGINT and SIGTERM.

    Args:
        config: the resolved configuration.
        directory: where the run's files go, and whether it goes on from them.
        quiet: whether to print only warnings and the result.

    Raises:
        InputError: if the parts do not fit each other or the data; the run directory is untouched then.
        TrainingFailed: if the numbers go bad.
        CheckpointError: if all checkpoints of the run are damaged.
    """
    start_processes(config.mesh)
    console = Console(config.trainer.log_every, quiet=quiet, silent=not is_first_process())
    check_agreement("the configuration", _shared_config(config))
    keep_compiled(Path(config.data.cache_dir).expanduser().absolute() / "compiled", jax.default_backend())
    processes = Processes.of_this_run()
    if directory.resume != "never":
        _by_first(processes, "lock", directory.lock)
    # The first process looks: disks that hosts share do not always show all of them the same.
    is_saved = processes.broadcast("saved", str(bool(checkpoint.steps(directory.checkpoints))), PATIENCE) == "True"
    if directory.resume == "never" and is_saved:
        raise InputError(
            f"trainer.checkpoint_dir {directory.checkpoints} holds checkpoints already; --resume auto continues the "
            "run that they are of, another --trainer.checkpoint_dir starts one"
        )
    if directory.resume == "always" and not is_saved:
        raise InputError(
            f"--resume {directory.path}: {directory.checkpoints} holds no checkpoint to go on from; "
            f"start the run with --config FILE --trainer.run_dir {directory.path} --resume auto"
        )
    if directory.resume == "if_saved" and not is_saved:
        _by_first(processes, "begin", lambda: check_not_begun(directory, console))
    text = config.data
    if is_saved:
        text = with_kept_tokenizer(text, directory.checkpoints, going_on=True)
        config = with_saved_rows(config, directory)
    # Before the text is prepared, which may take hours.
    weights = None if is_saved else read_initial_weights(replace(config, data=text), console)
    if weights is not None:
        config = replace(config, model=weights.config)
    parts = build_parts(config, recorded_environment(), console, text)
    check_agreement("the text", json.dumps([parts.facts["data"], parts.facts["validation"]]))
    restored = None
    if is_saved:
        restored = resume(parts, directory, console)
        state = restored.tree
        if int(state.step) >= config.trainer.num_train_steps:
            console.notice(
                f"all {int(state.step)} steps are done; --trainer.num_train_steps with more of them extends the run"
            )
            metrics: Any = restored.metadata["metrics"]
            checkpoint_path = f"{directory.checkpoints}/{step_name(restored.step)}"
            return _result(directory, restored.step, metrics, best_so_far(parts, restored), checkpoint_path)
    elif weights is None:
        state = parts.partition.made(parts.initial_state)
    else:
        state = parts.state_from(weights)
        del weights
    # Every process has read what is there before the first one writes.
    wait_for_all("restored")

    # Of all the ids only the first process's is saved.
    run_id = uuid.uuid4().hex if restored is None else restored.run_id

    def take_directory() -> None:
        if config.trainer.checkpoint_dir is not None:
            checkpoint.check_writable(config.trainer.checkpoint_dir)
        directory.lock()
        directory.write_config(config)
        directory.make_checkpoints()
        keep_tokenizer(directory.checkpoints, parts.data.tokenizer, is_saved=is_saved)
        directory.write_run_id(run_id)
        checkpoint.remove_leftovers(directory.checkpoints)

    _by_first(processes, "directory", take_directory)
    describe_start(parts, directory.path, console)
    others = _start_others(parts, directory, run_id, int(state.step), console)
    try:
        stop = StopRequest(several=jax.process_count() > 1)
        loop, state = _train(parts, directory, run_id, state, restored, console, others, stop)
        stopped_by = _tell_the_end(parts, directory, loop, state, stop, console)
    except Exception:
        others.close(failed=True)
        raise
    # What stops a run may soon kill it.
    others.close(failed=stopped_by is not None, seconds=STOPPED_SECONDS if stopped_by else CLOSE_SECONDS)
    metrics, best = loop.monitor.trackers.last, loop.evaluating.best
    return _result(directory, int(state.step), metrics, best, str(loop.saved), stopped_by)


def _result(
    directory: RunDirectory,
    step: int,
    metrics: Mapping[str, float],
    best: Mapping[str, Any] | None,
    checkpoint: str,
    stopped_by: Signals | None = None,
) -> TrainingResult:
    best_step, best_loss = (None, None) if best is None else (best["step"], best["validation/loss"])
    return TrainingResult(directory.path, step, dict(metrics), best_step, best_loss, checkpoint, stopped_by)


def _tell_the_end(
    parts: Parts, directory: RunDirectory, loop: Loop, state: TrainState, stop: StopRequest, console: Console
) -> Signals | None:
    """Say how the run went; the signal that ended it before its last step, if any."""
    if int(state.step) < parts.config.trainer.num_train_steps:
        # Of several processes one may have been signalled, and all have stopped.
        signal = stop.signal or Signals.SIGTERM
        console.notice(
            f"{signal.name}: stopped after step {int(state.step)}, which is saved; --resume {directory.path} goes on"
        )
        return signal
    describe_end(parts, loop, state, console)
    return None


def _by_first(processes: Processes, name: str, work: Callable[[], None]) -> None:
    """Have the first process do some work; what input it finds fault with is an error in all of them.

    Raises:
        InputError: as the work does.
    """
    failure = None
    if processes.is_first:
        try:
            work()
        except InputError as error:
            failure = str(error)
    if failure := processes.first_failure(name, failure, PATIENCE):
        raise InputError(failure)


def _shared_config(config: TrainConfig) -> str:
    """What all processes of a run must agree on, as text; each may have its own copy of the data."""
    mesh = config.mesh if config.mesh.process_id is None else replace(config.mesh, process_id=0)
    trainer = config.trainer
    if trainer.checkpoint_dir is not None:
        trainer = replace(trainer, run_dir="each its own")
    return dump_config(replace(config, mesh=mesh, data=DataConfig(), trainer=trainer))


def keep_compiled(directory: Path, platform: str) -> None:
    """Have jax keep compiled programs, unless JAX_COMPILATION_CACHE_DIR has named a place for them already.

    Not on CPUs, where jaxlib may refuse to read a program that it has written, with some lines of complaint each time
    (https://github.com/jax-ml/jax/issues/38445).
    """
    if platform != "cpu" and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))


def _train(
    parts: Parts,
    directory: RunDirectory,
    run_id: str,
    state: TrainState,
    restored: Restored[TrainState] | None,
    console: Console,
    others: Others,
    stop: StopRequest,
) -> tuple[Loop, TrainState]:
    """The loop that came to an end, and the last state; before it, loops that went wrong and back to a checkpoint."""
    for left in range(parts.config.trainer.max_rollbacks, -1, -1):
        skipped_windows = int(state.skipped_windows)
        loop = _make_loop(parts, directory, run_id, state, restored, console, others)
        try:
            return loop, loop.run(state, stop)
        except TrainingFailed as error:
            if not left:
                raise
            console.notice(f"WARNING: {error}")
            restored = go_back(parts, directory, console, error.steps, skipped_windows)
            if restored is None:
                raise
            state = restored.tree
    raise AssertionError("the last loop returns or raises")


def _make_loop(
    parts: Parts,
    directory: RunDirectory,
    run_id: str,
    state: TrainState,
    restored: Restored[TrainState] | None,
    console: Console,
    others: Others,
) -> Loop:
    trainer = parts.config.trainer
    step = int(state.step)
    best = None if restored is None else best_so_far(parts, restored)
    flops = abstract_model(parts.config.model, parts.data.tokenizer.vocab_size).flops_per_token
    lines = JsonLines(directory.metrics_file, first_step=step) if parts.processes.is_first else None
    monitor = Monitor(Trackers(lines, others), console, Watchdog(trainer.step_timeout))
    checkpoints = RunCheckpoints(
        directory.checkpoints,
        parts.config,
        parts.facts,
        run_id=run_id,
        processes=parts.processes,
        best=best,
        saved_step=None if restored is None else restored.step,
    )
    saving = Saving(trainer, monitor, checkpoints, parts.verification)
    evaluator = Evaluator(
        parts.validation, token_byte_lengths(parts.data.tokenizer), parts.partition, parts.settings.policy
    )
    registered = [RegisteredCallback(name, callback, monitor) for name, callback in parts.callbacks.items()]
    evaluating = Evaluating(trainer, monitor, evaluator, registered, best)
    profiling = Profiling(trainer.profiled_steps, directory.profile, console)
    own = [profiling, Logging(monitor), SkippedSteps(trainer, monitor)]
    return Loop(
        config=trainer,
        settings_of=partial(StepSettings.of, parts.config),
        partition=parts.partition,
        loader=BatchLoader(parts.batches, parts.partition, trainer, int(state.skipped_windows)),
        monitor=monitor,
        callbacks=[*own, evaluating, *registered, saving],
        evaluating=evaluating,
        saving=saving,
        tokens_per_window=parts.config.model.seq_len,
        mfu_per_token_rate=flops / peak_flops(list(parts.partition.mesh.devices.flat)),
    )


def _start_others(parts: Parts, directory: RunDirectory, run_id: str, step: int, console: Console) -> Others:
    """The trackers that take the numbers from a step on; none in any process but the first."""
    if not parts.processes.is_first:
        return Others()
    return start_others(
        parts.config.tracking,
        directory.path,
        run_id=run_id,
        first_step=step,
        facts={**encode(parts.config), "code": parts.facts["code"]},
        max_grad_norm=parts.config.trainer.max_grad_norm,
        console=console,
    )
