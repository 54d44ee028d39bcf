"""Encodes documents in this process, in several processes, or in Ray tasks, with identical results.

This module imports only what a worker needs, so that workers start quickly.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import platform
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from types import ModuleType
from typing import Any

import numpy as np

from sophia_levanter.data.text_files import optional_import
from sophia_levanter.data.tokenizer import Tokenizer, load_tokenizer
from sophia_levanter.errors import InputError

# Encoding fewer blocks than this takes less time than starting workers.
FEW_BLOCKS = 4
CONNECT_SECONDS = 10


@dataclass(frozen=True)
class EncodedDocuments:
    """The concatenated tokens of several documents, with an end-of-text token after each document."""

    tokens: np.ndarray  # [position], in the dtype of a token store
    lengths: np.ndarray  # int64 [document], the number of tokens in each document, including end-of-text
    num_bytes: int  # the total size of the documents in UTF-8


# The documents in a block, split into training and held-out documents.
Texts = tuple[list[str], list[str]]
Encoded = tuple[EncodedDocuments, EncodedDocuments]


def encode(tokenizer: Tokenizer, texts: Texts) -> Encoded:
    """Encode a block, with an end-of-text token after each document."""
    train, held_out = texts
    return _documents(tokenizer, train), _documents(tokenizer, held_out)


def _documents(tokenizer: Tokenizer, texts: list[str]) -> EncodedDocuments:
    dtype = tokenizer.dtype
    end = np.array([tokenizer.end_of_text], dtype)
    pieces = [tokenizer.encode(text).astype(dtype) for text in texts]
    lengths = np.array([len(piece) + 1 for piece in pieces], np.int64)
    tokens = np.concatenate([array for piece in pieces for array in (piece, end)]) if pieces else np.empty(0, dtype)
    return EncodedDocuments(tokens, lengths, sum(len(text.encode("utf-8")) for text in texts))


@lru_cache(maxsize=1)
def _tokenizer(module: str, name: str, fingerprint: str) -> Tokenizer:
    importlib.import_module(module)  # registers a plug-in's tokenizer
    tokenizer = load_tokenizer(name)
    if tokenizer.fingerprint != fingerprint:
        raise InputError(
            f"data.tokenizer: {name} differs on worker {platform.node()}; "
            "use the same file on every host, and do not change it during tokenization"
        )
    return tokenizer


def encode_with(module: str, name: str, fingerprint: str, texts: Texts) -> Encoded:
    """Call `encode` with a tokenizer that each process loads once by name. `module` defines the tokenizer's class.

    Raises:
        InputError: if the fingerprint differs because the tokenizer file has changed or differs between hosts.
    """
    return encode(_tokenizer(module, name, fingerprint), texts)


def _start_worker() -> None:
    """Initialize a worker process so that it exits when its parent exits for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@dataclass(frozen=True)
class Workers:
    """Encodes blocks in other processes."""

    count: int  # the number of blocks that are encoded concurrently
    submit: Callable[[Texts], Future[Encoded]]


def _address(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """Return the arguments of `encode_with` that identify the tokenizer."""
    return type(tokenizer).__module__, tokenizer.name, tokenizer.fingerprint


@contextmanager
def processes(count: int, tokenizer: Tokenizer) -> Iterator[Workers]:
    """Start worker processes on this machine. They exit when this process exits for any reason."""
    context = multiprocessing.get_context("spawn")  # forking a process with JAX threads may hang
    # Create the pool before SIGINT is blocked: its first semaphore makes Python start a resource tracker, which
    # unblocks SIGINT.
    pool = ProcessPoolExecutor(count, context, _start_worker)
    with _starting_workers():
        for _ in range(count):  # each task starts a new process, because none is idle
            pool.submit(os.getpid)
    try:
        yield Workers(count, lambda texts: pool.submit(encode_with, *_address(tokenizer), texts))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _starting_workers() -> Iterator[None]:
    """Block Ctrl-C while processes are started, so that they never receive it. This process receives it afterwards.

    Also keep the new processes from importing the main script, because a script without an
    `if __name__ == "__main__"` guard would train again.
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
    """Connect to a Ray cluster that encodes blocks in single-core tasks.

    Raises:
        InputError: if Ray is not installed, or no cluster is running at the address.
    """
    # Disable authentication. Ray would leave a token file in the home folder that enables it in later sessions.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray = optional_import("ray", "'ray>=2.60'", "--ray")
    try:
        if address != "auto":
            # Ray itself would retry for a minute, with many messages.
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--ray {address}: no Ray cluster was found; specify HOST:PORT of the head node, or start a cluster"
        ) from error
    encode_block = partial(ray.remote(encode_with).remote, *_address(tokenizer))
    try:
        # Use one worker per core. The number of cores in the cluster may change later.
        count = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        yield Workers(count, lambda texts: encode_block(texts).future())
    finally:
        ray.shutdown()


def encode_blocks(
    blocks: Iterable[tuple[Any, Texts]],
    tokenizer: Tokenizer,
    workers: Callable[[], AbstractContextManager[Workers]] | None,
) -> Iterator[tuple[Any, Encoded]]:
    """Encode blocks, and yield the (mark, tokens) pair of each block, in order.

    Args:
        blocks: (mark, texts) pairs; each mark is passed through. About two blocks per worker are held in memory.
        tokenizer: the tokenizer.
        workers: returns a context manager for `Workers`, which is not entered if there are only a few blocks. If None,
            this process encodes the blocks.

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
            "a tokenization worker was killed, possibly because it ran out of memory; run the command again"
        ) from error
