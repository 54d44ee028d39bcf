"""Documents to tokens: in this process, in several, or as Ray tasks; the result is the same."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from types import ModuleType
from typing import Any, Protocol

from sophia_levanter.data.blocks import Encoded, Texts, encode, encode_with, start_worker
from sophia_levanter.data.text_files import optional_import
from sophia_levanter.data.tokenizer import Tokenizer
from sophia_levanter.errors import InputError

# So few blocks are done before other processes have started.
FEW_BLOCKS = 4
CONNECT_SECONDS = 10


class Workers(Protocol):
    """Something that encodes blocks elsewhere."""

    count: int

    def submit(self, texts: Texts) -> Future[Encoded]: ...


class _Processes:
    def __init__(self, pool: ProcessPoolExecutor, count: int, tokenizer: Tokenizer) -> None:
        self.count = count
        self._pool = pool
        self._tokenizer = _address(tokenizer)

    def submit(self, texts: Texts) -> Future[Encoded]:
        return self._pool.submit(encode_with, *self._tokenizer, texts)


class _RayTasks:
    def __init__(self, ray: Any, tokenizer: Tokenizer) -> None:
        # As many as the cluster has cores, which may come and go.
        self.count = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        self._encode = ray.remote(encode_with)
        self._tokenizer = _address(tokenizer)

    def submit(self, texts: Texts) -> Future[Encoded]:
        return self._encode.remote(*self._tokenizer, texts).future()


def _address(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """What another process finds the tokenizer by."""
    return type(tokenizer).__module__, tokenizer.name, tokenizer.fingerprint


@contextmanager
def processes(count: int, tokenizer: Tokenizer) -> Iterator[Workers]:
    """Workers on this machine, one process each, which end with this one however it ends."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang
    # Makes semaphores, and with the first one Python lets SIGINT through again.
    pool = ProcessPoolExecutor(count, context, start_worker)
    with _starting_workers():
        for _ in range(count):  # each task finds no process at leisure, and starts one
            pool.submit(os.getpid)
    try:
        yield _Processes(pool, count, tokenizer)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _starting_workers() -> Iterator[None]:
    """Processes started in here never hear Ctrl-C, which is for this one and reaches it afterwards.

    They do not import this program's script either, which would start to train again where its lines are not under
    `if __name__ == "__main__"`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def ray_tasks(address: str, tokenizer: Tokenizer) -> Iterator[Workers]:
    """Workers on a Ray cluster: tasks of one core each.

    Raises:
        InputError: if Ray is not installed, or there is no cluster at the address.
    """
    # Otherwise a token file that Ray leaves in the home folder would ask for authentication later.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray = optional_import("ray", "'ray>=2.60'", "--ray")
    try:
        if address != "auto":
            # Ray itself would try for a minute, and say so many times.
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--ray {address}: no Ray cluster is there; give HOST:PORT of its head, or start one"
        ) from error
    try:
        yield _RayTasks(ray, tokenizer)
    finally:
        ray.shutdown()


def encode_blocks(
    blocks: Iterable[tuple[Any, Texts]], tokenizer: Tokenizer, workers: Callable[[], Any] | None
) -> Iterator[tuple[Any, Encoded]]:
    """Each block's mark with its tokens, in the order of the blocks.

    Args:
        blocks: a mark and the texts of each. About twice as many as there are workers are in memory at one time.
        tokenizer: what to encode with.
        workers: makes a context of `Workers`; None encodes here. They are not started for a few blocks.

    Raises:
        OSError: if a worker was killed.
    """
    blocks = iter(blocks)
    if workers is not None:
        first = list(islice(blocks, FEW_BLOCKS))
        blocks = chain(first, blocks)
        if len(first) == FEW_BLOCKS:
            with workers() as started:
                yield from _in_order(blocks, started)
            return
    for mark, texts in blocks:
        yield mark, encode(tokenizer, texts)


def _in_order(blocks: Iterator[tuple[Any, Texts]], workers: Workers) -> Iterator[tuple[Any, Encoded]]:
    pending: deque[tuple[Any, Future[Encoded]]] = deque()
    try:
        for mark, texts in blocks:
            pending.append((mark, workers.submit(texts)))
            if len(pending) > 2 * workers.count:
                mark, future = pending.popleft()
                yield mark, future.result()
        for mark, future in pending:
            yield mark, future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a process that makes tokens was killed, perhaps for want of memory; run the command again"
        ) from error
