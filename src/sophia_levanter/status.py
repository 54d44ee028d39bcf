"""Exit statuses, and JSON status lines that a process sends to the program that started it.

The parent program sets SOPHIA_LEVANTER_STATUS to the number of a file descriptor. A process on another host reaches the
launcher only through its standard output (via ssh, srun or a Ray worker), so a prefix marks status lines.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sophia_levanter.errors import InputError, one_line

DONE = 0
FAILURE = 1
BAD_INPUT = 2
UNAVAILABLE = 69  # machines are missing, as in sysexits.h
PREEMPTED = 75  # stopped, after saving the state if there was any
INTERRUPTED = 130

VARIABLE = "SOPHIA_LEVANTER_STATUS"
ON_STDOUT = {VARIABLE: "1"}  # environment for a process that writes its status lines to standard output
_PREFIX = "@status "


def run_command(
    given: Sequence[str] | None,
    run: Callable[[Sequence[str]], int],
    *,
    usage: str | None = None,
    interrupted: str = "interrupted; run the same command again to continue",
) -> int:
    """Call `run` with the arguments of a command. Errors are reported in one line.

    Args:
        given: the arguments; by default, those of this process.
        run: executes the command and returns its exit status.
        usage: the text to print for --help instead of calling `run`. If None, `run` handles --help.
        interrupted: the message to print after Ctrl-C.

    Returns:
        The exit status returned by `run`. If it raises an error: 1 for a failure, 2 for bad input, or 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Output may contain characters that are missing from the terminal's encoding.
            stream.reconfigure(errors="replace")
    words = sys.argv[1:] if given is None else given
    status = FAILURE
    try:
        if usage is not None and ("--help" in words or "-h" in words):
            print(usage)
            status = DONE
        else:
            status = run(words)
        print(end="", flush=True)  # detects a closed pipe here rather than at interpreter exit
        return status
    except InputError as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        report_failure(error.reason, one_line(error))
        return BAD_INPUT
    except BrokenPipeError:
        # The reader has exited (`| head`). Redirect stdout, because Python flushes it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status or FAILURE
    except OSError as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        step: number of completed steps.
        total: number of steps in the run. This field, `loss` and `tokens_per_second` are None right after a resume.
        loss: loss at the last step, in nats per token.
        tokens_per_second: total throughput of all devices.
    """

    step: int
    total: int | None = None
    loss: float | None = None
    tokens_per_second: int | None = None

    def __str__(self) -> str:
        if self.loss is None:
            return f"step {self.step}"
        return f"step {self.step}/{self.total}, loss {self.loss:.3f}, {self.tokens_per_second:,} tokens/s"


@dataclass(frozen=True)
class Failure:
    """The reason why a process failed.

    Attributes:
        reason: the `reason` attribute of the exception, for programs.
        message: a one-line message for users.
    """

    reason: str
    message: str


def report_step(step: int, total: int, loss: float, tokens_per_second: float) -> None:
    """Report a completed step."""
    _report(step=step, total=total, loss=round(float(loss), 3), tokens_per_second=round(tokens_per_second))


def report_resumed(step: int) -> None:
    """Report the step from which the run continues."""
    _report(resumed_from=step)


def report_failure(reason: str, message: str) -> None:
    """Report why this process failed."""
    _report(failed=reason, message=message)


def _report(**fields: object) -> None:
    number = os.environ.get(VARIABLE)
    if number is None:
        return
    # Continue the run even if the program that started it has exited.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        os.write(int(number), f"{_PREFIX}{json.dumps(fields)}\n".encode())


def read_status(line: str) -> Progress | Failure | None:
    """Parse a status line, given without its line break. Return None for any other line."""
    if not line.startswith(_PREFIX):
        return None
    try:
        fields = json.loads(line.removeprefix(_PREFIX))
    except (ValueError, RecursionError):
        return None
    match fields:
        case {"step": int(step), "total": int(total), "loss": float(loss), "tokens_per_second": int(rate)}:
            return Progress(step, total, loss, rate)
        case {"resumed_from": int(step)}:
            return Progress(step)
        case {"failed": str(reason), "message": str(message)}:
            return Failure(reason, message)
    return None
