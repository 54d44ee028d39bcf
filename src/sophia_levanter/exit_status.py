"""The exit statuses of all commands, and errors as one line each."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence

from sophia_levanter.errors import InputError
from sophia_levanter.printing import one_line
from sophia_levanter.status import report_failure

DONE = 0
FAILURE = 1
BAD_INPUT = 2
PREEMPTED = 75  # stopped, and saved where there is something to save: run the command again
INTERRUPTED = 130


def run_command(
    given: Sequence[str] | None,
    run: Callable[[Sequence[str]], int],
    *,
    usage: str | None = None,
    interrupted: str = "interrupted; the same command goes on",
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
    try:
        if usage is not None and ("--help" in words or "-h" in words):
            print(usage)
            return DONE
        return run(words)
    except InputError as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        report_failure(error.reason, one_line(error))
        return BAD_INPUT
    except BrokenPipeError:
        # Nobody reads on (`| head`); what Python would still flush must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except OSError as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
