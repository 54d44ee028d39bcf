"""A training run: build its components from a configuration, start or resume, train, and report the result."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import jax
from jax.tree_util import Partial

from sophia_levanter import checkpoint
from sophia_levanter.checkpoint import Restored
from sophia_levanter.checkpoint.storage import step_name
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.assembly import check_optimizer
from sophia_levanter.config.build import encode
from sophia_levanter.config.run import check_mesh
from sophia_levanter.data.batches import TrainBatches, ValidationBatches, Verification
from sophia_levanter.data.corpora import prepare
from sophia_levanter.data.preparation import cache_directory
from sophia_levanter.data.tokenizer import load_tokenizer, token_byte_lengths
from sophia_levanter.models.language_model import LanguageModel, abstract_model
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.partition.processes import (
    Processes,
    all_devices,
    check_agreement,
    start_processes,
    wait_for_all,
)
from sophia_levanter.run.directory import RunDirectory
from sophia_levanter.run.loading import keep_tokenizer, read_initial_weights, with_kept_tokenizer
from sophia_levanter.run.provenance import (
    code_version,
    enable_compilation_cache,
    fixed_settings,
    recorded_environment,
    shared_config,
)
from sophia_levanter.run.resuming import (
    best_so_far,
    check_resumable,
    find_checkpoints,
    restore,
    restore_before,
    tokens_so_far,
    with_saved_rows,
)
from sophia_levanter.run.summary import TrainingResult, attention_of, describe_end, describe_start
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
from sophia_levanter.training.checkpoints import CheckpointTimer, RunCheckpoints
from sophia_levanter.training.costs import peak_flops
from sophia_levanter.training.evaluation import Evaluator, evaluate_sets
from sophia_levanter.training.loop import BatchLoader, Loop
from sophia_levanter.training.metrics import check_results
from sophia_levanter.training.step import StepSettings, TrainState, first_state, initial_state
from sophia_levanter.training.stopping import StopRequest, Watchdog
from sophia_levanter.training.tasks import Scoring, TaskScorer, read_tasks, rows_of

# Time limit, in seconds, for optional trackers to finish after a signal has stopped the run.
STOPPED_SECONDS = 10.0


@fixed_settings()
def train(config: TrainConfig, directory: RunDirectory, *, quiet: bool = False) -> TrainingResult:
    """Train as configured, in a run directory. The caller must restore its own SIGINT and SIGTERM handlers.

    Args:
        config: the resolved configuration.
        directory: the run directory, which also specifies whether the run resumes.
        quiet: whether to print only warnings and the result.

    Raises:
        InputError: if settings are incompatible with each other or with the data. The run directory is left unchanged.
        TrainingFailed: if too many consecutive steps are skipped.
        CheckpointError: if all of the run's checkpoints are damaged.
    """
    start_processes(config.mesh)
    all_devices()  # raises an error that users understand if jax cannot start
    console = Console(config.trainer.log_interval, quiet=quiet, silent=jax.process_index() != 0)
    check_agreement("the configuration", shared_config(config))
    enable_compilation_cache(Path(config.data.cache_dir).expanduser().absolute() / "compiled", jax.default_backend())
    run = Run(config, directory, console)
    state = run.resume() if run.resumes else run.start()
    if int(state.step) < run.config.trainer.num_train_steps:
        run.claim_directory()
        describe_start(run)
        state = run.train(state)
    return run.finish(state)


class Run:
    """A training run and its components, from start to finish.

    The constructor prepares the data but does not write to the run directory. Each process constructs its own `Run`.

    Args:
        config: the resolved configuration.
        directory: the run directory, which also specifies whether the run resumes.
        console: prints messages for the user.

    Attributes:
        config: the configuration, with missing values filled in from checkpoints or initial weights.
        directory, console: the constructor's arguments.
        processes: the run's processes.
        resumes: whether the run continues from checkpoints.
        initial_weights: the initial weights in host memory; None if they are random or have been moved to the devices.
        partition: the devices, and how arrays are sharded over them.
        settings: the settings shared by all steps.
        callbacks: the registered callbacks, keyed by name.
        data: the tokenizer, the training corpus and the validation sets.
        batches: the batches of the training corpus.
        validation: the batches of each validation set, keyed by the set's name.
        tasks: the items of each task to score, keyed by the task's name.
        verification: checks the prepared text against its digests during training.
        provenance: everything besides the configuration that determines the results; saved with each checkpoint.
        restored: the checkpoint from which the run last resumed, or None.
        loop: the latest training loop; None before training.

    Raises:
        InputError: if settings are incompatible with each other or with the data.
    """

    def __init__(self, config: TrainConfig, directory: RunDirectory, console: Console) -> None:
        self.directory, self.console = directory, console
        self.processes = Processes.of_this_run()
        self.restored: Restored[TrainState] | None = None
        self.loop: Loop | None = None
        self._run_id = uuid.uuid4().hex  # only the first process's id is saved
        self._trackers = OptionalTrackers()
        self._signal: Signals | None = None  # the signal that stopped this process
        self.resumes = find_checkpoints(directory, self.processes, console)
        text = config.data
        self.initial_weights: LanguageModel | None = None
        if self.resumes:
            text = with_kept_tokenizer(text, directory.checkpoints, resuming=True)
            config = with_saved_rows(config, directory)
        else:
            # Read the weights first, because preparing the data may take hours.
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
        self.tasks = read_tasks(trainer.tasks)
        if trainer.metrics:
            vocab_size = load_tokenizer(text.tokenizer).vocab_size
            with self.partition.active():
                state = self.partition.abstract(initial_state(config.model, self.settings, vocab_size))
                check_results(self.settings.metrics, state)
        self.data = prepare(text, console.line, warn=console.notice)
        check_mesh(config, mesh.size, self.data.tokenizer.vocab_size)
        for items in self.tasks.values():
            rows_of(items, self.data.tokenizer, seq_len)  # raises an error if they do not fit
        corpora = [self.data.train, *self.data.validation_sets.values()]
        for corpus in corpora:
            corpus.read(0, 1)  # loads in-memory corpora completely, before the run directory exists
        check_optimizer(config.optimizer, config.model, self.data.tokenizer.vocab_size, resumes=bool(self.resumes))
        self.batches = TrainBatches(
            self.data.train,
            seq_len=seq_len,
            batch_size=trainer.batch_size,
            seed=trainer.seed,
            changes=trainer.size_changes,
        )
        self.validation = {
            name: ValidationBatches(
                tokens,
                seq_len=seq_len,
                batch_size=trainer.gradient_microbatch_size,
                max_sequences=trainer.evaluation_windows,
                name=name,
            )
            for name, tokens in self.data.validation_sets.items()
        }
        self.verification = Verification(corpora, cache_directory(config.data), self.processes)
        devices = {"device": mesh.devices.flat[0].device_kind, "device_count": mesh.size}
        self.provenance: dict[str, Any] = {
            "environment": {**recorded_environment(), **devices},
            "data": self.data.train.facts,
            "validation": self.data.validation_facts,
            "code": code_version(),
        }
        check_agreement("the text", json.dumps([self.provenance["data"], self.provenance["validation"]]))

    @property
    def initial_state(self) -> Callable[[], TrainState]:
        """A function that builds the state before step 0, with random weights, from the configuration alone."""
        return initial_state(self.config.model, self.settings, self.data.tokenizer.vocab_size)

    def start(self) -> TrainState:
        """Build the state before step 0 on the devices, using the configured initial weights if there are any."""
        if self.initial_weights is None:
            return self.partition.init_sharded(self.initial_state)
        weights, self.initial_weights = self.partition.place(self.initial_weights), None  # frees host memory
        return self.partition.init_sharded(Partial(first_state, self.settings), weights)

    def resume(self) -> TrainState:
        """Return the state of the newest intact checkpoint, and report what has changed since it was saved.

        Raises:
            CheckpointError: if no checkpoint is intact.
            InputError: if the checkpoint belongs to a different run or does not match the model, optimizer or text.
        """
        self.restored = restore(self)
        check_resumable(self, self.restored)
        self._run_id = self.restored.run_id
        return self.restored.tree

    def claim_directory(self) -> None:
        """Lock the run directory and write the run's first files.

        Raises:
            InputError: if the directory is in use by another process or cannot be written to.
        """
        # Every process must have read the directory before the first process writes to it.
        wait_for_all("restored")
        self.processes.on_process_zero("directory", self._write_directory)

    def train(self, state: TrainState) -> TrainState:
        """Train until the last step or until a signal arrives. Return the final state, which has been saved.

        If too many consecutive steps are skipped, the run rolls back to a checkpoint, at most `trainer.max_rollbacks`
        times.

        Raises:
            TrainingFailed: if too many steps are skipped and the run cannot roll back again.
        """
        self._trackers = self._start_trackers(int(state.step))
        stop = StopRequest(several=jax.process_count() > 1)
        try:
            for left in range(self.config.trainer.max_rollbacks, -1, -1):
                skipped_windows = int(state.skipped_windows)
                self.loop = self._build_loop(state)
                try:
                    return self.loop.run(state, stop)
                except TrainingFailed as error:
                    if not left:
                        raise
                    self.console.notice(f"WARNING: {error}")
                    if not self.roll_back(error.steps, skipped_windows):
                        raise
                    assert self.restored is not None
                    state = self.restored.tree
            raise AssertionError("unreachable: the last loop returns or raises")
        except Exception:
            self._trackers.close(failed=True)
            raise
        finally:
            stop.silence()
            self._signal = stop.signal

    def roll_back(self, wrong: range, skipped_windows: int) -> bool:
        """Restore the last checkpoint saved before the failed steps. See `restore_before`.

        Returns:
            Whether such a checkpoint exists.

        Raises:
            CheckpointError: if no such checkpoint is intact.
        """
        restored = restore_before(self, wrong, skipped_windows)
        if restored is not None:
            self.restored = restored
        return restored is not None

    def finish(self, state: TrainState) -> TrainingResult:
        """Report the run's result and close its trackers."""
        step, total = int(state.step), self.config.trainer.num_train_steps
        if self.loop is None:
            assert self.restored is not None
            self.console.notice(f"all {step} steps are done; increase --trainer.num_train_steps to extend the run")
            metrics: Any = self.restored.metadata["metrics"]
            saved = f"{self.directory.checkpoints}/{step_name(self.restored.step)}"
            return self._result(step, metrics, best_so_far(self, self.restored, "best_evaluation"), saved)
        stopped_by = None
        try:
            if step < total:
                # The signal may have reached a different process, but all processes stop together.
                stopped_by = self._signal or Signals.SIGTERM
                self.console.notice(
                    f"{stopped_by.name}: stopped after step {step}, which was saved; "
                    f"use --resume {self.directory.path} to continue"
                )
            else:
                describe_end(self, self.loop, state)
        except Exception:
            self._trackers.close(failed=True)
            raise
        # Give the trackers of a stopped run less time to close, because the run may soon be killed.
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
        metric = self.config.trainer.best_metric
        best_step, best_loss = (None, None) if best is None else (best["step"], best[metric])
        return TrainingResult(self.directory.path, step, dict(metrics), best_step, best_loss, saved, stopped_by)

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
        """Start the optional trackers, which log from `step` onward. Only the first process has trackers."""
        if not self.processes.is_first:
            return OptionalTrackers()
        return start_optional(
            self.config.tracking,
            self.directory.path,
            run_id=self._run_id,
            first_step=step,
            facts={**encode(self.config), "code": self.provenance["code"]},
            max_grad_norm=self.config.trainer.max_grad_norm,
            console=self.console,
        )

    def _build_loop(self, state: TrainState) -> Loop:
        """Build a training loop that starts from the given state."""
        trainer = self.config.trainer
        step = int(state.step)
        best, best_evaluation = (
            None if self.restored is None else best_so_far(self, self.restored, name)
            for name in ("best", "best_evaluation")
        )
        flops = abstract_model(self.config.model, self.data.tokenizer.vocab_size).flops_per_token
        lines = JsonLines(self.directory.metrics_file, first_step=step) if self.processes.is_first else None
        monitor = Monitor(Trackers(lines, self._trackers), self.console, Watchdog(trainer.step_timeout))
        checkpoints = RunCheckpoints(
            self.directory.checkpoints,
            self.config,
            self.provenance,
            run_id=self._run_id,
            processes=self.processes,
            best=best,
            saved_step=None if self.restored is None else self.restored.step,
        )
        timer = CheckpointTimer(trainer.checkpoint_minutes, self.processes)
        lengths, policy, end = token_byte_lengths(self.data.tokenizer), self.settings.policy, self.data.document_end
        evaluators = {n: Evaluator(own, lengths, self.partition, policy, end) for n, own in self.validation.items()}
        registered = [RegisteredCallback(name, callback, monitor) for name, callback in self.callbacks.items()]
        evaluating = Evaluating(trainer, monitor, partial(evaluate_sets, evaluators), registered, best_evaluation)
        saving = Saving(trainer, monitor, checkpoints, self.verification, timer, evaluating)
        scoring = Scoring(trainer, monitor, TaskScorer(self.data.tokenizer, self.partition, policy), self.tasks)
        logging = [Logging(monitor), SkippedSteps(trainer, monitor)]
        profiling = Profiling(trainer.profiled_steps, self.directory.profile, self.console)
        return Loop(
            config=trainer,
            settings_of=partial(StepSettings.of, self.config),
            partition=self.partition,
            loader=BatchLoader(
                self.batches, self.partition, trainer, int(state.skipped_windows), self.data.document_end
            ),
            monitor=monitor,
            callbacks=[profiling, *logging, evaluating, scoring, *registered, saving],
            evaluating=evaluating,
            saving=saving,
            tokens_per_sequence=self.config.model.seq_len,
            tokens_before=tokens_so_far(self, step),
            mfu_per_token_rate=flops / peak_flops(list(self.partition.mesh.devices.flat)),
        )
