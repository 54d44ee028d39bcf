"""The host's side of training: which step runs, what is logged, when to evaluate, save and stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from sophia_levanter.batch import Batch
from sophia_levanter.checkpoint import CheckpointError
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.data.verification import Verification
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.partition.mesh import Partition
from sophia_levanter.partition.processes import all_stop
from sophia_levanter.tracking.console import Console
from sophia_levanter.tracking.trackers import Trackers
from sophia_levanter.training.checkpoints import RunCheckpoints
from sophia_levanter.training.compiled_steps import CompiledSteps, compile_steps
from sophia_levanter.training.evaluation import Evaluation
from sophia_levanter.training.loading import BatchLoader
from sophia_levanter.training.profile import Profiler
from sophia_levanter.training.step import StepOutput, StepSettings, TrainState
from sophia_levanter.training.stopping import StopRequest
from sophia_levanter.training.watchdog import Watchdog

NO_WAIT_SECONDS = 1e-3


class _Running(NamedTuple):
    """A step whose numbers are not read yet, and the clock's time at which they are there."""

    step: int
    output: StepOutput
    ended: Future[float]


class TrainingFailed(Exception):
    """The run cannot go on; the message says why and what to try.

    Attributes:
        steps: those in a row that changed nothing.
    """

    def __init__(self, message: str, steps: range) -> None:
        super().__init__(message)
        self.steps = steps


