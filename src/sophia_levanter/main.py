"""`python -m sophia_levanter.main --config FILE [--field.sub value ...]`: train a model."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from sophia_levanter.command_line import dump_config, parse_command_line
from sophia_levanter.errors import InputError
from sophia_levanter.training.run_directory import choose_run_directory

DONE, FAILURE, BAD_INPUT, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Returns:
        The exit status: 0 done, 1 failure, 2 bad input, 75 stopped by SIGTERM (run it again), 130 interrupted.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:
        # Nobody reads on (`--help | head`); what Python would still flush must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except KeyboardInterrupt:
        print("interrupted; nothing since the last checkpoint is saved", file=sys.stderr)
        return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    command = parse_command_line(argv)
    if command.help is not None:
        print(command.help)
        return DONE
    assert command.config is not None
    if command.print_config:
        print(dump_config(command.config), end="")
        return DONE
    directory, config = choose_run_directory(command)

    # Only now what takes long to import: a mistake above is answered at once.
    from sophia_levanter.checkpoint import CheckpointError
    from sophia_levanter.training.loop import TrainingFailed
    from sophia_levanter.training.run import run

    try:
        stop = run(config, directory, _environment())
    except (TrainingFailed, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    if stop.signal is None:
        return DONE
    return INTERRUPTED if stop.signal == signal.SIGINT else PREEMPTED


def _environment() -> dict[str, str | int | None]:
    """What besides the configuration and the devices decides the last bits of the losses."""
    return {
        "jax": version("jax"),
        "cpu_threads": os.cpu_count() if sys.platform == "darwin" else len(os.sched_getaffinity(0)),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


if __name__ == "__main__":
    sys.exit(main())
