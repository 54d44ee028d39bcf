"""The training loop on the host: load batches, choose the compiled step, and call callbacks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import grain
import jax
import numpy as np

from sophia_levanter.batch import Batch, batch_from_sequences
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.data.batches import TrainBatches
from sophia_levanter.errors import InputError, counted
from sophia_levanter.optim import Optimizer
from sophia_levanter.partition.mesh import Partition
from sophia_levanter.partition.processes import all_stop
from sophia_levanter.training.array_statistics import by_layer
from sophia_levanter.training.callbacks import Callback, Evaluating, Monitor, Pause, Saving, StepReport
from sophia_levanter.training.costs import show_bytes, step_bytes
from sophia_levanter.training.step import StepOutput, StepSettings, TrainState, train_step
from sophia_levanter.training.stopping import StopRequest

READ_THREADS = 2
BATCHES_AHEAD = 2  # batches on the devices or being transferred to them


@dataclass(frozen=True)
class BatchLoader:
    """Loads batches onto the devices. Each process reads only the rows for its own devices.

    Attributes:
        skipped_windows: number of sequences in the data order that the run has skipped.
        document_end: the token that ends a document; None if attention and positions continue across documents.
    """

    batches: TrainBatches
    partition: Partition
    config: TrainerConfig
    skipped_windows: int = 0
    document_end: int | None = None

    def load(self, step: int) -> Batch:
        """Load the batch for a step, [microbatch, batch, position], onto the devices.

        Raises:
            InputError: if the corpus is damaged in the rows of this batch.
        """
        trainer = self.config.at_step(int(step))
        size = trainer.batch_size // trainer.num_microbatches
        rows = self.partition.rows_of_this_process(size)
        wanted = (np.arange(trainer.num_microbatches)[:, None] * size + rows).ravel()
        sequences = self.batches.rows(int(step), wanted, skipped_windows=self.skipped_windows)
        batch = batch_from_sequences(
            sequences, num_microbatches=trainer.num_microbatches, document_end=self.document_end
        )
        return self.partition.place(batch)

    def load_all(self, first: int, stop: int) -> Iterator[Batch]:
        """Iterate over the batches for steps `first` to `stop - 1`. Threads load the next few batches in advance."""
        steps = grain.MapDataset.range(first, stop).map(self.load)
        return iter(steps.to_iter_dataset(grain.ReadOptions(READ_THREADS, BATCHES_AHEAD)))


NO_WAIT_SECONDS = 1e-3


class _Running(NamedTuple):
    """A step whose results have not been read yet, and the time at which it ends."""

    step: int
    output: StepOutput
    ended: Future[float]


@dataclass
class Loop:
    """The training loop.

    Attributes:
        settings_of: builds the `StepSettings` for a batch size, given the trainer settings with that batch size.
        callbacks: all callbacks in the order in which they are called, including `evaluating` and `saving`.
        evaluating: the callback that keeps track of the best validation loss.
        saving: the callback that saves states. The loop also uses it to save the final state.
        tokens_per_sequence: number of predicted tokens in a row of a batch.
        mfu_per_token_rate: model FLOPs utilization at one token per second.
        tokens_before: number of tokens in the steps before `run`.
        saved: the path or URL of the last checkpoint; None until `run` has finished.
        first_step: the first step of `run`.
        seconds: the duration of `run`, in seconds.
        data_stalls: number of steps that started late because their batch was not ready.
    """

    config: TrainerConfig
    settings_of: Callable[[TrainerConfig], StepSettings]
    partition: Partition
    loader: BatchLoader
    monitor: Monitor
    callbacks: Sequence[Callback]
    evaluating: Evaluating
    saving: Saving
    tokens_per_sequence: int
    mfu_per_token_rate: float
    tokens_before: int = 0
    saved: str | None = None
    first_step: int = 0
    seconds: float = 0.0
    data_stalls: int = 0
    _tokens: int = 0
    _last_time: float = 0.0
    _step_seconds: list[float] = field(default_factory=list)
    # Steps whose results have not been read yet. The results of a step are read while the next step runs.
    _running: deque[_Running] = field(default_factory=deque)
    # Records when each step ends, because two steps may end while the host waits for data.
    _clock: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "step-clock"))

    def run(self, state: TrainState, stop: StopRequest) -> TrainState:
        """Train until the last step or until a stop is requested. Save and return the final state in either case.

        Raises:
            TrainingFailed: if too many consecutive steps were skipped because of their loss or gradient.
            CheckpointError: if a state could not be saved.
            InputError: if the text is damaged or has changed.
        """
        self.first_step = int(state.step)
        started = time.perf_counter()
        with self.partition.active(), self.monitor.watchdog:
            try:
                compiled = self._compile(state, self.first_step)
                self.monitor.console.start(self.first_step, self.config.num_train_steps)
                state = self._steps(state, compiled, stop)
                self.saved = self.saving.checkpoints.wait()
                return state
            except Exception as error:
                self.saving.finish_after(error)
                raise
            finally:
                self._clock.shutdown(wait=False)
                self.seconds = time.perf_counter() - started
                with ExitStack() as ends:  # calls `on_end` of all callbacks, even if one of them raises an error
                    for callback in reversed(self.callbacks):
                        ends.callback(callback.on_end)

    def _steps(self, state: TrainState, compiled: CompiledSteps, stop: StopRequest) -> TrainState:
        step, total = int(state.step), self.config.num_train_steps
        refresh_pending = bool(state.refresh_pending)
        batches = self.loader.load_all(step, total)
        batch = next(batches)

        def stopping() -> bool:
            # Multiple processes must save together, so they act on a signal only when all of them stop.
            return jax.process_count() == 1 and stop.signal is not None

        pause: Pause | None = None
        while step < total and not all_stop(step, stop.signal is not None):
            pause = None
            if self.config.at_step(step).batch_size != compiled.batch_size:
                compiled = self._compile(state, step)
            for callback in self.callbacks:
                callback.before_step(step)
            self.monitor.watchdog.begin(f"step {step}")
            refresh = refresh_pending or compiled.optimizer.refresh_due(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, output = compiled.at(refresh, self.config.statistics_due(step))(batch, state)
            self._running.append(_Running(step, output, self._clock.submit(_end_time, output)))
            step += 1
            if step < total:
                try:
                    batch = self._next(batches, output)
                except InputError:  # a later part of the corpus is damaged
                    self._save_if_alone(self._pause(step, state, stopping))
                    raise
            due = [callback for callback in self.callbacks if callback.is_due(step)]
            if refresh or due:
                pause = self._pause(step, state, stopping)
                refresh_pending = bool(output.refresh_pending)
                try:
                    for callback in due:
                        callback.on_pause(pause)
                except InputError:  # the validation text is damaged, or a registered callback failed
                    self._save_if_alone(pause)
                    raise
                self._last_time = time.perf_counter()
            self._read(most_running=1)
        if self.saving.checkpoints.saved_step != step:
            # A pause after this step has recorded whether the state was evaluated.
            pause = pause or self._pause(step, state, stopping)
            self.saving.save(replace(pause, stopping=lambda: True))
        return state

    def _pause(self, done: int, state: TrainState, stopping: Callable[[], bool]) -> Pause:
        """Read the results of all steps and pause the run."""
        self._read(most_running=0)
        return Pause(done, state, stopping, tokens=self.tokens)

    def _save_if_alone(self, pause: Pause) -> None:
        """Save before an error ends the run. Other processes may not have failed, and would not take part in a save."""
        if jax.process_count() == 1:
            self.saving.save(pause)

    def _compile(self, state: TrainState, step: int) -> CompiledSteps:
        """Compile the steps for the batch size that applies from `step` onward."""
        self._read(most_running=0)
        self.monitor.watchdog.pause()
        trainer = self.config.at_step(step)
        settings = self.settings_of(trainer)
        suffix = f" for batch size {trainer.batch_size}" if self.config.batch_size_changes else ""
        batch = self.loader.load(step)
        say = self.monitor.console.line
        compiled = compile_steps(settings, self.partition, batch, state, say, suffix)
        if trainer.statistics_every is not None:
            settings, suffix = replace(settings, statistics=True), f"{suffix} with array statistics"
            measuring = compile_steps(settings, self.partition, batch, state, say, suffix)
            compiled = replace(compiled, measuring=measuring)
        self._last_time = time.perf_counter()
        return compiled

    def _next(self, batches: Iterator[Batch], running: StepOutput) -> Batch:
        """Return the next batch. Count a data stall if the step `running` ended before the batch was ready."""
        started = time.perf_counter()
        batch = next(batches)
        blocked = time.perf_counter() - started > NO_WAIT_SECONDS
        self.data_stalls += blocked and all(x.is_ready() for x in running.metrics.values())  # type: ignore[attr-defined]
        return batch

    def _read(self, most_running: int) -> None:
        """Wait for and read the results of steps, oldest first, until at most `most_running` results are unread."""
        while len(self._running) > most_running:
            step, output, end = self._running.popleft()
            numbers = {name: float(value) for name, value in output.metrics.items()} | by_layer(output.statistics)
            ended = end.result()
            self._step_seconds.append(ended - self._last_time)
            self._last_time = ended
            tokens = self.config.at_step(step).batch_size * self.tokens_per_sequence
            self._tokens += tokens
            rate = tokens / self._step_seconds[-1]
            numbers |= {"train/tokens_per_second": rate, "train/mfu": rate * self.mfu_per_token_rate}
            recent = self._step_seconds[-20:]
            left = (self.config.num_train_steps - step - 1) * sum(recent) / len(recent)
            for callback in self.callbacks:
                callback.on_step(StepReport(step, numbers, int(output.skipped_in_a_row), left))

    @property
    def tokens(self) -> int:
        """Number of tokens in all steps whose results have been read, including the steps before `run`."""
        return self.tokens_before + self._tokens

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all steps run by this process, excluding evaluations and saves."""
        return self._tokens / sum(self._step_seconds) if self._step_seconds else 0.0


