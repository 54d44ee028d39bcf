from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from sophia_levanter.data.bpe import save_bpe
from sophia_levanter.data.encoding import Texts, Workers, encode, encode_blocks, processes, ray_tasks
from sophia_levanter.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from sophia_levanter.errors import InputError


def blocks(count: int) -> Iterator[tuple[int, Texts]]:
    return ((i, ([f"text {i}, naïve", "x" * i], [f"held out {i}"])) for i in range(count))


def test_documents_are_ended_and_counted(tiny_bpe: Tokenizer) -> None:
    train, held_out = encode(tiny_bpe, (["the an", "", "é"], []))
    assert train.tokens.tolist() == [257, 32, 258, 300, 300, 195, 169, 300]
    assert train.lengths.tolist() == [4, 1, 3]
    assert train.num_bytes == 8
    assert train.tokens.dtype == held_out.tokens.dtype == np.uint16
    assert (held_out.tokens.size, held_out.lengths.size, held_out.num_bytes) == (0, 0, 0)


@pytest.mark.parametrize("count", [0, 3, 100])
def test_processes_give_the_same_in_the_same_order_and_few_blocks_are_read_ahead(count: int) -> None:
    read = 0

    def counted() -> Iterator[tuple[int, Texts]]:
        nonlocal read
        for block in blocks(count):
            read += 1
            yield block

    here = list(encode_blocks(blocks(count), ByteTokenizer(), None))
    there = []
    for item in encode_blocks(counted(), ByteTokenizer(), lambda: processes(2, ByteTokenizer())):
        there.append(item)
        assert read <= len(there) + 6
    assert [mark for mark, _ in there] == list(range(count))
    for (_, one), (_, other) in zip(here, there, strict=True):
        for left, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(left.tokens, right.tokens)
            np.testing.assert_array_equal(left.lengths, right.lengths)
            assert left.num_bytes == right.num_bytes


def test_workers_do_not_run_the_script_again(tmp_path: Path) -> None:
    """One whose lines are not under `if __name__ == "__main__"`, as a script that calls `train` may be."""
    script = tmp_path / "script.py"
    script.write_text(
        """
from sophia_levanter.data.encoding import encode_blocks, processes
from sophia_levanter.data.tokenizer import ByteTokenizer

print("begins")
blocks = ((i, (["text"], [])) for i in range(20))
print(len(list(encode_blocks(blocks, ByteTokenizer(), lambda: processes(2, ByteTokenizer())))))
"""
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("begins\n20\n", "")


def test_a_tokenizer_that_changed_makes_no_tokens_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "own.tiktoken"
    ranks = {bytes([value]): value for value in range(256)}
    save_bpe(path, ranks | {b"te": 256})
    tokenizer = load_tokenizer(str(path))
    assert len(list(encode_blocks(blocks(5), tokenizer, lambda: processes(1, tokenizer)))) == 5
    save_bpe(path, ranks | {b"xt": 256})
    with pytest.raises(InputError, match=r"^data\.tokenizer: .*own\.tiktoken differs on worker"):
        list(encode_blocks(blocks(5), tokenizer, lambda: processes(1, tokenizer)))


def test_a_few_blocks_start_no_processes() -> None:
    @contextmanager
    def refuse() -> Iterator[Workers]:
        raise AssertionError("started")
        yield

    assert len(list(encode_blocks(blocks(3), ByteTokenizer(), refuse))) == 3


def test_a_process_that_is_killed_is_named() -> None:
    encoded = encode_blocks(blocks(10_000), ByteTokenizer(), lambda: processes(2, ByteTokenizer()))
    next(encoded)
    for child in psutil.Process().children():
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    with pytest.raises(OSError, match="was killed, possibly because it ran out of memory"):
        list(encoded)


PROGRAM = """
from sophia_levanter.data.encoding import encode_blocks, processes
from sophia_levanter.data.tokenizer import ByteTokenizer
if __name__ == "__main__":
    blocks = ((i, (["text"], [])) for i in range(10**9))
    for mark, _ in encode_blocks(blocks, ByteTokenizer(), lambda: processes(2, ByteTokenizer())):
        if mark == 10:
            print("started", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(tmp_path, number: signal.Signals) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(parent.pid, number)
    parent.wait(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "localhost:port"])
def test_a_ray_cluster_that_is_not_there(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where `auto` looks; other tests start clusters
    with pytest.raises(InputError, match=rf"^--ray {address}: no Ray cluster was found"):
        list(encode_blocks(blocks(10), ByteTokenizer(), lambda: ray_tasks(address, ByteTokenizer())))


@pytest.mark.slow
def test_ray_tasks_give_the_same() -> None:
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        here = list(encode_blocks(blocks(40), ByteTokenizer(), None))
        there = list(encode_blocks(blocks(40), ByteTokenizer(), lambda: ray_tasks(cluster.address, ByteTokenizer())))
        assert [(mark, one.tokens.tolist()) for mark, (one, _) in here] == [
            (mark, one.tokens.tolist()) for mark, (one, _) in there
        ]
    finally:
        cluster.shutdown()
        time.sleep(0.5)
