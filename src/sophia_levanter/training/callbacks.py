"""Callbacks of the training loop: logging, evaluation, saving and registered callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sophia_levanter.checkpoint import CheckpointError
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.registries import CALLBACKS
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.data.batches import Verification
from sophia_levanter.errors import InputError, counted, one_line
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.tracking.console import Console
from sophia_levanter.tracking.trackers import Trackers
from sophia_levanter.training.checkpoints import CheckpointTimer, RunCheckpoints, better_of
from sophia_levanter.training.evaluation import Evaluation
from sophia_levanter.training.metrics import metric_rows, scalars
from sophia_levanter.training.step import TrainState
from sophia_levanter.training.stopping import Watchdog


class TrainingFailed(Exception):
    """The run cannot continue. The message names the cause and a remedy.

    Attributes:
        steps: the consecutive steps that were skipped.
        reason: an identifier of the cause, for the program that started this process.
    """

    def __init__(self, message: str, steps: range, reason: str = "loss_not_finite") -> None:
        super().__init__(message)
        self.steps = steps
        self.reason = reason


class StepReport(NamedTuple):
    """The results of a completed step.

    Attributes:
        step: the step number, starting from 0.
        metrics: the step's metrics, keyed by their names in metrics.jsonl.
        skipped_in_a_row: number of consecutive skipped steps, including this one; 0 if this step was not skipped.
        seconds_left: estimated time until the end of the run, in seconds.
    """

    step: int
    metrics: Mapping[str, float]
    skipped_in_a_row: int
    seconds_left: float


@dataclass
class Pause:
    """A run that is paused between two steps.

    Attributes:
        done: number of completed steps.
        state: the state after those steps. Its buffers are donated to the next step.
        stopping: returns whether the run is stopping and may soon be killed.
        evaluated: whether the latest validation loss was measured on this state.
        scored: whether the latest task scores were measured on this state.
        tokens: number of tokens in the completed steps.
    """

    done: int
    state: TrainState
    stopping: Callable[[], bool]
    evaluated: bool = False
    scored: bool = False
    tokens: int = 0


class Callback:
    """Base class for callbacks, which the training loop calls during a run. Override only the methods that you need.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Create the callback. The base class does not store the configuration."""

    def before_step(self, step: int) -> None:
        """Called before a step begins. The previous step may still be running."""

    def on_step(self, report: StepReport) -> None:
        """Called when the results of a step are available. The next step may already be running."""

    def is_due(self, done: int) -> bool:
        """Return whether the run should pause after `done` steps to call `on_pause`."""
        return False

    def on_pause(self, pause: Pause) -> None:
        """Called after each step for which `is_due` returns True, once the results of the step have been read."""

    def on_evaluation(self, pause: Pause, evaluation: Evaluation) -> Mapping[str, float]:
        """Called after each evaluation, but only on registered callbacks. The result is logged under `NAME/KEY`."""
        return {}

    def on_end(self) -> None:
        """Called when the run ends for any reason, and before it rolls back to a checkpoint."""


def build_callbacks(config: TrainConfig) -> dict[str, Callback]:
    """Build the registered callbacks that are listed in `trainer.callbacks`, keyed by name.

    Raises:
        InputError: if a callback cannot be built or is not a `Callback`.
    """
    built = {}
    for name in config.trainer.callbacks:
        try:
            built[name] = CALLBACKS[name](config)
        except Exception as error:
            raise InputError(one_line(f"trainer.callbacks: {name} failed: {type(error).__name__}: {error}")) from error
        if not isinstance(built[name], Callback):
            raise InputError(f"trainer.callbacks: {name} is not a subclass of {Callback.__module__}.Callback")
    return built


class RegisteredCallback(Callback):
    """Wraps a callback from a plug-in. Error messages name the callback, and the watchdog ignores its duration."""

    def __init__(self, name: str, callback: Callback, monitor: Monitor) -> None:
        self.name, self._callback, self._monitor = name, callback, monitor

    def before_step(self, step: int) -> None:
        self._monitor.watchdog.pause()
        self._call("before_step", step)

    def on_step(self, report: StepReport) -> None:
        self._call("on_step", report)

    def is_due(self, done: int) -> bool:
        return self._call("is_due", done)

    def on_pause(self, pause: Pause) -> None:
        self._monitor.watchdog.pause()
        self._call("on_pause", pause)

    def on_evaluation(self, pause: Pause, evaluation: Evaluation) -> Mapping[str, float]:
        """Return the numbers from the callback, keyed by `NAME/KEY`."""
        self._monitor.watchdog.pause()
        numbers = scalars("trainer.callbacks", self.name, self._call("on_evaluation", pause, evaluation))
        return {key: float(value) for key, value in numbers.items()}

    def on_end(self) -> None:
        self._monitor.watchdog.pause()
        try:
            self._call("on_end")
        except InputError as error:  # the run has ended, and its result is still valid
            self._monitor.console.notice(f"WARNING: {error}")

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._callback, method)(*arguments)
        except (InputError, TrainingFailed):
            raise
        except Exception as error:
            problem = f"{self.name} failed in {method}: {type(error).__name__}: {error}"
            raise InputError(one_line(f"trainer.callbacks: {problem}")) from error


@dataclass(frozen=True)
class Monitor:
    """Objects that record the metrics of a run, show them, and end the run if it hangs."""

    trackers: Trackers
    console: Console
    watchdog: Watchdog


@dataclass
class Logging(Callback):
    """Logs the metrics of each step to the trackers and the console."""

    monitor: Monitor

    def on_step(self, report: StepReport) -> None:
        self.monitor.trackers.log(report.step, report.metrics)
        self.monitor.console.step(report.step, report.metrics, report.seconds_left)

    def on_end(self) -> None:
        self.monitor.console.stop()
        self.monitor.trackers.close()


@dataclass
class SkippedSteps(Callback):
    """Reports skipped steps, and ends the run if too many consecutive steps are skipped."""

    config: TrainerConfig
    monitor: Monitor

    def on_step(self, report: StepReport) -> None:
        """Report the step if it was skipped. Raise `TrainingFailed` after too many consecutive skipped steps."""
        step, in_a_row, loss = report.step, report.skipped_in_a_row, report.metrics["train/loss"]
        if not in_a_row:
            return
        spike = math.isfinite(loss) and math.isfinite(report.metrics["train/grad_norm"])
        what = "loss spiked" if spike else "loss or gradient was not finite"
        hint = ", or a larger --trainer.loss_spike_factor" if spike else ""
        self.monitor.console.notice(f"step {step}: the {what} (loss {loss:.4g}); the step was skipped")
        if in_a_row >= self.config.max_skipped_steps:
            raise TrainingFailed(
                f"the {what} in {counted(in_a_row, 'consecutive step')}, ending at step {step}; "
                f"try a lower --optimizer.learning_rate or a longer --optimizer.warmup{hint}",
                range(step + 1 - in_a_row, step + 1),
                "loss_spikes" if spike else "loss_not_finite",
            )


@dataclass
class Saving(Callback):
    """Saves states while training continues. Raises an error if a save failed or the training text has changed.

    Attributes:
        monitor: the run's monitor, whose trackers are synced to disk before a state is saved.
        checkpoints: saves the states.
        verification: checks the training text. A save waits for this check unless the run is stopping.
        timer: determines when the next save is due.
        evaluating: keeps track of the best evaluation, which need not be that of a saved state.
    """

    config: TrainerConfig
    monitor: Monitor
    checkpoints: RunCheckpoints
    verification: Verification
    timer: CheckpointTimer
    evaluating: Evaluating

    def before_step(self, step: int) -> None:
        self.checkpoints.check()
        self.verification.check()

    def is_due(self, done: int) -> bool:
        is_step = done % self.config.checkpoint_interval == 0 or done == self.config.num_train_steps
        return is_step or self.timer.has_expired()

    def on_pause(self, pause: Pause) -> None:
        # After skipped steps, the run may roll back to an earlier checkpoint, which this save could remove.
        if pause.done == self.config.num_train_steps or not int(pause.state.skipped_in_a_row):
            self.save(pause)

    def save(self, pause: Pause) -> None:
        """Start saving the state."""
        trackers, console, watchdog = self.monitor.trackers, self.monitor.console, self.monitor.watchdog
        watchdog.pause()
        verified = self.verification.finish(pause.stopping)
        if not verified:
            console.notice(f"step {pause.done} was saved before the text was verified")
        watchdog.begin(f"saving step {pause.done}")
        trackers.sync()
        numbers = {k: v for k, v in trackers.last.items() if pause.scored or not k.startswith("tasks/")}
        facts = {"verified": verified, "best_evaluation": self.evaluating.best, "tokens": pause.tokens}
        self.checkpoints.save(pause.done, pause.state, numbers, evaluated=pause.evaluated, facts=facts)
        self.timer.restart()

    def finish_after(self, error: Exception) -> None:
        """Wait for the save in progress before the run ends with an error. If the save also fails, report its error."""
        try:
            self.checkpoints.wait()
        except (CheckpointError, FileExistsError) as another:
            if another is not error:
                self.monitor.console.notice(f"WARNING: {another}")


@dataclass
class Evaluating(Callback):
    """Measures the validation losses.

    Attributes:
        evaluate: returns the validation losses of a model, and calls the given function after each batch.
        registered: registered callbacks, which are called after each evaluation.
        best: `step` and loss (keyed by the metric's name) of the best evaluation so far; None before the first one.
    """

    config: TrainerConfig
    monitor: Monitor
    evaluate: Callable[[LanguageModel, Callable[[], None]], Evaluation]
    registered: Sequence[RegisteredCallback]
    best: dict[str, Any] | None = None

    def is_due(self, done: int) -> bool:
        return done % self.config.evaluation_interval == 0 or done == self.config.num_train_steps

    def on_pause(self, pause: Pause) -> None:
        """Evaluate the state. Raise `InputError` if the validation text is damaged or a registered callback fails."""
        done, trackers, watchdog = pause.done, self.monitor.trackers, self.monitor.watchdog
        evaluation = self.evaluate(pause.state.model, lambda: watchdog.begin(f"the evaluation after step {done}"))
        pause.evaluated = True
        numbers, metric = evaluation.numbers(), self.config.best_metric
        self.best = better_of(self.best, done, metric, numbers[metric])
        line = (
            f"step {done}: validation loss {evaluation.loss:.4f} nats per token, "
            f"{evaluation.bits_per_byte:.4f} bits per byte"
        )
        if evaluation.sets:
            sets = (f"{name} ({own.loss:.4f}, {own.bits_per_byte:.4f})" for name, own in evaluation.sets.items())
            line += f", the mean of {', '.join(sets)}"
        if pause.state.average is not None:
            averaged = self.evaluate(pause.state.average, lambda: watchdog.begin(f"the evaluation after step {done}"))
            numbers |= averaged.numbers("average_")
            line += f"; {averaged.loss:.4f} with averaged weights"
        self.monitor.console.line(line)
        try:
            for callback in self.registered:
                numbers |= callback.on_evaluation(pause, evaluation)
        finally:
            # Bits per byte may be undefined, but a loss that is NaN is a result.
            trackers.log(done - 1, {k: v for k, v in numbers.items() if not math.isnan(v) or k.endswith("loss")})
            trackers.last |= numbers
        names = (*self.config.metrics, *self.config.callbacks)
        self.monitor.console.rows(metric_rows(names, trackers.last))


@dataclass(eq=False)
class Profiling(Callback):
    """Records a profile of the host and the devices during a range of steps.

    Attributes:
        steps: the steps to trace; may be empty.
        directory: the directory for the trace, which is written to `plugins/profile/TIME/HOST.xplane.pb`.
        console: prints how to open the trace.
    """

    steps: range
    directory: Path
    console: Console
    _running: bool = field(default=False, init=False)

    def is_due(self, done: int) -> bool:
        """Return True before the first traced step and after the last one, so that the current step can finish."""
        return done == self.steps.stop if self._running else done in self.steps

    def before_step(self, step: int) -> None:
        """Start the trace at the first traced step, or at the first step of a run that resumes within the range."""
        if step in self.steps and not self._running:
            jax.profiler.start_trace(self.directory)
            self._running = True

    def on_pause(self, pause: Pause) -> None:
        self.on_end()

    def on_end(self) -> None:
        """Write the trace if one is running, even if the run ends before the last traced step."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self.console.line(f"profile: tensorboard --logdir {self.directory}")