@dataclass
class Loop:
    """A run of training steps.

    Attributes:
        config: how long, and how often to evaluate, save and log.
        settings_of: gives what the step needs, of a trainer's settings with one batch size.
        partition: the devices, and where arrays lie on them.
        loader: puts the training batches on the devices.
        evaluate: gives a model's validation loss; calls a function on its way.
        checkpoints: saves states while training goes on.
        verification: of the text that is trained on; before it has ended, only a run that is to stop saves.
        trackers: take the numbers of each step.
        console: shows them.
        profiler: traces some of the steps.
        tokens_per_window: predicted tokens in a row of a batch.
        mfu_per_token_rate: model FLOPs utilisation at one token a second.
        best: step and validation loss of the best evaluation so far; None before the first.
        saved: the last checkpoint's path or URL; None before the end.
        first_step: that `run` began with.
        seconds: that it took.
        waited_steps: how many steps began late because their batch was not there.
    """

    config: TrainerConfig
    settings_of: Callable[[TrainerConfig], StepSettings]
    partition: Partition
    loader: BatchLoader
    evaluate: Callable[[LanguageModel, Callable[[], None]], Evaluation]
    checkpoints: RunCheckpoints
    verification: Verification
    trackers: Trackers
    console: Console
    profiler: Profiler
    tokens_per_window: int
    mfu_per_token_rate: float
    best: dict[str, Any] | None = None
    last_metrics: dict[str, float] = field(default_factory=dict)
    saved: str | None = None
    first_step: int = 0
    seconds: float = 0.0
    waited_steps: int = 0
    _tokens: int = 0
    _last_time: float = 0.0
    _step_seconds: list[float] = field(default_factory=list)
    _watchdog: Watchdog = field(init=False)
    _stopping: Callable[[], bool] = lambda: False
    # Sees when a step ends, whatever the host is doing then: one that waits for data would read two steps at once.
    _clock: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "step-clock"))

    def run(self, state: TrainState, stop: StopRequest) -> TrainState:
        """Train until the last step or until asked to stop; the last state is saved either way.

        Args:
            state: where to start, on the mesh.
            stop: looked at before each step.

        Returns:
            The last state.

        Raises:
            TrainingFailed: if too many steps in a row were skipped for their loss or gradient.
            CheckpointError: if a state could not be saved.
            InputError: if the text is damaged, or not the one that the run was given.
        """
        self._watchdog = Watchdog(self.config.step_timeout)
        self.first_step = int(state.step)
        started = time.perf_counter()
        with self.partition.active(), self._watchdog:
            try:
                compiled = self._compile(state, self.first_step)
                self.console.start(self.first_step, self.config.num_train_steps)
                self._last_time = time.perf_counter()
                state = self._steps(state, compiled, stop)
                self.saved = self.checkpoints.wait()
                return state
            except Exception as error:
                self._end_save(error)
                raise
            finally:
                self._end_profile()
                self.console.stop()
                self._clock.shutdown(wait=False)
                self.seconds = time.perf_counter() - started
                self.trackers.close()

    def _steps(self, state: TrainState, compiled: CompiledSteps, stop: StopRequest) -> TrainState:
        step, total = int(state.step), self.config.num_train_steps
        refresh_pending = bool(state.refresh_pending)
        batches = self.loader.load_all(step, total)
        batch = next(batches)
        # A step's numbers are read while the next one runs.
        unread: _Running | None = None
        # Of several processes all must save together: they know of a signal when all have stopped.
        self._stopping = lambda: jax.process_count() == 1 and stop.signal is not None
        while step < total and not all_stop(step, stop.signal is not None):
            self.checkpoints.check()
            self.verification.check()
            if self.config.at_step(step).batch_size != compiled.batch_size:
                if unread is not None:
                    self._read(unread)
                    unread = None
                compiled = self._compile(state, step)
                self._last_time = time.perf_counter()
            self._watchdog.begin(f"step {step}")
            refresh = refresh_pending or compiled.optimizer.refresh_due(step)
            if self.profiler.starts_at(step):
                if unread is not None:
                    self._read(unread)
                    unread = None
                self.profiler.start()
            with self.profiler.annotated(step):
                state, output = (compiled.refreshing if refresh else compiled.plain)(batch, state)
            running = _Running(step, output, self._clock.submit(_end_time, output))
            if step + 1 < total:
                try:
                    batch = self._next(batches, output)
                except InputError:  # a corpus that is damaged further on
                    if unread is not None:
                        self._read(unread)
                    self._read(running)
                    self._save(step + 1, state, evaluated=False)
                    raise
            if unread is not None:
                self._read(unread)
            unread = running
            profiled = self.profiler.ends_after(step)
            step += 1
            evaluate = step % self.config.evaluate_every == 0 or step == total
            save = step % self.config.checkpoint_every == 0 or step == total
            if refresh or evaluate or save or profiled:
                self._read(unread)
                unread = None
                refresh_pending = bool(output.refresh_pending)
            if profiled:
                self._end_profile()
            if evaluate:
                try:
                    self._evaluate(step, state)
                except InputError:  # validation text that is damaged
                    self._save(step, state, evaluated=False)
                    raise
            # What follows skipped steps may go back to a checkpoint from before them, which this one could push out.
            if save and (step == total or not int(output.skipped_in_a_row)):
                self._save(step, state, evaluated=evaluate)
        if unread is not None:
            self._read(unread)
        if self.checkpoints.saved_step != step:
            self._stopping = lambda: step < total
            self._save(step, state, evaluated=False)
        return state

    def _compile(self, state: TrainState, step: int) -> CompiledSteps:
        """Steps for batches of the size that they have from `step` on."""
        self._watchdog.pause()
        trainer = self.config.at_step(step)
        settings = self.settings_of(trainer)
        of = f" for batches of {trainer.batch_size}" if self.config.batch_size_changes else ""
        batch = self.loader.load(step)
        return compile_steps(settings, batch, state, trainer.batch_size, self.console.line, of)

    def _next(self, batches: Iterator[Batch], running: StepOutput) -> Batch:
        """The next batch, for when the `running` step is done."""
        started = time.perf_counter()
        batch = next(batches)
        blocked = time.perf_counter() - started > NO_WAIT_SECONDS
        self.waited_steps += blocked and all(x.is_ready() for x in running.metrics.values())  # type: ignore[attr-defined]
        return batch

    def _read(self, running: _Running) -> None:
        """Wait for a step to end, and log it."""
        step, output = running.step, running.output
        numbers = {name: float(value) for name, value in output.metrics.items()}
        ended = running.ended.result()
        self._step_seconds.append(ended - self._last_time)
        self._last_time = ended
        tokens = self.config.at_step(step).batch_size * self.tokens_per_window
        self._tokens += tokens
        rate = tokens / self._step_seconds[-1]
        numbers |= {"train/tokens_per_second": rate, "train/mfu": rate * self.mfu_per_token_rate}
        self.trackers.log(step, numbers)
        self.last_metrics |= numbers
        recent = self._step_seconds[-20:]
        self.console.step(step, numbers, (self.config.num_train_steps - step - 1) * sum(recent) / len(recent))
        in_a_row = int(output.skipped_in_a_row)
        if in_a_row:
            self._say_skipped(step, numbers, in_a_row)

    def _say_skipped(self, step: int, numbers: dict[str, float], in_a_row: int) -> None:
        loss = numbers["train/loss"]
        spike = math.isfinite(loss) and math.isfinite(numbers["train/grad_norm"])
        if spike:
            what, hint = "loss was a spike", "; or a larger --trainer.loss_spike_factor"
        else:
            what, hint = "loss or gradient was not finite", ""
        self.console.notice(f"step {step}: the {what} (loss {loss:.4g}); the step changed nothing")
        if in_a_row >= self.config.max_skipped_steps:
            raise TrainingFailed(
                f"the {what} in {in_a_row} steps in a row, the last of them step {step}; "
                f"try a lower --optimizer.learning_rate or more --optimizer.warmup_steps{hint}",
                range(step + 1 - in_a_row, step + 1),
            )

    def _evaluate(self, step: int, state: TrainState) -> None:
        evaluation = self.evaluate(state.model, lambda: self._watchdog.begin(f"the evaluation after step {step}"))
        numbers = {"validation/loss": evaluation.loss, "validation/bits_per_byte": evaluation.bits_per_byte}
        self.trackers.log(step - 1, {k: v for k, v in numbers.items() if not math.isnan(v)})
        self.last_metrics |= numbers
        if math.isfinite(evaluation.loss) and (self.best is None or evaluation.loss < self.best["validation/loss"]):
            self.best = {"step": step, "validation/loss": evaluation.loss}
        self.console.line(
            f"step {step}: validation loss {evaluation.loss:.4f} nats per token, "
            f"{evaluation.bits_per_byte:.4f} bits per byte"
        )
        self._last_time = time.perf_counter()

    def _end_profile(self) -> None:
        directory = self.profiler.stop()
        if directory is not None:
            self.console.line(f"profile: tensorboard --logdir {directory}")
            self._last_time = time.perf_counter()

    def _save(self, step: int, state: TrainState, *, evaluated: bool) -> None:
        self._watchdog.pause()
        verified = self.verification.finish(self._stopping)
        if not verified:
            self.console.notice(f"step {step} is saved before its text has been compared with what it should be")
        self._watchdog.begin(f"saving step {step}")
        self.trackers.sync()
        self.checkpoints.save(step, state, self.last_metrics, evaluated=evaluated, verified=verified)
        self._last_time = time.perf_counter()

    def _end_save(self, error: Exception) -> None:
        """Before the run ends with an error: what is being saved is saved, and a failure to is not forgotten."""
        try:
            self.checkpoints.wait()
        except (CheckpointError, FileExistsError) as another:
            if another is not error:
                self.console.notice(f"WARNING: {another}")

    @property
    def tokens_per_second(self) -> float:
        """Over all steps of this process, without evaluations and saves."""
        return self._tokens / sum(self._step_seconds) if self._step_seconds else 0.0


def _end_time(output: StepOutput) -> float:
    jax.block_until_ready(output.metrics)
    return time.perf_counter()
