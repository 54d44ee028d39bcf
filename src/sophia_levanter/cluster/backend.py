"""The interface of backends, which provide machines and the commands to start processes on them; the local backend."""

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
    """A run, as backends see it.

    Attributes:
        run_dir: the run directory, as given in the configuration.
        directory: the launcher's directory for the run on this machine, RUN_DIR/launch.
    """

    run_dir: Path
    directory: Path

    @property
    def config_file(self) -> Path:
        """The file with the resolved configuration, which the run's processes read."""
        return self.directory / "config.yaml"

    def attempt_directory(self, attempt: int) -> Path:
        return LaunchRecord(self.directory).attempt_directory(attempt)


def training_command(python: str, config_file: str, mesh: Mapping[str, object] | None = None) -> list[str]:
    """The command line for one training process, which starts or continues the run.

    Args:
        python: the Python interpreter.
        config_file: the path of the resolved configuration on the process's host.
        mesh: fields of the mesh section to set: coordinator, num_processes, process_id.
    """
    words = [python, "-u", "-m", "sophia_levanter.main", "--config", config_file, "--resume", "auto"]
    for name, value in (mesh or {}).items():
        words += [f"--mesh.{name}", str(value)]
    return words


@dataclass(frozen=True)
class HostCommand:
    """A process that the launcher starts on its own machine: a training process, or a connection to other hosts.

    Attributes:
        label: the log's name, such as process-0.
        words: the command line.
        env: environment variables on top of the launcher's.
        labelled: whether it prints the output of several processes. Lines from process N begin with "N: ", where N is
            padded to the same width for all processes; other lines come from the command itself.
        by_stdin: whether closing its standard input stops it, as with ssh; otherwise SIGTERM does.
    """

    label: str
    words: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    labelled: bool = False
    by_stdin: bool = False

    def shown(self) -> str:
        """The command as typed in a shell, with the values of `env` masked."""
        return " ".join([*(f"{name}={shlex.quote(MASK)}" for name in self.env), shlex.join(self.words)])


class Unavailable(Exception):
    """An attempt could not begin because machines are missing. The run is not at fault."""


class Backend(Protocol):
    """Starts the processes of a run. The last two methods are for backends whose machines come and go."""

    num_processes: int

    def describe(self, job: Job) -> list[str]:
        """Describe what would be created, run and billed in human-readable lines. Nothing is started."""

    def prepare(self, job: Job, attempt: int, say: Say, stopped: Callable[[], bool]) -> None:
        """Prepare machines for an attempt; return early if the launcher was asked to stop.

        Args:
            job: the run.
            attempt: the attempt's number, from 1.
            say: prints a message.
            stopped: returns whether the launcher was asked to stop.

        Raises:
            InputError: if the resources that the cluster file requests cannot be obtained.
            Unavailable: if machines are lost or do not become available in time.
        """

    def commands(self, job: Job, attempt: int) -> list[HostCommand]:
        """The commands to start for an attempt on the prepared machines.

        Training processes report their progress on standard output if `status.ON_STDOUT` is in their environment.
        Processes on this machine inherit it; on other hosts, the backend sets it.
        """

    def was_preempted(self) -> bool:
        """Whether the last attempt failed because its machines were taken away."""
        return False

    def release(self, say: Say) -> None:
        """Release billed resources after the run has ended."""
        return


class LocalBackend(Backend):
    """Starts the processes on this machine."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self.num_processes = cluster.processes

    def describe(self, job: Job) -> list[str]:
        return ["on this machine (nothing is billed):", *(command.shown() for command in self._commands(job, 0))]

    def prepare(self, job: Job, attempt: int, say: Say, stopped: Callable[[], bool]) -> None:
        """Check the secrets. This machine needs no preparation."""
        self._cluster.check_secrets()

    def commands(self, job: Job, attempt: int) -> list[HostCommand]:
        """One command for each process, with a free port for their coordinator."""
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
    """A free port on this machine."""
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return port
