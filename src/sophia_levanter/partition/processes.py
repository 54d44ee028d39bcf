"""A run of several processes, one on each host: how they find each other, and what only the first of them does."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

import jax
import numpy as np
from jax.experimental import multihost_utils

from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.errors import InputError
from sophia_levanter.status import FAILURE

# Seconds that jaxlib waits longer than this module does.
JAXLIB_MARGIN = 60


def start_processes(config: MeshConfig) -> None:
    """Wait for the other processes of the run, if it has any. Before anything else uses jax.

    Ends the process with status 1 and one line if they do not come within `mesh.start_timeout`.

    Raises:
        InputError: if no cluster says who they are, or they are not as many as they should be.
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
                # Where jax finds Slurm it would give each process one GPU, although all else is said.
                cluster_detection_method=None if auto else "deactivate",
                initialization_timeout=config.start_timeout + JAXLIB_MARGIN,
                heartbeat_timeout_seconds=config.heartbeat_timeout,
            )
    except (RuntimeError, ValueError) as error:
        if auto:
            raise InputError(
                f"mesh.coordinator is auto, and no cluster says who belongs to the run: {_first_line(error)}; "
                "give HOST:PORT with mesh.num_processes and mesh.process_id"
            ) from None
        raise InputError(f"mesh.coordinator {config.coordinator}: {_first_line(error)}") from None
    if config.num_processes is not None and jax.process_count() != config.num_processes:
        raise InputError(
            f"mesh.num_processes is {config.num_processes}, and jax found {jax.process_count()}; "
            "each host may run one process, or one for each of its devices"
        )


@contextmanager
def _ending_after(config: MeshConfig) -> Iterator[None]:
    """Ends the process if the block takes longer than `mesh.start_timeout`: jaxlib would abort with a stack trace."""

    def end() -> None:
        expected = "" if config.num_processes is None else f"{config.num_processes} "
        print(
            f"error: mesh.coordinator {config.coordinator}: the {expected}processes of the run did not all come within "
            f"{config.start_timeout} s (mesh.start_timeout); start the same command on every host",
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
    """The devices of all processes.

    Raises:
        InputError: if jax cannot start the platform it is told to use.
    """
    try:
        return jax.devices()
    except RuntimeError as error:
        raise InputError(f"jax finds no devices: {_first_line(error)}") from error


def is_first_process() -> bool:
    """Whether this one writes files and talks to people.

    Raises:
        InputError: if jax cannot start the platform it is told to use.
    """
    all_devices()
    return jax.process_index() == 0


def check_agreement(what: str, text: str) -> None:
    """All processes call it together, with the same text if they are of one run.

    Args:
        what: the text is, for the message.
        text: anything that must be the same everywhere.

    Raises:
        InputError: in every process, if the texts differ.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint32)
    everywhere = multihost_utils.process_allgather(digest)
    if (everywhere != everywhere[0]).any():
        raise InputError(f"{what} is not the same in all processes of the run; start the same command on every host")


def wait_for_all(name: str) -> None:
    """Return when every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_stop(step: int, signalled: bool) -> bool:
    """Whether every process is to stop before this step: one was signalled, and all agree on the step."""
    if jax.process_count() == 1:
        return signalled
    return bool(multihost_utils.reached_preemption_sync_point(step))
