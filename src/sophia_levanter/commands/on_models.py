"""What the commands on trained models have in common."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from sophia_levanter.errors import one_line
from sophia_levanter.status import FAILURE, INTERRUPTED, run_command

Command = TypeVar("Command")


def run_on_model(
    given: Sequence[str] | None,
    parse: Callable[[Sequence[str]], Command],
    run: Callable[[Command], int],
    *,
    usage: str,
    interrupted: str = "interrupted",
) -> int:
    """Does what a command line says; errors as one line each.

    Args:
        given: the command line; this process's if None.
        parse: reads it; imports nothing heavy, to answer at once where it is wrong.
        run: does what it says.
        usage: printed in place of that where --help is asked for.
        interrupted: what is said on Ctrl-C.

    Returns:
        The exit status: what `run` gives; 1 for damaged checkpoints, and where devices fail or have no memory; 2 for
        bad input, 130 interrupted.
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
        # Python's way out would tear down what the devices are at work on, and die of it.
        print(interrupted, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    return FAILURE
