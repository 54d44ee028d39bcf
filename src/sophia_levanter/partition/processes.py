"""Connecting the processes of a run, usually one per host, and exchanging messages between them.

`Processes` sends messages through jax's coordination service, from any thread and always with a timeout. Busy or hung
devices do not delay messages.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Timer
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.errors import InputError
from sophia_levanter.status import FAILURE

# Extra seconds before the timeout in jaxlib, so that the timeout in this module takes effect first.
JAXLIB_MARGIN = 60


def start_processes(config: MeshConfig) -> None:
    """Connect to the other processes of the run, if any. Call this function before anything else uses jax.

    If the processes do not connect within `mesh.start_timeout` seconds, print one line and exit with status 1.

    Raises:
        InputError: if no cluster environment is detected, or the number of processes is not `mesh.num_processes`.
    """
    if config.coordinator is None or jax.distributed.is_initialized():
        return
    auto = config.coordinator == "auto"
    try:
        with _ending_after(config):
            jax.distributed.initialize(
                None if auto else config.coordinator,
                config.num_processes,
                config.process_id,
                # If jax detected Slurm, it would give each process one GPU despite the other arguments.
                cluster_detection_method=None if auto else "deactivate",
                initialization_timeout=config.start_timeout + JAXLIB_MARGIN,
                heartbeat_timeout_seconds=config.heartbeat_timeout,
            )
    except (RuntimeError, ValueError) as error:
        if auto:
            raise InputError(
                f"mesh.coordinator is auto, but no cluster environment was detected: {_first_line(error)}; "
                "specify HOST:PORT, mesh.num_processes and mesh.process_id"
            ) from None
        raise InputError(f"mesh.coordinator {config.coordinator}: {_first_line(error)}") from None
    if config.num_processes is not None and jax.process_count() != config.num_processes:
        raise InputError(
            f"mesh.num_processes is {config.num_processes}, but JAX found {jax.process_count()} processes; "
            "run one process per host, or one per device"
        )


@contextmanager
def _ending_after(config: MeshConfig) -> Iterator[None]:
    """Exit if the block takes longer than `mesh.start_timeout`. jaxlib itself would abort with a stack trace."""

    def end() -> None:
        expected = "" if config.num_processes is None else f"{config.num_processes} "
        print(
            f"error: mesh.coordinator {config.coordinator}: the {expected}processes did not all connect within "
            f"{config.start_timeout} s (mesh.start_timeout); run the same command on every host",
            file=sys.stderr,
            flush=True,
        )
        os._exit(FAILURE)

    timer = Timer(config.start_timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def all_devices() -> list[jax.Device]:
    """Return the devices of all processes.

    Raises:
        InputError: if jax cannot start the selected platform.
    """
    try:
        return jax.devices()
    except RuntimeError as error:
        raise InputError(f"JAX found no devices: {_first_line(error)}") from error


def check_agreement(what: str, text: str) -> None:
    """Raise an InputError that names `what` on every process if `text` differs between processes.

    All processes must call this function together.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint32)
    everywhere = multihost_utils.process_allgather(digest)
    if (everywhere != everywhere[0]).any():
        raise InputError(f"{what} differs between processes; run the same command on every host")


def wait_for_all(name: str) -> None:
    """Block until every process has called this function."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_stop(step: int, signalled: bool) -> bool:
    """Return whether all processes should stop before this step because one of them received a signal."""
    if jax.process_count() == 1:
        return signalled
    return bool(multihost_utils.reached_preemption_sync_point(step))


# Seconds to wait for other processes, in addition to the time that this process spent on the same work.
PATIENCE = 120.0


class NoAnswer(Exception):
    """Raised if a process does not answer in time. The message is one line that names the process by its index."""


# The same processes may train several times, and the service keeps the messages of earlier runs.
_runs = itertools.count()


@dataclass(frozen=True)
class Processes:
    """The processes in a run. Each message in a run has a unique name, which is the same on all processes.

    Attributes:
        index: the index of this process, from 0.
        count: the number of processes.
        run: the number of the run, which keeps its messages apart from those of other runs.
    """

    index: int = 0
    count: int = 1
    run: int = field(default=0, kw_only=True)

    @staticmethod
    def of_this_run() -> Processes:
        """Return the processes of a new run. All processes must call this function equally often."""
        return Processes(jax.process_index(), jax.process_count(), run=next(_runs))

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def gather(self, name: str, text: str, timeout: float) -> list[str]:
        """Gather one string per process on the first process. The others return an empty list without waiting.

        Raises:
            NoAnswer: if a string does not arrive within `timeout` seconds.
        """
        if self.is_first:
            return [text, *(self._receive(f"{name}/{i}", i, timeout) for i in range(1, self.count))]
        self._send(f"{name}/{self.index}", text)
        return []

    def broadcast(self, name: str, text: str | None, timeout: float) -> str:
        """Return the first process's `text` on all processes. The `text` of the other processes is ignored.

        Raises:
            NoAnswer: if the text does not arrive within `timeout` seconds.
        """
        if not self.is_first:
            return self._receive(name, 0, timeout)
        assert text is not None
        if self.count > 1:
            self._send(name, text)
        return text

    def first_failure(self, name: str, failure: str | None, timeout: float) -> str | None:
        """Return, on every process, the failure of the lowest-numbered process that failed, or None if none failed."""
        failures = [text for text in self.gather(f"{name}/failures", failure or "", timeout) if text]
        return self.broadcast(f"{name}/failure", failures[0] if failures else "", timeout) or None

    def on_process_zero(self, name: str, work: Callable[[], None]) -> None:
        """Call `work` on process zero only. If it raises an `InputError`, all processes raise it."""
        raised = None
        if self.is_first:
            try:
                work()
            except InputError as error:
                raised = error
        if failure := self.first_failure(name, str(raised) if raised else None, PATIENCE):
            raise raised or InputError(failure)

    def forget(self, name: str) -> None:
        """Delete all messages under a name, on the first process only. All processes must have read the messages."""
        if self.is_first and self.count > 1:
            _client().key_value_delete(f"{self._key(name)}/")

    def _key(self, name: str) -> str:
        return f"sophia_levanter/{self.run}/{name}"

    def _send(self, name: str, text: str) -> None:
        # The service rejects empty strings.
        _client().key_value_set(self._key(name), f"={text}")

    def _receive(self, name: str, process: int, timeout: float) -> str:
        try:
            return _client().blocking_key_value_get(self._key(name), int(timeout * 1000))[1:]
        except Exception as error:  # jaxlib raises several kinds of errors
            what = "DEADLINE_EXCEEDED" in str(error) and f"did not respond within {timeout:.0f} s"
            raise NoAnswer(f"process {process} {what or f'is unreachable: {str(error).splitlines()[0]}'}") from error


def _client() -> Any:
    return distributed.global_state.client
