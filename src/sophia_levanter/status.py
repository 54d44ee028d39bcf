"""How a process tells its starter how it went: exit statuses, and JSON status lines beside its output for people.

The starter sets SOPHIA_LEVANTER_STATUS to the number of a file descriptor. A process on another host shares only its
standard output with the launcher, through ssh, srun or a Ray worker; there a prefix tells status lines from other text.
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
PREEMPTED = 75  # stopped, and saved where there is something to save
INTERRUPTED = 130

VARIABLE = "SOPHIA_LEVANTER_STATUS"
ON_STDOUT = {VARIABLE: "1"}  # the environment of a process whose standard output the starter reads
_PREFIX = "@status "


def run_command(
    given: Sequence[str] | None,
    run: Callable[[Sequence[str]], int],
    *,
    usage: str | None = None,
    interrupted: str = "interrupted; run the same command again to continue",
) -> int:
    """`run(command line)`, errors as one line each.

    Args:
        given: the command line; this process's if None.
        run: does what it says.
        usage: printed in place of that where --help is asked for; None leaves this to `run`.
        interrupted: what is said on Ctrl-C.

    Returns:
        The exit status: what `run` gives, 1 failure, 2 bad input, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What is printed may hold what the terminal's encoding lacks.
            stream.reconfigure(errors="replace")
    words = sys.argv[1:] if given is None else given
    status = FAILURE
    try:
        if usage is not None and ("--help" in words or "-h" in words):
            print(usage)
            status = DONE
        else:
            status = run(words)
        print(end="", flush=True)  # a reader that has left is noticed here, and not when the interpreter ends
        return status
    except InputError as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        report_failure(error.reason, one_line(error))
        return BAD_INPUT
    except BrokenPipeError:
        # The reader has left (`| head`); what Python still flushes at its end must not fail either.
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
    """How far a run has come.

    Attributes:
        step: steps done.
        total: steps of the run. None right after a resume, as are `loss` and `tokens_per_second`.
        loss: of the last step, nats per token.
        tokens_per_second: of all devices.
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
    """Why a process ends with an error.

    Attributes:
        reason: for programs: the `reason` of the exception.
        message: for people, one line.
    """

    reason: str
    message: str


def report_step(step: int, total: int, loss: float, tokens_per_second: float) -> None:
    """Tell the starter which step is done."""
    _report(step=step, total=total, loss=round(float(loss), 3), tokens_per_second=round(tokens_per_second))


def report_resumed(step: int) -> None:
    """Tell the starter which step the run goes on from."""
    _report(resumed_from=step)


def report_failure(reason: str, message: str) -> None:
    """Tell the starter why this process ends."""
    _report(failed=reason, message=message)


def _report(**fields: object) -> None:
    number = os.environ.get(VARIABLE)
    if number is None:
        return
    # A run goes on, and ends as it would, where its starter has left.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        os.write(int(number), f"{_PREFIX}{json.dumps(fields)}\n".encode())


def read_status(line: str) -> Progress | Failure | None:
    """What a line without its end tells; None if it is not a status line."""
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