def _end_time(output: StepOutput) -> float:
    jax.block_until_ready(output.metrics)
    return time.perf_counter()


Step = Callable[[Batch, TrainState], tuple[TrainState, StepOutput]]


@dataclass(frozen=True)
class CompiledSteps:
    """Compiled steps for one batch size.

    Attributes:
        batch_size: number of rows in a batch.
        optimizer: determines when a curvature refresh is due.
        plain: the step without a refresh.
        refreshing: the step with a refresh; identical to `plain` if the optimizer does not use curvature.
        measuring: the same steps with statistics of individual arrays; None if statistics are disabled.
    """

    batch_size: int
    optimizer: Optimizer
    plain: Step
    refreshing: Step
    measuring: CompiledSteps | None = None

    def at(self, refresh: bool, measured: bool) -> Step:
        """Return the step with or without a refresh, and with or without array statistics."""
        steps = self.measuring if measured and self.measuring is not None else self
        return steps.refreshing if refresh else steps.plain


def compile_steps(
    settings: StepSettings,
    partition: Partition,
    batch: Batch,
    state: TrainState,
    say: Callable[[str], None],
    suffix: str = "",
) -> CompiledSteps:
    """Compile the plain step and, if the optimizer uses curvature, the step with a refresh.

    Steps that this process has already compiled are reused, for example after a rollback to a checkpoint or a return to
    an earlier batch size.

    Args:
        partition: the active partition.
        batch: [microbatch, batch, position], of the size to compile for.
        say: prints what is compiled, how long it took and how much memory a step needs.
        suffix: a description of the steps, appended to the first printed line.
    """
    started = time.perf_counter()
    kinds = (False,) if settings.optimizer.estimator is None else (False, True)
    say(f"compiling {counted(len(kinds), 'training step')}{suffix}")
    compiled = []
    for refresh in kinds:
        compiled.append(_jitted(train_step, settings, refresh, partition).lower(batch, state).compile())
    sizes = [sum(size) for step in compiled if (size := step_bytes(step.compiled)) is not None]
    needs = f"; a step needs at most {show_bytes(max(sizes))} per device" if sizes else ""
    say(f"compiled in {time.perf_counter() - started:.1f} s{needs}")
    batch_size = batch.tokens.size // batch.tokens.resolve_axis("position").size
    return CompiledSteps(batch_size, settings.optimizer, compiled[0], compiled[-1])


@lru_cache(maxsize=16)
def _jitted(step: Callable[..., Any], settings: StepSettings, refresh: bool, partition: Partition) -> Any:
    """Return a jitted step. It is cached per partition, because compilation depends on the active partition."""
    return eqx.filter_jit(partial(step, settings, refresh), donate="all-except-first")
