"""Programs that are killed at work, each in a process of its own.

Such a process is forked from a server that has imported what the programs need, so it starts in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["sophia_levanter.checkpoint", "sophia_levanter.data.corpora"])


class Fork:
    """A function at work in another process.

    Args:
        function: its last argument is a connection on which it sends objects to this process.
        arguments: the others.
    """

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._receiving, sending = SERVER.Pipe(duplex=False)
        self._process = SERVER.Process(target=function, args=(*arguments, sending))
        self._process.start()
        sending.close()

    def receive(self) -> Any:
        return self._receiving.recv()

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> tuple[int | None, list[Any]]:
        """Waits for its end, and gives its exit status and what it sent and nobody received."""
        sent: list[Any] = []
        with suppress(EOFError, OSError):
            while True:
                sent.append(self.receive())
        self._process.join()
        return self._process.exitcode, sent


def prepare(text: str, cache_dir: str, fields: dict[str, Any], sending: Connection) -> None:
    """Prepares a text, and sends each line of the report after a first one."""
    from sophia_levanter.config.data import DataConfig
    from sophia_levanter.data import corpora

    sending.send("begins")
    corpora.prepare(DataConfig(train=text, cache_dir=cache_dir, **fields), sending.send)


def prepare_and_die(text: str, cache_dir: str, fields: dict[str, Any], documents: int, sending: Connection) -> None:
    """The same in small pieces, killed when so many documents were read."""
    from sophia_levanter.data import preparation, store_writer
    from sophia_levanter.data.file_source import FileSource

    read = FileSource.documents

    def dying(self: FileSource, *start: tuple[int, int]) -> Any:
        for number, item in enumerate(read(self, *start)):
            if number == documents:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    FileSource.documents = dying  # type: ignore[method-assign]
    preparation.BLOCK_CHARACTERS = 100
    store_writer.SHARD_TOKENS, store_writer.CHUNK_TOKENS = 256, 64
    store_writer.SHARD_DOCUMENTS, store_writer.CHUNK_DOCUMENTS = 8, 4
    prepare(text, cache_dir, {"validation_fraction": 0.2, **fields}, sending)


def build_half_and_die(target: Path, sending: Connection) -> None:
    from sophia_levanter.data.preparation import build_directory

    def build(directory: Path) -> Path:
        (directory / "half").write_text("killed")
        os.kill(os.getpid(), signal.SIGKILL)
        return target

    build_directory(target, find=lambda: None, build=build, report=sending.send)


def save_for_ever(directory: Path, damaging: bool, sending: Connection) -> None:
    """Saves one step after another and sends the number of each; `damaging` damages and saves each once more."""
    import numpy as np

    from sophia_levanter.checkpoint import Retention, Saver, steps

    saver = Saver(directory, run_id="r")

    def save(step: int, value: int) -> None:
        tree = {str(i): np.full((64, 64), value) for i in range(20)}
        saver.save(step, tree, metadata={}, retention=Retention(9 if damaging else 2))
        saver.wait()

    step = max(steps(directory), default=0)
    while True:
        step += 1
        save(step, step)
        sending.send(step)
        if damaging:
            next(directory.glob(f"step-{step:08d}/arrays/*-7/c.*")).write_bytes(b"")
            save(step, -step)


def save_50_times(directory: Path, sending: Connection) -> None:
    """Sends how many bytes the process has after a few saves and after all of them."""
    import numpy as np
    import psutil

    from sophia_levanter.checkpoint import Retention, Saver

    saver = Saver(directory, run_id="r")
    tree = {str(i): np.ones((4, 2**17), np.float32) for i in range(4)}
    for step in range(50):
        saver.save(step, tree, metadata={}, retention=Retention(2))
        if step in (5, 49):
            saver.wait()
            sending.send(psutil.Process().memory_info().rss)


def kill_at_random(text: str, tokenizer: str, kills: int, work: Path, seed: int) -> list[float]:
    """Prepares a text undisturbed, and again with `kills` kills that hit it at work.

    Returns:
        Seconds from the beginning of each killed preparation to its end.

    Raises:
        AssertionError: if the stores are not the same.
    """

    def start(cache_dir: str) -> Fork:
        fork = Fork(prepare, text, str(work / cache_dir), {"tokenizer": tokenizer, "num_workers": 2})
        fork.receive()
        return fork

    rng = random.Random(seed)
    whole = start("whole")
    started = time.perf_counter()
    assert whole.end()[0] == 0
    longest = time.perf_counter() - started
    expected = content(work / "whole")
    moments: list[float] = []
    attempt = 0
    while len(moments) < kills:
        fork = start(f"killed{attempt}")
        moment = rng.uniform(0, longest)
        time.sleep(moment)
        fork.kill()
        if fork.end()[0] == 0:  # it was done before: the next kills are of a new one
            assert content(work / f"killed{attempt}") == expected
            attempt += 1
        else:
            moments.append(moment)
    assert start(f"killed{attempt}").end()[0] == 0
    assert content(work / f"killed{attempt}") == expected
    return moments


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
