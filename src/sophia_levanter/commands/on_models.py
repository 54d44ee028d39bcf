"""Entry point shared by the commands that load a trained model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from sophia_levanter.errors import one_line
from sophia_levanter.status import FAILURE, INTERRUPTED, run_command

Command = TypeVar("Command")


def tell(line: str) -> None:
    """Print a line to standard error, so that standard output contains only the result."""
    print(one_line(line), file=sys.stderr, flush=True)


def run_on_model(
    given: Sequence[str] | None,
    parse: Callable[[Sequence[str]], Command],
    run: Callable[[Command], int],
    *,
    usage: str,
    interrupted: str = "interrupted",
) -> int:
    """Parse a command line and run the command. Errors are reported in one line.

    Args:
        given: the arguments; by default, those of this process.
        parse: parses the arguments. It avoids slow imports, so that mistakes are reported immediately.
        run: executes the parsed command and returns its exit status.
        usage: the text to print for --help instead of running the command.
        interrupted: the message to print after Ctrl-C.

    Returns:
        The exit status returned by `run`. If it raises an error: 1 for a damaged checkpoint, a device failure or a lack
        of device memory, 2 for bad input, or 130 after Ctrl-C.
    """
    return run_command(
        given, lambda words: _failing_in_one_line(run, parse(words), interrupted), usage=usage, interrupted=interrupted
    )


def _failing_in_one_line(run: Callable[[Command], int], command: Command, interrupted: str) -> int:
    from jax.errors import JaxRuntimeError

    from sophia_levanter.checkpoint import CheckpointError

    try:
        return run(command)
    except CheckpointError as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
    except JaxRuntimeError as error:
        print(one_line(f"error: {str(error).splitlines()[0]}"), file=sys.stderr)
    except KeyboardInterrupt:
        # A normal exit would crash, because it would destroy buffers that are still in use by the devices.
        print(interrupted, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    return FAILURE
