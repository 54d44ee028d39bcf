"""The speed of making tokens from text, and batches from tokens: `python tests/benchmarks/data_loading.py TABLE`.

`prepare`: preparing text in two processes beside tiktoken's `encode_ordinary_batch` alone in two threads, in turns.
`memory`: the peak memory of preparing the text once and ten times over. `read`: random batches of 32 sequences of 1,024
tokens from a store on disk, and from one four times as large. All files are written below `--work` and removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import tiktoken
from benchmark_tables import print_table, spread

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data import token_store
from sophia_levanter.data.corpora import prepare
from sophia_levanter.data.documents import Rows
from sophia_levanter.data.encoding import EncodedDocuments
from sophia_levanter.data.sources import source_named
from sophia_levanter.data.store_writer import TokenStoreWriter
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.data.tokenizer import load_tokenizer

# The worker processes of `prepare` import this module again, so it imports jax and grain only where it needs them.

TOKENIZER = "gpt2"
Row = list[object]


def prepare_rows(text: str, work: Path, rounds: int) -> Iterator[Row]:
    """Both ways take turns."""
    config = DataConfig(train=text, validation=text, tokenizer=TOKENIZER, num_workers=2)
    source = source_named(text, "data.train").open(Rows(config, "data.train"), print)
    texts = [document for _, document in source.documents()]
    megabytes = sum(len(document.encode()) for document in texts) / 1e6
    load_tokenizer(TOKENIZER)  # reports a missing file in one line
    encoding = tiktoken.get_encoding(TOKENIZER)
    ratios = []
    for number in range(rounds):
        started = time.perf_counter()
        encoding.encode_ordinary_batch(texts, num_threads=2)
        alone = time.perf_counter() - started
        started = time.perf_counter()
        prepare(replace(config, cache_dir=str(work / f"round{number}")), lambda line: None)
        ours = time.perf_counter() - started
        ratios.append(alone / ours)
        yield [number + 1, f"{megabytes / alone:.1f}", f"{megabytes / ours:.1f}", f"{ratios[-1]:.2f}"]
    yield ["median", "", "", spread(ratios)]


def memory_rows(text: str, work: Path) -> Iterator[Row]:
    """`prepare_data` in a process of its own, together with the processes that it starts."""
    files = [Path(text)] if Path(text).is_absolute() else sorted(Path().glob(text))
    once = 0.0
    for times in (1, 10):
        folder = work / f"times{times}"
        folder.mkdir()
        for number in range(times):
            for file in files:
                shutil.copy(file, folder / f"{number}-{file.name}")
        peak, seconds = _peak_of_preparing(str(folder / "*"), work / f"cache{times}")
        once = once or peak
        yield [times, f"{peak / 2**20:,.0f}", f"{peak / once:.2f}", f"{seconds:.1f}"]


def _peak_of_preparing(text: str, cache_dir: Path) -> tuple[float, float]:
    """The largest sum of the processes' unshared memory in bytes, and the time that preparing took in seconds."""
    config = cache_dir.with_suffix(".yaml")
    config.write_text(f"data:\n  tokenizer: {TOKENIZER}\n  num_workers: 2\n")
    command = [sys.executable, "-m", "sophia_levanter.commands.prepare_data", "--config", str(config)]
    command += ["--data.train", text, "--data.cache_dir", str(cache_dir)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _unshared_memory(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak, time.perf_counter() - started


def _unshared_memory(pid: int) -> float:
    try:
        parent = psutil.Process(pid)
        return sum(process.memory_full_info().uss for process in [parent, *parent.children(recursive=True)])
    except psutil.Error:  # one of them has just ended
        return 0.0


def read_rows(num_tokens: int, work: Path, batches: int) -> Iterator[Row]:
    """Batches from files in the system's cache, and from files that were dropped from it."""
    token_store.IN_MEMORY_BYTES = 0
    smaller: dict[bool, float] = {}
    for size in (num_tokens, 4 * num_tokens):
        store = _store_of(size, work / f"store{size}")
        for cached in (True, False):
            milliseconds = 1e3 * _batch_seconds(store, batches, cached=cached)
            median = float(np.median(milliseconds))
            ratio = median / smaller.setdefault(cached, median)
            yield [f"{size:,}", "cached" if cached else "not cached", spread(milliseconds), f"{ratio:.2f}"]


def _store_of(size: int, path: Path) -> TokenStore:
    """EncodedDocuments of a thousand random tokens each."""
    tokenizer = load_tokenizer(TOKENIZER)
    writer = TokenStoreWriter(path, tokenizer, "random tokens")
    generator = np.random.default_rng(0)
    for _ in range(-(-size // 1_000_000)):
        tokens = generator.integers(0, tokenizer.vocab_size, 1_000_000, dtype=np.uint16)
        writer.append(EncodedDocuments(tokens, np.full(1000, 1000), 1_000_000))
    writer.finish()
    return TokenStore.open(path)


def _batch_seconds(store: TokenStore, batches: int, *, cached: bool) -> np.ndarray:
    """The time of each batch, [batch]."""
    from sophia_levanter.data.batches import TrainBatches

    reader = TrainBatches(store, seq_len=1024, batch_size=32, seed=0)
    if cached:
        for step in range(batches):
            reader[batches + step]
    else:
        for path in (store.path / "tokens").rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    seconds = np.empty(batches)
    for step in range(batches):
        started = time.perf_counter()
        reader[step]
        seconds[step] = time.perf_counter() - started
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("prepare", "memory", "read"))
    parser.add_argument("--text", default="novels-train.jsonl.gz", help="a file or glob of text to prepare")
    parser.add_argument("--tokens", type=int, default=1_000_000_000, help="number of tokens in the smaller store")
    parser.add_argument("--batches", type=int, default=500, help="number of batches to read from each store")
    parser.add_argument("--rounds", type=int, default=5, help="number of times to prepare the text")
    parser.add_argument("--work", type=Path, help="a folder for the files; by default a temporary one")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        if arguments.table == "prepare":
            header = ["round", "encode_ordinary_batch, MB/s", "prepare, MB/s", "beside it"]
            print_table(header, prepare_rows(arguments.text, work, arguments.rounds))
        elif arguments.table == "memory":
            header = ["times the text", "MiB at most", "beside once", "seconds"]
            print_table(header, memory_rows(arguments.text, work))
        else:
            header = ["tokens", "files", "ms a batch of 32 x 1,024", "beside the smaller"]
            print_table(header, read_rows(arguments.tokens, work, arguments.batches))


if __name__ == "__main__":
    main()
