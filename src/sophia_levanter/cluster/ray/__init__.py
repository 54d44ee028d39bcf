"""The Ray backend. It does not import Ray: each attempt runs `ray.driver` in a separate process."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from sophia_levanter.cluster.backend import Backend, HostCommand, Job, Say, Unavailable, training_command
from sophia_levanter.cluster.config import RayCluster
from sophia_levanter.errors import InputError, counted

# A file next to an attempt's logs in which the driver lists the ids of preempted nodes.
LOST_NODES = "lost_nodes.json"
CONNECT_SECONDS = 10.0


class RayBackend(Backend):
    """Starts a Ray driver on this machine, which starts the run's processes with Ray Train."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._lost_nodes: set[str] = set()
        self._has_begun = False
        self._lost_file = Path(os.devnull, LOST_NODES)
        self.num_processes = cluster.num_processes

    def describe(self, job: Job) -> list[str]:
        """Describe the command that each worker would run, and the worker's resources."""
        cluster = self._cluster
        mesh = {"coordinator": "WORKER_0:PORT", "num_processes": self.num_processes, "process_id": "N"}
        where = "a Ray cluster started here" if cluster.address == "local" else f"the Ray cluster {cluster.address}"
        if cluster.shape is not None:
            on = f"{counted(cluster.slices, 'whole slice')} of {cluster.shape}"
        else:
            cpus = f"{cluster.cpus_per_worker:g} CPU{'' if cluster.cpus_per_worker == 1 else 's'}"
            on = f"workers with {cpus} and {counted(cluster.gpus_per_worker, 'GPU')} each"
        command = HostCommand("worker", training_command("python", "CONFIG", mesh), cluster.env)
        return [
            f"on {where} (RAY_AUTH_MODE {cluster.auth}): {counted(self.num_processes, 'process')} on {on}",
            f"billed: the nodes that the cluster provides; the launcher waits up to {cluster.start_timeout} s for them",
            f"each process: {command.shown()}",
            f"CONFIG is a copy of {job.config_file}",
        ]

    def prepare(self, job: Job, attempt: int, say: Say, stopped: Callable[[], bool]) -> None:
        """Run the checks that do not require Ray. The driver waits for nodes."""
        if any(importlib.util.find_spec(name) is None for name in ("ray", "pydantic")):
            raise InputError("backend ray requires Ray Train; run pip install 'sophia-levanter[cluster]'")
        self._cluster.check_secrets()
        host, _, port = self._cluster.address.rpartition(":")
        if host and not _answers(host, int(port)):
            problem = f"address {self._cluster.address}: no response"
            raise Unavailable(problem) if self._has_begun else InputError(f"{problem}; start the cluster first")

    def commands(self, job: Job, attempt: int) -> list[HostCommand]:
        """Return a single command, which runs the driver."""
        directory = job.attempt_directory(attempt)
        if self._lost_file.exists():
            self._lost_nodes |= set(json.loads(self._lost_file.read_text()))
        self._lost_file = directory / LOST_NODES
        order = {
            "cluster": {field.name: getattr(self._cluster, field.name) for field in fields(RayCluster)},
            "config": job.config_file.read_text(),
            "has_begun": self._has_begun,
            "lost_nodes": sorted(self._lost_nodes),
            "lost_file": str(self._lost_file),
            "storage": str(job.directory / "ray"),
        }
        self._has_begun = True
        order_file = directory / "ray.json"
        order_file.write_text(json.dumps(order))
        words = [sys.executable, "-u", "-m", "sophia_levanter.cluster.ray.driver", str(order_file)]
        return [HostCommand("ray", words, {"RAY_AUTH_MODE": self._cluster.auth}, labelled=True)]

    def was_preempted(self) -> bool:
        """Return whether nodes were preempted or a process was asked to stop from outside the run."""
        return self._lost_file.exists()


def _answers(host: str, port: int) -> bool:
    """Return whether a port is open. Ray itself would retry for minutes."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=CONNECT_SECONDS).close()
    except (OSError, UnicodeError):  # a host name such as a..b cannot be encoded
        return False
    return True
