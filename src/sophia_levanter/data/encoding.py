"""Documents to tokens: in this process, in several, or as Ray tasks; the result is the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np

from sophia_levanter.data.store_writer import Documents, store_dtype
from sophia_levanter.data.text_files import optional_import
from sophia_levanter.data.tokenizer import Tokenizer, load_tokenizer

# So few blocks are done before other processes have started.
FEW_BLOCKS = 4

# The texts of a block: of its documents for training, and of those held out.
Texts = tuple[list[str], list[str]]
Encoded = tuple[Documents, Documents]


class Workers(Protocol):
    """Something that encodes blocks elsewhere."""

    count: int

    def submit(self, texts: Texts) -> Future[Encoded]: ...


class _Processes:
    def __init__(self, pool: ProcessPoolExecutor, count: int, tokenizer: str) -> None:
        self.count = count
        self._pool = pool
        self._tokenizer = tokenizer

    def submit(self, texts: Texts) -> Future[Encoded]:
        return self._pool.submit(_encode_with, self._tokenizer, texts)


class _RayTasks:
    def __init__(self, ray: Any, tokenizer: str) -> None:
        # As many as the cluster has cores, which may come and go.
        self.count = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        self._encode = ray.remote(_encode_with)
        self._tokenizer = tokenizer

    def submit(self, texts: Texts) -> Future[Encoded]:
        return self._encode.remote(self._tokenizer, texts).future()


@contextmanager
def processes(count: int, tokenizer: str) -> Iterator[Workers]:
    """Workers on this machine, one process each, which end with this one however it ends."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang
    pool = ProcessPoolExecutor(count, context, _start_worker)
    try:
        yield _Processes(pool, count, tokenizer)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def ray_tasks(address: str, tokenizer: str) -> Iterator[Workers]:
    """Workers on a Ray cluster: tasks of one core each.

    Raises:
        ConnectionError: if there is no cluster at the address.
    """
    # Otherwise a token file that Ray leaves in the home folder would ask for authentication later.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray = optional_import("ray", "'ray>=2.60'", "--ray")
    ray.init(address=address, log_to_driver=False)
    try:
        yield _RayTasks(ray, tokenizer)
    finally:
        ray.shutdown()


def encode_blocks(
    blocks: Iterable[tuple[Any, Texts]], tokenizer: Tokenizer, workers: Callable[[], Any] | None
) -> Iterator[tuple[Any, Encoded]]:
    """Each block's mark with its tokens, in the order of the blocks.

    Args:
        blocks: a mark and the texts of each. A few more than there are workers are in memory at one time.
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


def encode(tokenizer: Tokenizer, texts: Texts) -> Encoded:
    """The tokens of a block, an end-of-text after each document."""
    train, held_out = texts
    return _documents(tokenizer, train), _documents(tokenizer, held_out)


def _documents(tokenizer: Tokenizer, texts: list[str]) -> Documents:
    dtype = store_dtype(tokenizer)
    end = np.array([tokenizer.end_of_text], dtype)
    pieces = [tokenizer.encode(text).astype(dtype) for text in texts]
    lengths = np.array([len(piece) + 1 for piece in pieces], np.int64)
    tokens = np.concatenate([array for piece in pieces for array in (piece, end)]) if pieces else np.empty(0, dtype)
    return Documents(tokens, lengths, sum(len(text.encode("utf-8")) for text in texts))


@lru_cache(maxsize=1)
def _tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(name)


def _encode_with(tokenizer: str, texts: Texts) -> Encoded:
    return encode(_tokenizer(tokenizer), texts)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
