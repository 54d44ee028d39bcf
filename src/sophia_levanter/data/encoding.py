"""EncodedDocuments to tokens: in this process, in several, or as Ray tasks; the result is the same.

Imports no more than a process that makes tokens needs, so that it starts at once.
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

# So few blocks are done before other processes have started.
FEW_BLOCKS = 4
CONNECT_SECONDS = 10


@dataclass(frozen=True)
class EncodedDocuments:
    """EncodedDocuments one after the other, as a tokenizer makes them.

    Attributes:
        tokens: [position], in a store's dtype, with an end-of-text after each document.
        lengths: int64 [document], of the tokens.
        num_bytes: of their text in UTF-8, together.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: int


# The texts of a block: of its documents for training, and of those held out.
Texts = tuple[list[str], list[str]]
Encoded = tuple[EncodedDocuments, EncodedDocuments]


def encode(tokenizer: Tokenizer, texts: Texts) -> Encoded:
    """The tokens of a block, an end-of-text after each document."""
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
            "use the same file on every host and do not change it during tokenization"
        )
    return tokenizer


def encode_with(module: str, name: str, fingerprint: str, texts: Texts) -> Encoded:
    """`encode` with the tokenizer of this name, which a process loads once; the module is its class's.

    Raises:
        InputError: if its fingerprint is another one: the file may have changed, or differ between hosts.
    """
    return encode(_tokenizer(module, name, fingerprint), texts)


def _start_worker() -> None:
    """Make a process ready for work, and end it with the one that started it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@dataclass(frozen=True)
class Workers:
    """What encodes blocks elsewhere.

    Attributes:
        count: how many blocks it encodes at the same time.
        submit: begins to encode one.
    """

    count: int
    submit: Callable[[Texts], Future[Encoded]]


def _address(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """What another process finds the tokenizer by."""
    return type(tokenizer).__module__, tokenizer.name, tokenizer.fingerprint


@contextmanager
def processes(count: int, tokenizer: Tokenizer) -> Iterator[Workers]:
    """Workers on this machine, one process each, which end with this one however it ends."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang
    # Makes semaphores, and with the first one Python lets SIGINT through again.
    pool = ProcessPoolExecutor(count, context, _start_worker)
    with _starting_workers():
        for _ in range(count):  # each task finds no process at leisure, and starts one
            pool.submit(os.getpid)
    try:
        yield Workers(count, lambda texts: pool.submit(encode_with, *_address(tokenizer), texts))
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
            f"--ray {address}: no Ray cluster was found; give HOST:PORT of its head, or start one"
        ) from error
    encode_block = partial(ray.remote(encode_with).remote, *_address(tokenizer))
    try:
        # As many as the cluster has cores, which may come and go.
        count = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        yield Workers(count, lambda texts: encode_block(texts).future())
    finally:
        ray.shutdown()


def encode_blocks(
    blocks: Iterable[tuple[Any, Texts]],
    tokenizer: Tokenizer,
    workers: Callable[[], AbstractContextManager[Workers]] | None,
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
        raise OSError("a tokenizing process was killed, perhaps for lack of memory; run the command again") from error
