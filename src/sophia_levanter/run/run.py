"""A training run from its configuration: build the parts, start or resume, train, and report how it went."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.tree_util import Partial

from sophia_levanter import checkpoint
from sophia_levanter.checkpoint import Restored
from sophia_levanter.checkpoint.storage import step_name
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.build import encode
from sophia_levanter.config.command_line import dump_config
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.run import check_mesh
from sophia_levanter.data.batches import TrainBatches, ValidationBatches, Verification
from sophia_levanter.data.corpora import prepare
from sophia_levanter.data.preparation import cache_directory
from sophia_levanter.data.tokenizer import load_tokenizer, token_byte_lengths
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import LanguageModel, abstract_model
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.partition.messages import PATIENCE, Processes
from sophia_levanter.partition.processes import check_agreement, is_first_process, start_processes, wait_for_all
from sophia_levanter.run.directory import RunDirectory
from sophia_levanter.run.loading import keep_tokenizer, read_initial_weights, with_kept_tokenizer
from sophia_levanter.run.provenance import code_version, fixed_settings, recorded_environment
from sophia_levanter.run.resuming import (
    best_so_far,
    check_not_begun,
    check_resumable,
    restore,
    with_saved_rows,
)
from sophia_levanter.run.summary import attention_of, describe_end, describe_start
from sophia_levanter.tracking.console import Console
from sophia_levanter.tracking.jsonl import JsonLines
from sophia_levanter.tracking.trackers import CLOSE_SECONDS, OptionalTrackers, Trackers, start_optional
from sophia_levanter.training.callbacks import (
    Evaluating,
    Logging,
    Monitor,
    Profiling,
    RegisteredCallback,
    Saving,
    SkippedSteps,
    TrainingFailed,
    build_callbacks,
)
from sophia_levanter.training.checkpoints import RunCheckpoints
from sophia_levanter.training.costs import peak_flops
from sophia_levanter.training.evaluation import Evaluator
from sophia_levanter.training.feed import BatchLoader
from sophia_levanter.training.loop import Loop
from sophia_levanter.training.metrics import check_results
from sophia_levanter.training.step import StepSettings, TrainState, initial_state
from sophia_levanter.training.stopping import StopRequest, Watchdog

# Seconds that optional trackers have to end in when the run was told to stop.
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
def train(config: TrainConfig, directory: RunDirectory, *, quiet: bool = False) -> TrainingResult:
    """Train as configured, in a run directory. The caller restores its handlers of SIGINT and SIGTERM.

    Args:
        config: the resolved configuration.
        directory: where the run's files go, and whether the run resumes from them.
        quiet: whether to print only warnings and the result.

    Raises:
        InputError: if the parts do not fit each other or the data; the run directory is untouched then.
        TrainingFailed: if the numbers go bad.
        CheckpointError: if all checkpoints of the run are damaged.
    """
    start_processes(config.mesh)
    console = Console(config.trainer.log_every, quiet=quiet, silent=not is_first_process())
    check_agreement("the configuration", _shared_config(config))
    enable_compilation_cache(Path(config.data.cache_dir).expanduser().absolute() / "compiled", jax.default_backend())
    run = Run(config, directory, console)
    state = run.resume() if run.resumes else run.start()
    if int(state.step) < run.config.trainer.num_train_steps:
        run.claim_directory()
        describe_start(run)
        state = run.train(state)
    return run.finish(state)


class Run:
    """A training run: what it is made of, and its life from start to finish.

    Building it prepares the text and writes nothing to the run directory. Of several processes each builds one.

    Args:
        config: the resolved configuration.
        directory: where the run's files go, and whether the run resumes from them.
        console: receives lines for people.

    Attributes:
        config: with what checkpoints or initial weights add to it.
        directory: as given.
        console: as given.
        processes: those of the run.
        resumes: whether there are checkpoints, from which the run goes on.
        initial_weights: to start from, in this host's memory; None if they are drawn, and after the start.
        partition: the devices.
        settings: what stays the same over all steps.
        callbacks: the registered ones, by name.
        data: the tokenizer, and the training and validation corpus.
        batches: of the training corpus.
        validation: the windows of the validation corpus.
        verification: compares the prepared text with its digests while the run trains.
        facts: what besides the configuration decides the numbers; saved with each checkpoint.
        restored: the checkpoint that the run went on from last, if any.
        loop: the last loop of steps; None before the first.

    Raises:
        InputError: if the parts do not fit each other or the data.
    """

    def __init__(self, config: TrainConfig, directory: RunDirectory, console: Console) -> None:
        self.directory, self.console = directory, console
        self.processes = Processes.of_this_run()
        self.restored: Restored[TrainState] | None = None
        self.loop: Loop | None = None
        self.resumes = self._find_checkpoints()
        text = config.data
        self.initial_weights: LanguageModel | None = None
        if self.resumes:
            text = with_kept_tokenizer(text, directory.checkpoints, going_on=True)
            config = with_saved_rows(config, directory)
        else:
            # Before the text is prepared, which may take hours.
            self.initial_weights = read_initial_weights(replace(config, data=text), console)
        if self.initial_weights is not None:
            config = replace(config, model=self.initial_weights.config)
        trainer, seq_len = config.trainer, config.model.seq_len
        self.config = config
        self.partition = partition_of(config.mesh)
        mesh = self.partition.mesh
        check_mesh(config, mesh.size)
        attention_of(config, self.partition)
        self.callbacks, self.settings = build_callbacks(config), StepSettings.of(config)
        if trainer.metrics:
            vocab_size = load_tokenizer(text.tokenizer).vocab_size
            with self.partition.active():
                state = self.partition.abstract(initial_state(config.model, self.settings, vocab_size))
                check_results(self.settings.metrics, state)
        self.data = prepare(text, console.line, warn=console.notice)
        check_mesh(config, mesh.size, self.data.tokenizer.vocab_size)
        corpora = [self.data.train, self.data.validation]
        for corpus in corpora:
            corpus.read(0, 1)  # of one that is kept in memory all is read here, before the run has a directory
        self.batches = TrainBatches(
            self.data.train,
            seq_len=seq_len,
            batch_size=trainer.batch_size,
            seed=trainer.seed,
            changes=trainer.size_changes,
        )
        self.validation = ValidationBatches(
            self.data.validation,
            seq_len=seq_len,
            batch_size=trainer.microbatch_size or trainer.batch_size,
            max_windows=trainer.evaluation_windows,
        )
        self.verification = Verification(corpora, cache_directory(config.data), self.processes)
        devices = {"device": mesh.devices.flat[0].device_kind, "device_count": mesh.size}
        self.facts: dict[str, Any] = {
            "environment": {**recorded_environment(), **devices},
            "data": self.data.train.facts,
            "validation": self.data.validation.facts,
            "code": code_version(),
        }
        check_agreement("the text", json.dumps([self.facts["data"], self.facts["validation"]]))

    @property
    def initial_state(self) -> Callable[[], TrainState]:
        """Makes the state before step 0 from the configuration alone: weights are drawn, not read."""
        return initial_state(self.config.model, self.settings, self.data.tokenizer.vocab_size)

    def start(self) -> TrainState:
        """The state before step 0 on the devices, with the initial weights if the configuration names some."""
        if self.initial_weights is None:
            return self.partition.init_sharded(self.initial_state)
        start = Partial(TrainState.init, optimizer=self.settings.optimizer, policy=self.settings.policy)
        weights, self.initial_weights = self.partition.place(self.initial_weights), None  # the host's memory is freed
        return self.partition.init_sharded(start, weights)

    def resume(self) -> TrainState:
        """The state of the newest checkpoint that is whole; reports what has changed since it was saved.

        Raises:
            CheckpointError: if none is whole.
            InputError: if it is of another model, optimizer or text.
        """
        self.restored = restore(self)
        check_resumable(self, self.restored)
        return self.restored.tree

    def claim_directory(self) -> None:
        """Lock the run directory and write what a run begins with.

        Raises:
            InputError: if another process uses it, or it cannot be written.
        """
        # Every process has read what is there before the first one writes.
        wait_for_all("restored")
        # Of all the ids only the first process's is saved.
        self._run_id = uuid.uuid4().hex if self.restored is None else self.restored.run_id
        self._on_process_zero("directory", self._write_directory)

    def train(self, state: TrainState) -> TrainState:
        """Train to the last step or until a signal, and return the last state, which is saved.

        After steps that went wrong the run rolls back to a checkpoint, `trainer.max_rollbacks` times.

        Raises:
            TrainingFailed: if the numbers go bad.
        """
        self._trackers = self._start_trackers(int(state.step))
        self._stop = StopRequest(several=jax.process_count() > 1)
        try:
            for left in range(self.config.trainer.max_rollbacks, -1, -1):
                skipped_windows = int(state.skipped_windows)
                self.loop = self._build_loop(state)
                try:
                    return self.loop.run(state, self._stop)
                except TrainingFailed as error:
                    if not left:
                        raise
                    self.console.notice(f"WARNING: {error}")
                    if not self.roll_back(error.steps, skipped_windows):
                        raise
                    assert self.restored is not None
                    state = self.restored.tree
            raise AssertionError("the last loop returns or raises")
        except Exception:
            self._trackers.close(failed=True)
            raise

    def roll_back(self, wrong: range, skipped_windows: int) -> bool:
        """Restore the last checkpoint from before steps that went wrong, to go on with the data that come after theirs.

        Later checkpoints are removed: a restart would begin with them.

        Args:
            wrong: those steps.
            skipped_windows: of the order of the data, that the run had passed over before.

        Returns:
            Whether there is a checkpoint from before those steps.

        Raises:
            CheckpointError: if none of them is whole.
        """
        directory = self.directory.checkpoints
        saved = checkpoint.steps(directory)
        later = [step for step in saved if step > wrong.start]
        wait_for_all("all have looked")
        if len(later) == len(saved):
            self.console.line("there is no checkpoint from before those steps to go back to")
            return False
        if self.processes.is_first:
            for step in later:
                checkpoint.remove(directory, step)
        wait_for_all("later ones are removed")
        restored = restore(self)
        passed = self.batches.windows_between(restored.step, wrong.stop)
        self.console.line(
            f"going back to step {restored.step}, and on with the data after the {passed} windows since then"
        )
        windows = self.partition.place(np.asarray(skipped_windows + passed, np.int32))
        tree = eqx.tree_at(lambda state: state.skipped_windows, restored.tree, windows)
        self.restored = replace(restored, tree=tree)
        return True

    def finish(self, state: TrainState) -> TrainingResult:
        """Report how the run went, and end its trackers."""
        step, total = int(state.step), self.config.trainer.num_train_steps
        if self.loop is None:
            assert self.restored is not None
            self.console.notice(
                f"all {step} steps are done; --trainer.num_train_steps with more of them extends the run"
            )
            metrics: Any = self.restored.metadata["metrics"]
            saved = f"{self.directory.checkpoints}/{step_name(self.restored.step)}"
            return self._result(step, metrics, best_so_far(self, self.restored), saved)
        stopped_by = None
        try:
            if step < total:
                # Of several processes one may have been signalled, and all have stopped.
                stopped_by = self._stop.signal or Signals.SIGTERM
                self.console.notice(
                    f"{stopped_by.name}: stopped after step {step}, which is saved; "
                    f"--resume {self.directory.path} goes on"
                )
            else:
                describe_end(self, self.loop, state)
        except Exception:
            self._trackers.close(failed=True)
            raise
        # What stops a run may soon kill it.
        self._trackers.close(failed=stopped_by is not None, seconds=STOPPED_SECONDS if stopped_by else CLOSE_SECONDS)
        metrics, best = self.loop.monitor.trackers.last, self.loop.evaluating.best
        return self._result(step, metrics, best, str(self.loop.saved), stopped_by)

    def _result(
        self,
        step: int,
        metrics: Mapping[str, float],
        best: Mapping[str, Any] | None,
        saved: str,
        stopped_by: Signals | None = None,
    ) -> TrainingResult:
        best_step, best_loss = (None, None) if best is None else (best["step"], best["validation/loss"])
        return TrainingResult(self.directory.path, step, dict(metrics), best_step, best_loss, saved, stopped_by)

    def _find_checkpoints(self) -> bool:
        """Whether there are checkpoints to resume from, which must fit `directory.resume`."""
        directory = self.directory
        if directory.resume != "never":
            self._on_process_zero("lock", directory.lock)
        # The first process looks: disks that hosts share do not always show all of them the same.
        found = str(bool(checkpoint.steps(directory.checkpoints)))
        is_saved = self.processes.broadcast("saved", found, PATIENCE) == "True"
        if directory.resume == "never" and is_saved:
            raise InputError(
                f"trainer.checkpoint_dir {directory.checkpoints} holds checkpoints already; --resume auto continues "
                "the run that they are of, another --trainer.checkpoint_dir starts one"
            )
        if directory.resume == "always" and not is_saved:
            raise InputError(
                f"--resume {directory.path}: {directory.checkpoints} holds no checkpoint to go on from; "
                f"start the run with --config FILE --trainer.run_dir {directory.path} --resume auto"
            )
        if directory.resume == "if_saved" and not is_saved:
            self._on_process_zero("begin", lambda: check_not_begun(directory, self.console))
        return is_saved

    def _on_process_zero(self, name: str, work: Callable[[], None]) -> None:
        """Have the first process do some work; an `InputError` of it is raised in all of them."""
        raised = None
        if self.processes.is_first:
            try:
                work()
            except InputError as error:
                raised = error
        if failure := self.processes.first_failure(name, str(raised) if raised else None, PATIENCE):
            raise raised or InputError(failure)

    def _write_directory(self) -> None:
        directory = self.directory
        if self.config.trainer.checkpoint_dir is not None:
            checkpoint.check_writable(self.config.trainer.checkpoint_dir)
        directory.lock()
        directory.write_config(self.config)
        directory.make_checkpoints()
        keep_tokenizer(directory.checkpoints, self.data.tokenizer, is_saved=self.resumes)
        directory.write_run_id(self._run_id)
        checkpoint.remove_leftovers(directory.checkpoints)

    def _start_trackers(self, step: int) -> OptionalTrackers:
        """The optional trackers, which take the numbers from a step on; none in any process but the first."""
        if not self.processes.is_first:
            return OptionalTrackers()
        return start_optional(
            self.config.tracking,
            self.directory.path,
            run_id=self._run_id,
            first_step=step,
            facts={**encode(self.config), "code": self.facts["code"]},
            max_grad_norm=self.config.trainer.max_grad_norm,
            console=self.console,
        )

    def _build_loop(self, state: TrainState) -> Loop:
        """The loop of steps from a state on."""
        trainer = self.config.trainer
        step = int(state.step)
        best = None if self.restored is None else best_so_far(self, self.restored)
        flops = abstract_model(self.config.model, self.data.tokenizer.vocab_size).flops_per_token
        lines = JsonLines(self.directory.metrics_file, first_step=step) if self.processes.is_first else None
        monitor = Monitor(Trackers(lines, self._trackers), self.console, Watchdog(trainer.step_timeout))
        checkpoints = RunCheckpoints(
            self.directory.checkpoints,
            self.config,
            self.facts,
            run_id=self._run_id,
            processes=self.processes,
            best=best,
            saved_step=None if self.restored is None else self.restored.step,
        )
        saving = Saving(trainer, monitor, checkpoints, self.verification)
        evaluator = Evaluator(
            self.validation, token_byte_lengths(self.data.tokenizer), self.partition, self.settings.policy
        )
        registered = [RegisteredCallback(name, callback, monitor) for name, callback in self.callbacks.items()]
        evaluating = Evaluating(trainer, monitor, evaluator, registered, best)
        profiling = Profiling(trainer.profiled_steps, self.directory.profile, self.console)
        return Loop(
            config=trainer,
            settings_of=partial(StepSettings.of, self.config),
            partition=self.partition,
            loader=BatchLoader(self.batches, self.partition, trainer, int(state.skipped_windows)),
            monitor=monitor,
            callbacks=[profiling, Logging(monitor), SkippedSteps(trainer, monitor), evaluating, *registered, saving],
            evaluating=evaluating,
            saving=saving,
            tokens_per_window=self.config.model.seq_len,
            mfu_per_token_rate=flops / peak_flops(list(self.partition.mesh.devices.flat)),
        )


def _shared_config(config: TrainConfig) -> str:
    """What all processes of a run must agree on, as text; each may have its own copy of the data."""
    mesh = config.mesh if config.mesh.process_id is None else replace(config.mesh, process_id=0)
    trainer = config.trainer
    if trainer.checkpoint_dir is not None:
        trainer = replace(trainer, run_dir="each its own")
    return dump_config(replace(config, mesh=mesh, data=DataConfig(), trainer=trainer))


def enable_compilation_cache(directory: Path, platform: str) -> None:
    """Have jax keep compiled programs, unless JAX_COMPILATION_CACHE_DIR has named a place for them already.

    Not on CPUs, where jaxlib may refuse to read a program that it has written, with some lines of complaint each time
    (https://github.com/jax-ml/jax/issues/38445).
    """
    if platform != "cpu" and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
