"""The files that the launcher stores in RUN_DIR/launch for users and other commands."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sophia_levanter.errors import InputError, counted
from sophia_levanter.files import lock, read_regular, write_atomically
from sophia_levanter.status import Progress

NUMBERS = ("processes", "attempt", "failures", "preemptions")
STOP = "stop"  # name of the file that asks the launcher to stop
RESTARTED = "SLURM_RESTART_COUNT"  # set in a job that Slurm restarted
LOOK_SECONDS = 1.0
LEASE_SECONDS = 180.0  # time after which a file server releases a lost client's locks


@dataclass(frozen=True)
class Status:
    """The status of a launched run.

    Attributes:
        state: starting, running, waiting, done, failed, stopped or refused.
        backend: name of the backend.
        processes: number of processes.
        attempt: number of the current or last attempt, starting at 1; 0 before the first attempt.
        failures: number of failed attempts.
        preemptions: number of preempted attempts.
        progress: the last progress reported by the run.
        exit_status: the launcher's exit status; None until it exits.
    """

    state: str
    backend: str
    processes: int
    attempt: int = 0
    failures: int = 0
    preemptions: int = 0
    progress: Progress | None = None
    exit_status: int | None = None

    def __str__(self) -> str:
        hosts = f"{counted(self.processes, 'process')} ({self.backend})"
        parts = [self.state, hosts, f"attempt {self.attempt}"]
        parts += [str(self.progress)] if self.progress else []
        parts.append(f"{counted(self.failures, 'failure')}, {counted(self.preemptions, 'preemption')}")
        return "; ".join(parts)


class LaunchRecord:
    """The launcher's directory for a run.

    Args:
        directory: RUN_DIR/launch.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._status_file = directory / "status.json"
        self._stop_file = directory / STOP

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock on the directory for this launcher.

        Raises:
            InputError: if another launcher holds the lock or the directory is not writable.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            held = self._lock()
        except OSError as error:
            raise InputError(
                f"trainer.run_dir {self.directory.parent} cannot be used: {error.strerror}; choose another directory"
            ) from None
        if held is None:
            raise InputError(
                f"trainer.run_dir {self.directory.parent} is already in use by a launcher; "
                f"run launch status {self.directory.parent} to see its state"
            )
        with held:
            # Keep a stop request if Slurm restarted the job. The user removes it by launching the run again.
            if RESTARTED not in os.environ:
                self._stop_file.unlink(missing_ok=True)
            yield

    def _lock(self) -> IO[str] | None:
        """Acquire the lock. Wait for commands that test it and, in a requeued Slurm job, for a dead host to lose it."""
        until = time.monotonic() + (LEASE_SECONDS if RESTARTED in os.environ else LOOK_SECONDS)
        while (held := lock(self.directory / ".lock")) is None and time.monotonic() < until:
            time.sleep(0.1)
        return held

    @property
    def is_held(self) -> bool:
        """Whether a launcher is running."""
        if not (self.directory / ".lock").exists():
            return False
        held = lock(self.directory / ".lock")
        if held is None:
            return True
        held.close()
        return False

    def write(self, status: Status) -> None:
        """Write the status for other commands."""
        write_atomically(self._status_file, json.dumps(dataclasses.asdict(status)).encode())

    def read(self) -> Status:
        """Read the last status that was written.

        Raises:
            InputError: if the status file is missing or damaged.
        """
        if not self._status_file.exists():
            raise InputError(f"{self.directory.parent} contains no launched run")
        try:
            fields = json.loads(read_regular(self._status_file))
            progress = fields.pop("progress")
            status = Status(**fields, progress=None if progress is None else Progress(**progress))
            if not all(isinstance(getattr(status, name), int) for name in NUMBERS):
                raise TypeError
            return status
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(
                f"{self._status_file} is damaged; run the same launch command again to continue the run"
            ) from None

    def ask_to_stop(self) -> None:
        """Ask the launcher to stop the run. The launcher may run on another machine; it polls for the stop file."""
        self._stop_file.touch()

    @property
    def asked_to_stop(self) -> bool:
        """Whether the launcher was asked to stop."""
        try:
            return self._stop_file.exists()
        except OSError:  # network file systems may raise this
            return False

    def attempt_directory(self, attempt: int) -> Path:
        """Return the directory with the logs of an attempt's processes."""
        return self.directory / f"attempt-{attempt:03d}"

    def attempts(self) -> list[Path]:
        """Return the directories of all attempts, oldest first."""
        return sorted(self.directory.glob("attempt-*"))

    def next_attempt(self) -> int:
        """Return the number of the next attempt. Attempts by earlier launchers count too, so their logs are kept."""
        numbers = [0]
        for path in self.attempts():
            with contextlib.suppress(ValueError):
                numbers.append(int(path.name.removeprefix("attempt-")))
        return max(numbers) + 1
