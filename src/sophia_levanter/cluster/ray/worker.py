"""The code that runs in each Ray Train worker: start the training process, read its output and tell it when to stop.

Training runs in a separate process, not in the worker, so that the program is the same as on other backends. Its
heartbeat timeout in jax is 20 s (Ray's JaxConfig leaves it at 100 s), and it stops on SIGTERM.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.train import get_context, get_preemption_info
from ray.train.collective import broadcast_from_rank_zero
from ray.util.tpu import get_tpu_coordinator_env_vars

from sophia_levanter.cluster.backend import free_port, training_command
from sophia_levanter.cluster.host import kill_group, start_process
from sophia_levanter.status import DONE, FAILURE, PREEMPTED

POLL_SECONDS = 0.5
BARRIER_SECONDS = 15.0


class ProcessFailed(Exception):
    """A worker's training process failed."""


class Board:
    """An actor on the driver's machine. Workers post output and exit statuses to it and read instructions from it.

    Ray's own facilities are insufficient: `log_to_driver` merges identical lines from different workers, and
    `ray.train.report` is a barrier at which a worker would wait for dead peers.

    Args:
        num_processes: number of processes in the run.
    """

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._lines: list[tuple[int, str]] = []
        self._statuses: dict[int, int] = {}
        self._lost_nodes: set[str] = set()
        self._stop = False
        self._hosts = 0

    def arrive(self) -> None:
        """Record that a worker has started its process."""
        self._hosts += 1

    def report(self, rank: int, lines: list[str], status: int | None, lost_nodes: list[str]) -> None:
        """Post a worker's new output and status.

        Args:
            rank: the worker's rank.
            lines: new output lines from its process.
            status: the process's exit status, once it has ended.
            lost_nodes: ids of nodes that will be preempted, according to Ray.
        """
        self._lines += [(rank, line) for line in lines]
        self._lost_nodes |= set(lost_nodes)
        if status is not None:
            self._statuses[rank] = status

    def verdict(self) -> str:
        """Return an instruction for workers: go on, stop (save and exit) or finish (all processes have exited)."""
        if len(self._statuses) == self._num_processes:
            return "finish"
        return "stop" if self._stop or self._lost_nodes else "go on"

    def stop(self) -> None:
        """Tell the processes to save and exit."""
        self._stop = True

    def take(self) -> dict[str, Any]:
        """Return new lines, all exit statuses, lost nodes and the number of hosts so far. The driver calls this."""
        lines, self._lines = self._lines, []
        return {
            "lines": lines,
            "statuses": dict(self._statuses),
            "lost_nodes": sorted(self._lost_nodes),
            "hosts": self._hosts,
        }


def run_host(order: dict[str, Any]) -> None:
    """Run the training process in a Ray Train worker. All workers call Ray's collectives the same number of times.

    Args:
        order: a dict with config (the run's configuration as YAML), env, secrets (a list containing a reference to
            their values), board and slices.

    Raises:
        ProcessFailed: if the training process exits with a status other than `DONE` or `PREEMPTED`.
    """
    rank, count = get_context().get_world_rank(), get_context().get_world_size()
    address = f"{ray.util.get_node_ip_address()}:{free_port()}" if rank == 0 else None
    coordinator = broadcast_from_rank_zero(address)
    environment = order["env"] | ray.get(order["secrets"][0])
    if order["slices"] > 1:
        slice_id = rank // (count // order["slices"])
        host = coordinator.rpartition(":")[0]
        environment |= get_tpu_coordinator_env_vars(host, order["slices"], slice_id)
    with tempfile.TemporaryDirectory() as directory:
        config_file = Path(directory, "config.yaml")
        config_file.write_text(order["config"])
        mesh = {"coordinator": coordinator, "num_processes": count, "process_id": rank}
        words = training_command(sys.executable, str(config_file), mesh if count > 1 else None)
        process = start_process(words, environment)
        attended = threading.Event()
        threading.Thread(target=_end_with, args=(process, attended), daemon=True).start()
        try:
            _attend(process, rank, order["board"])
        finally:
            attended.set()
            kill_group(process.pid)
            process.wait()


def _end_with(process: subprocess.Popen[bytes], attended: threading.Event) -> None:
    """Exit this worker if its process has failed while the worker is still waiting for workers on lost nodes."""
    if process.wait() not in (DONE, PREEMPTED) and not attended.wait(BARRIER_SECONDS):
        os._exit(FAILURE)


def _attend(process: subprocess.Popen[bytes], rank: int, board: Any) -> None:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    ray.get(board.arrive.remote())
    told = False
    lost_nodes: list[str] = []
    while True:
        status = process.poll()
        if status is not None:
            reader.join(timeout=5)
        ray.get(board.report.remote(rank, _drained(lines), status, lost_nodes))
        if status not in (None, DONE, PREEMPTED):
            raise ProcessFailed(f"process {rank} exited with status {status}")
        verdict = broadcast_from_rank_zero(ray.get(board.verdict.remote()) if rank == 0 else None)
        preemption = get_preemption_info()
        lost_nodes = [] if preemption is None else preemption.preempted_node_ids
        if verdict == "finish":
            return
        if verdict == "stop" and not told:
            told = True
            process.send_signal(signal.SIGTERM)
        time.sleep(POLL_SECONDS)


def _read(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for raw in process.stdout:
        lines.put(raw.decode(errors="replace").rstrip("\r\n"))


def _drained(lines: queue.SimpleQueue[str]) -> list[str]:
    drained = []
    while True:
        try:
            drained.append(lines.get_nowait())
        except queue.Empty:
            return drained
