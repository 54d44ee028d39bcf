"""All processes of a run on this machine."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable

from sophia_levanter.cluster.backend import Backend, HostCommand, Job, Say, check_secrets, training_command
from sophia_levanter.cluster.config import LocalCluster


class LocalBackend(Backend):
    """Starts the processes here.

    Args:
        cluster: how many.
    """

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self.num_processes = cluster.processes

    def describe(self, job: Job) -> list[str]:
        """The commands that would run."""
        return ["on this machine, nothing is paid for:", *(command.shown() for command in self._commands(job, 0))]

    def prepare(self, job: Job, attempt: int, say: Say, stopped: Callable[[], bool]) -> None:
        """Checks that secrets are there; the machine is."""
        check_secrets(self._cluster.secrets)

    def commands(self, job: Job, attempt: int) -> list[HostCommand]:
        """One for each process, with a port for them to meet at."""
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
    """A port of this machine that nothing listens at."""
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return port
