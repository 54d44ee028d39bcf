"""`python -m sophia_levanter.main --config FILE [--field.sub value ...]`: train a model."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from sophia_levanter.errors import one_line
from sophia_levanter.status import DONE, FAILURE, INTERRUPTED, PREEMPTED, report_failure, run_command

if TYPE_CHECKING:
    from sophia_levanter.config import TrainConfig
    from sophia_levanter.config.command_line import Command
    from sophia_levanter.run.directory import RunDirectory

INTERRUPTED_LINE = "interrupted; progress since the last checkpoint was not saved"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as specified by the command line.

    Returns:
        The exit status: 0 on success, 1 on failure, 2 on bad input, 75 after SIGTERM (resume the run), 130 on Ctrl-C.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _train(argv)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def process(argv: Sequence[str] | None = None) -> int:
    """Run the command as a standalone process. The first signal determines the exit status, even if more follow.

    This module imports little, so that the signal handlers are installed before the slow imports.
    """
    signal.signal(signal.SIGTERM, _stop_at_once)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # shells ignore SIGINT in background commands
        signal.signal(signal.SIGINT, _stop_at_once)
    status = _train(argv)
    # Ignore signals while the interpreter shuts down, which takes a while and starts by restoring default handlers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return status


def _train(argv: Sequence[str] | None) -> int:
    return run_command(argv, _run, interrupted=INTERRUPTED_LINE)


def _run(argv: Sequence[str]) -> int:
    from sophia_levanter.allocation import keep_freed_memory
    from sophia_levanter.config.command_line import dump_config, parse_command_line

    # Set this variable before parsing: OpenBLAS reads it when jax is imported, and a plug-in may import jax. With
    # multiple threads, OpenBLAS takes 2.5 times as long to decompose small matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    command = parse_command_line(argv)
    if command.help is not None:
        print(command.help)
        return DONE
    assert command.config is not None
    if command.print_config:
        print(dump_config(command.config), end="")
        return DONE
    keep_freed_memory()
    directory, config = plan_run(command)
    signal.signal(signal.SIGTERM, _stop_at_once)

    # Import slow modules after the checks, so that mistakes are reported immediately.
    from jax.errors import JaxRuntimeError

    from sophia_levanter.checkpoint import CheckpointError
    from sophia_levanter.partition.processes import NoAnswer
    from sophia_levanter.run.run import train
    from sophia_levanter.training.callbacks import TrainingFailed

    try:
        stopped_by = train(config, directory, quiet=command.quiet).stopped_by
    except (TrainingFailed, CheckpointError, NoAnswer) as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        if isinstance(error, TrainingFailed):
            report_failure(error.reason, one_line(error))
        return FAILURE
    except JaxRuntimeError as error:
        print(one_line(f"error: {str(error).splitlines()[0]}"), file=sys.stderr)
        return FAILURE
    finally:
        directory.unlock()
    if stopped_by is None:
        return DONE
    return INTERRUPTED if stopped_by == signal.SIGINT else PREEMPTED


def plan_run(command: Command) -> tuple[RunDirectory, TrainConfig]:
    """Check the configuration in this environment, choose the run directory, and make paths absolute. Write no files.

    Raises:
        InputError: if the run cannot start because of the launcher, a missing package or the run directory.
    """
    from sophia_levanter.config.mesh import check_launcher
    from sophia_levanter.config.run import check_installed
    from sophia_levanter.run.directory import choose_run_directory

    assert command.config is not None
    check_launcher(command.config.mesh, os.environ)
    check_installed(command.config.tracking)
    return choose_run_directory(command)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """Exit immediately. This handler is used when no state needs to be saved, or for a second Ctrl-C.

    Raising an exception is not reliable, because imports of C extensions replace it and garbage collection callbacks
    discard it. `print` would fail if the signal arrived during another print.
    """
    interrupted = number == signal.SIGINT
    line = INTERRUPTED_LINE if interrupted else "SIGTERM: stopped outside training; run the command again to continue"
    os.write(2, f"{line}\n".encode())
    with contextlib.suppress(RuntimeError, OSError):
        sys.stdout.flush()
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")  # show the cursor, which the progress bar hides
    os._exit(INTERRUPTED if interrupted else PREEMPTED)


if __name__ == "__main__":
    sys.exit(process())
