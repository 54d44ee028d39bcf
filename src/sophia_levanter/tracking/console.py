"""Console output of a run."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from sophia_levanter.errors import one_line
from sophia_levanter.status import report_resumed, report_step

# For the bar and the elapsed time: the minimum terminal width at which each is shown, and its own width, in columns.
WIDTH_FOR_BAR, BAR_WIDTH = 120, 20
WIDTH_FOR_ELAPSED, ELAPSED_WIDTH = 70, 9
SMOOTHING = 0.95
LONGEST_SILENCE = 10.0  # maximum seconds between plain lines, unless a step takes longer


class StepNumbers:
    """The numbers to show for the last step.

    Two of them depend on earlier steps: the smoothed loss, which is a bias-corrected exponential moving average of the
    finite losses in this process, and the win rate at the last refresh.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0
        self._shown: dict[str, str] = {}

    def update(self, metrics: Mapping[str, float]) -> None:
        """Update the numbers with the metrics of a step, keyed by their names in metrics.jsonl."""
        loss = metrics["train/loss"]
        if math.isfinite(loss):
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self._shown |= {
            "loss": f"loss {loss:.3f}",
            "smoothed": f"smoothed {self.smoothed_loss:.3f}",
            "rate": f"{metrics['train/tokens_per_second']:,.0f} tokens/s",
            "mfu": f"MFU {metrics['train/mfu']:.1%}",
        }
        if "optim/win_rate" in metrics:
            self._shown["win rate"] = f"win rate {metrics['optim/win_rate']:.1%}"

    @property
    def smoothed_loss(self) -> float:
        """The smoothed loss in nats per token, or NaN before the first finite loss."""
        return self._sum / self._weight if self._weight else math.nan

    def __str__(self) -> str:
        return "  ".join(self._shown.values())

    def within(self, width: int) -> str:
        """Format as many numbers as fit in `width` columns. The loss is always included."""
        kept = dict(self._shown)
        for name in ("mfu", "win rate", "rate", "smoothed"):
            if len("  ".join(kept.values())) > width:
                kept.pop(name, None)
        return "  ".join(kept.values())


class _SurvivingConsole(RichConsole):
    """A console that stops printing if its reader closes the pipe (`| head`), so that the run can continue."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """Shows a progress bar and tables in a terminal, and plain lines elsewhere. Text is never parsed as markup.

    Args:
        log_every: the number of steps between plain lines. A line is also printed if a step ends at least ten seconds
            after the last line.
        rich_console: the console to print to; by default, standard output.
        quiet: whether to print only notices.
        silent: whether to print nothing.
    """

    def __init__(
        self,
        log_every: int = 10,
        rich_console: RichConsole | None = None,
        *,
        quiet: bool = False,
        silent: bool = False,
    ) -> None:
        self._console = rich_console or _SurvivingConsole(soft_wrap=True, highlight=False, quiet=silent)
        self._log_every = log_every
        self._quiet = quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._last_line = 0.0
        self._numbers = StepNumbers()

    def line(self, text: str) -> None:
        """Print a line. If a progress bar is shown, the line appears above it."""
        if not self._quiet:
            self.notice(text)

    def notice(self, text: str) -> None:
        """Print a line, such as a warning or the result of the run, even if `quiet` is true."""
        self._print(one_line(text))

    def paragraph(self, text: str) -> None:
        """Print multi-line text, which must not contain terminal control characters."""
        if not self._quiet:
            self._print(text)

    def _print(self, text: str) -> None:
        # The encoding of standard output may lack some characters. Our commands handle this, but API callers may not.
        text = text.encode(self._console.encoding, "replace").decode(self._console.encoding)
        self._console.print(text, markup=False, emoji=False, highlight=False)

    def rows(self, rows: Sequence[tuple[str, str]], notices: Collection[str] = ()) -> None:
        """Print named rows as a table in a terminal, and as plain lines elsewhere.

        Args:
            rows: the name and the text of each row.
            notices: the names of the rows that are printed, as lines, even if `quiet` is true.
        """
        if not rows:
            return
        if self._console.is_terminal and not self._quiet:
            table = Table(Column(no_wrap=True), Column(overflow="fold"), show_header=False)
            for name, text in rows:
                table.add_row(Text(name), Text(one_line(text)))
            self._console.print(table, soft_wrap=False)
            return
        for name, text in rows:
            (self.notice if name in notices else self.line)(f"{name}: {text}")

    def start(self, completed: int, total: int) -> None:
        """Start showing progress."""
        self._total, self._last_line = total, time.monotonic()
        if not self._console.is_terminal or self._quiet:
            return
        width = self._console.width
        self._progress = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
            *([BarColumn(BAR_WIDTH)] if width >= WIDTH_FOR_BAR else []),
            TextColumn("{task.fields[numbers]}", markup=False),
            *([TimeElapsedColumn()] if width >= WIDTH_FOR_ELAPSED else []),
            TextColumn("{task.fields[left]}", markup=False),
            console=self._console,
        )
        self._task = self._progress.add_task("train", total=total, completed=completed, numbers="training", left="")
        self._progress.start()

    def resumed(self, step: int, run_dir: Path) -> None:
        """Report that the run resumes after `step`."""
        self.line(f"resuming after step {step} in {run_dir}")
        report_resumed(step)

    def step(self, step: int, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Show the metrics of a step, keyed by their names in metrics.jsonl."""
        self._numbers.update(metrics)
        left = f"{show_duration(seconds_left)} left"
        if self._progress is not None and self._task is not None:
            numbers = self._numbers.within(self._room_for_numbers(left))
            self._progress.update(self._task, completed=step + 1, numbers=numbers, left=left)
            return
        now = time.monotonic()
        is_slow = now - self._last_line >= LONGEST_SILENCE
        if is_slow or (step + 1) % self._log_every == 0 or step + 1 == self._total:
            self._last_line = now
            self.line(f"step {step + 1}/{self._total}  {self._numbers}  {left}")
            report_step(step + 1, self._total, metrics["train/loss"], metrics["train/tokens_per_second"])

    @property
    def smoothed_loss(self) -> float:
        """The smoothed loss of the last step, in nats per token."""
        return self._numbers.smoothed_loss

    def stop(self) -> None:
        """Stop the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _room_for_numbers(self, left: str) -> int:
        """Return the number of columns that remain for the numbers after the other parts of the progress line."""
        width = self._console.width
        others = [2 * len(str(self._total)) + 1, len(left)]
        others += [BAR_WIDTH] if width >= WIDTH_FOR_BAR else []
        others += [ELAPSED_WIDTH] if width >= WIDTH_FOR_ELAPSED else []
        return width - sum(others) - len(others)


def show_duration(seconds: float) -> str:
    """Format a duration in hours, minutes and seconds, such as `1:02:03`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def show_age(saved_at: float) -> str:
    """Describe the age of a timestamp (in seconds since 1970), such as `2 hours ago`."""
    seconds = max(0, int(time.time() - saved_at))
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return f"{seconds} s ago"
