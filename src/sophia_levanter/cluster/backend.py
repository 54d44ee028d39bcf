"""The backend interface (machines, and the commands that start processes on them), and the local backend."""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sophia_levanter.cluster.config import LocalCluster
from sophia_levanter.cluster.record import LaunchRecord
from sophia_levanter.config.build import MASK

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A run to be started by a backend.

    Attributes:
        run_dir: the run directory, as given in the configuration.
        directory: the launcher's directory for the run on this machine, RUN_DIR/launch.
    """

    run_dir: Path
    directory: Path

    @property
    def config_file(self) -> Path:
        """The file from which the run's processes read the resolved configuration."""
        return self.directory / "config.yaml"

    def attempt_directory(self, attempt: int) -> Path:
        return LaunchRecord(self.directory).attempt_directory(attempt)


def training_command(python: str, config_file: str, mesh: Mapping[str, object] | None = None) -> list[str]:
    """Return the command line for a training process, which starts or resumes the run.

    Args:
        python: the Python interpreter.
        config_file: the path to the resolved configuration on the host of the process.
        mesh: fields to set in the mesh section: coordinator, num_processes and process_id.
    """
    words = [python, "-u", "-m", "sophia_levanter.main", "--config", config_file, "--resume", "auto"]
    for name, value in (mesh or {}).items():
        words += [f"--mesh.{name}", str(value)]
    return words


@dataclass(frozen=True)
class HostCommand:
    """A command that runs on the launcher's own machine: a training process, or a connection to other hosts.

    Attributes:
        label: the log's name, such as process-0.
        words: the command line.
        env: environment variables to add to those of the launcher.
        labelled: whether the command prints the output of several processes. Lines from process N start with "N: ",
            where N is padded to the same width for all processes; other lines come from the command itself.
        by_stdin: whether the command is stopped by closing its standard input, as for ssh, rather than by SIGTERM.
    """

    label: str
    words: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    labelled: bool = False
    by_stdin: bool = False

    def shown(self) -> str:
        """Format the command for a shell, with the values of `env` masked."""
        return " ".join([*(f"{name}={shlex.quote(MASK)}" for name in self.env), shlex.join(self.words)])


class Unavailable(Exception):
    """An attempt could not start because machines are missing. The run is not at fault."""


class Backend(Protocol):
    """Starts the processes of a run. Override the last two methods if machines can be preempted or must be released."""

    num_processes: int

    def describe(self, job: Job) -> list[str]:
        """Describe what would be created, run and billed, as human-readable lines. Nothing is started."""

    def prepare(self, job: Job, attempt: int, say: Say, stopped: Callable[[], bool]) -> None:
        """Prepare machines for an attempt; return early if the launcher was asked to stop.

        Args:
            job: the run.
            attempt: the number of the attempt, starting at 1.
            say: function that prints a message.
            stopped: function that returns whether the launcher was asked to stop.

        Raises:
            InputError: if the resources requested in the cluster file cannot be obtained.
            Unavailable: if machines are lost or do not become available in time.
        """

    def commands(self, job: Job, attempt: int) -> list[HostCommand]:
        """Return the commands that start an attempt on the prepared machines.

        Training processes report their progress on standard output if `status.ON_STDOUT` is in their environment.
        Processes on this machine inherit the variable. On other hosts, the backend sets it.
        """

    def was_preempted(self) -> bool:
        """Return whether the last attempt failed because its machines were preempted."""
        return False

    def release(self, say: Say) -> None:
        """Release billed resources after the run has ended."""
        return


class LocalBackend(Backend):
    """Starts the processes of a run on this machine."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self.num_processes = cluster.processes

    def describe(self, job: Job) -> list[str]:
        return ["on this machine (nothing is billed):", *(command.shown() for command in self._commands(job, 0))]

    def prepare(self, job: Job, attempt: int, say: Say, stopped: Callable[[], bool]) -> None:
        """Check the secrets. This machine needs no preparation."""
        self._cluster.check_secrets()

    def commands(self, job: Job, attempt: int) -> list[HostCommand]:
        """Return one command per process, with a free port for the coordinator."""
        return self._commands(job, free_port())

    def _commands(self, job: Job, port: int) -> list[HostCommand]:
        count = self.num_processes
        commands = []
        for index in range(count):
            mesh = {"coordinator": f"localhost:{port}", "num_processes": count, "process_id": index}
            words = training_command(sys.executable, str(job.config_file), mesh if count > 1 else None)
            commands.append(HostCommand(f"process-{index}", words, self._cluster.env))
        return commands


def free_port() -> int:
    """Return a free port on this machine."""
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return port
