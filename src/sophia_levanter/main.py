"""`python -m sophia_levanter.main --config FILE [--field.sub value ...]`: train a model."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from sophia_levanter.allocation import keep_freed_memory
from sophia_levanter.command_line import dump_config, parse_command_line
from sophia_levanter.commands.arguments import run_command
from sophia_levanter.exit_status import DONE, FAILURE, INTERRUPTED, PREEMPTED
from sophia_levanter.partition.config import check_launcher
from sophia_levanter.tracking.config import check_installed
from sophia_levanter.training.run_directory import choose_run_directory


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Returns:
        The exit status: 0 done, 1 failure, 2 bad input, 75 stopped by SIGTERM (run it again), 130 interrupted.
    """
    return run_command(argv, _run, interrupted="interrupted; nothing since the last checkpoint is saved")


def _run(argv: Sequence[str]) -> int:
    command = parse_command_line(argv)
    if command.help is not None:
        print(command.help)
        return DONE
    assert command.config is not None
    if command.print_config:
        print(dump_config(command.config), end="")
        return DONE
    keep_freed_memory()
    # LAPACK reads this when jax is imported. With threads of its own it decomposes small matrices 2.5 times slower.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    check_launcher(command.config.mesh, os.environ)
    check_installed(command.config.tracking)
    directory, config = choose_run_directory(command)
    before = signal.signal(signal.SIGTERM, _stop_before_training)

    # Only now what takes long to import: a mistake above is answered at once.
    from jax.errors import JaxRuntimeError

    from sophia_levanter.checkpoint import CheckpointError
    from sophia_levanter.partition.messages import NoAnswer
    from sophia_levanter.training.environment import recorded_environment
    from sophia_levanter.training.loop import TrainingFailed
    from sophia_levanter.training.run import run

    try:
        stopped_by = run(config, directory, recorded_environment(), quiet=command.quiet)
    except (TrainingFailed, CheckpointError, NoAnswer) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    except JaxRuntimeError as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return FAILURE
    finally:
        signal.signal(signal.SIGTERM, before)
        directory.unlock()
    if stopped_by is None:
        return DONE
    return INTERRUPTED if stopped_by == signal.SIGINT else PREEMPTED


def _stop_before_training(number: int, frame: FrameType | None) -> None:
    print("SIGTERM: stopped outside training; run the command again", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: where the signal comes inside a callback of the garbage collector, Python would swallow that.
    os._exit(PREEMPTED)


if __name__ == "__main__":
    sys.exit(main())
