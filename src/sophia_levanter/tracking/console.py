"""What a person watching a run sees."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sophia_levanter.tracking.step_lines import show_numbers, show_step


class _SurvivingConsole(RichConsole):
    """A console whose reader may leave (`| head`): the run goes on, in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """A progress bar in a terminal, plain lines elsewhere.

    Args:
        log_every: steps between two plain lines.
        rich_console: where to print; standard output if not given.
        quiet: print nothing.
    """

    def __init__(self, log_every: int = 10, rich_console: RichConsole | None = None, *, quiet: bool = False) -> None:
        self._console = rich_console or _SurvivingConsole(soft_wrap=True, highlight=False, quiet=quiet)
        self._log_every = log_every
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, markup=False, emoji=False)

    def start(self, completed: int, total: int) -> None:
        """Begin to show progress."""
        self._total = total
        if not self._console.is_terminal:
            return
        columns = (TextColumn("{task.fields[numbers]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console)
        self._task = self._progress.add_task("train", total=total, completed=completed, numbers="training")
        self._progress.start()

    def step(self, step: int, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Show a step's metrics, by their names in metrics.jsonl."""
        numbers = show_numbers(metrics)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step + 1, numbers=numbers)
        elif (step + 1) % self._log_every == 0 or step + 1 == self._total:
            self.line(f"{show_step(step + 1, self._total, numbers)}  {_duration(seconds_left)} left")

    def stop(self) -> None:
        """End the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
