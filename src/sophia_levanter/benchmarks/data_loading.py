"""How fast text becomes tokens and tokens become batches: `python -m sophia_levanter.benchmarks.data_loading TABLE`.

`prepare`: preparing texts with two processes beside tiktoken's `encode_ordinary_batch` alone with two threads, in
turns. `memory`: the most memory that preparing the texts takes, once and ten times over. `read`: random batches of 32
windows of 1,024 tokens from stores of a size and of four times the size. Folders are made below `--work`, and removed.
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
from pathlib import Path

import numpy as np
import psutil
import tiktoken

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data import token_store
from sophia_levanter.data.blocks import Documents
from sophia_levanter.data.store_writer import TokenStoreWriter
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.data.tokenizer import load_tokenizer

# The processes that make tokens import this module again, as they do the program of a run. What takes long to import,
# jax and grain above all, is therefore imported where it is used, as there.

TOKENIZER = "gpt2"
BATCH_SIZE, SEQ_LEN = 32, 1024
DOCUMENT_TOKENS = 1000
SAMPLE_SECONDS = 0.02

Table = tuple[list[str], Iterator[list[object]]]


def prepare_table(text: str, work: Path, rounds: int) -> Table:
    """Each round both ways."""

    from sophia_levanter.benchmarks.timing import spread
    from sophia_levanter.data.prepare import prepare
    from sophia_levanter.data.sources import open_source

    def rows() -> Iterator[list[object]]:
        config = DataConfig(train=text, validation=text, tokenizer=TOKENIZER, num_workers=2)
        texts = [document for _, document in open_source(text, config, field="data.train", report=print).documents()]
        size = sum(len(document.encode()) for document in texts) / 1e6
        load_tokenizer(TOKENIZER)  # whose complaint is one line
        encoding = tiktoken.get_encoding(TOKENIZER)
        ratios = []
        for number in range(rounds):
            started = time.perf_counter()
            encoding.encode_ordinary_batch(texts, num_threads=2)
            alone = time.perf_counter() - started
            own = DataConfig(
                train=text, validation=text, tokenizer=TOKENIZER, num_workers=2, cache_dir=str(work / f"round{number}")
            )
            started = time.perf_counter()
            prepare(own, lambda line: None)
            ours = time.perf_counter() - started
            ratios.append(alone / ours)
            yield [number + 1, f"{size / alone:.1f}", f"{size / ours:.1f}", f"{ratios[-1]:.2f}"]
        yield ["median", "", "", str(spread(ratios))]

    return ["round", "encode_ordinary_batch, MB/s", "prepare, MB/s", "beside it"], rows()


def memory_table(text: str, work: Path) -> Table:
    """Of `prepare_data` in a process of its own, with the processes that it starts."""

    def rows() -> Iterator[list[object]]:
        files = sorted(Path().glob(text)) if not Path(text).is_absolute() else [Path(text)]
        once = 0.0
        for times in (1, 10):
            folder = work / f"times{times}"
            folder.mkdir(parents=True)
            for number in range(times):
                for file in files:
                    shutil.copy(file, folder / f"{number}-{file.name}")
            peak, seconds = _peak_of_preparing(str(folder / "*"), work / f"cache{times}")
            once = once or peak
            yield [times, f"{peak / 2**20:,.0f}", f"{peak / once:.2f}", f"{seconds:.1f}"]

    return ["times the text", "MiB at most", "beside once", "seconds"], rows()


def _peak_of_preparing(text: str, cache_dir: Path) -> tuple[float, float]:
    """The largest sum of the processes' own memory that was seen, in bytes, and how long it took, in seconds."""
    config = cache_dir.parent / "data.yaml"
    config.write_text(f"data:\n  tokenizer: {TOKENIZER}\n  num_workers: 2\n")
    command = [sys.executable, "-m", "sophia_levanter.commands.prepare_data", "--config", str(config)]
    command += ["--data.train", text, "--data.cache_dir", str(cache_dir)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _own_memory(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak, time.perf_counter() - started


def _own_memory(pid: int) -> float:
    try:
        parent = psutil.Process(pid)
        return sum(process.memory_full_info().uss for process in [parent, *parent.children(recursive=True)])
    except psutil.Error:  # one has ended meanwhile
        return 0.0


def read_table(num_tokens: int, work: Path, batches: int) -> Table:
    """Random batches from disk, the files in the system's cache, and after they were put out of it."""

    from sophia_levanter.benchmarks.timing import spread

    def rows() -> Iterator[list[object]]:
        token_store.IN_MEMORY_BYTES = 0
        first: dict[bool, float] = {}
        for size in (num_tokens, 4 * num_tokens):
            store = _store_of(size, work / f"store{size}")
            for cold in (False, True):
                seconds = _batch_seconds(store, batches, cold=cold)
                median = spread(seconds * 1e3)
                first.setdefault(cold, median.median)
                where = "not cached" if cold else "cached"
                yield [f"{size:,}", where, str(median), f"{median.median / first[cold]:.2f}"]

    return ["tokens", "files", "ms a batch of 32 x 1,024", "beside the smaller"], rows()


def _store_of(size: int, path: Path) -> TokenStore:
    tokenizer = load_tokenizer(TOKENIZER)
    writer = TokenStoreWriter(path, tokenizer, "random tokens")
    generator = np.random.default_rng(0)
    block = 1000 * DOCUMENT_TOKENS
    for _ in range(-(-size // block)):
        tokens = generator.integers(0, tokenizer.vocab_size, block, dtype=np.uint16)
        writer.append(Documents(tokens, np.full(1000, DOCUMENT_TOKENS), block))
    writer.finish()
    return TokenStore.open(path)


def _batch_seconds(store: TokenStore, batches: int, *, cold: bool) -> np.ndarray:
    """Seconds of each batch, [batch]."""
    from sophia_levanter.data.batches import TrainBatches

    reader = TrainBatches(store, seq_len=SEQ_LEN, batch_size=BATCH_SIZE, seed=0)
    if cold:
        for path in (store.path / "tokens").rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        for step in range(batches):
            reader[batches + step]
    seconds = []
    for step in range(batches):
        started = time.perf_counter()
        reader[step]
        seconds.append(time.perf_counter() - started)
    return np.array(seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table, in Markdown."""
    from sophia_levanter.benchmarks.timing import markdown_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("prepare", "memory", "read"))
    parser.add_argument("--text", default="novels-train.jsonl.gz", help="a file or glob of text to prepare")
    parser.add_argument("--tokens", type=int, default=1_000_000_000, help="in the smaller store that is read")
    parser.add_argument("--batches", type=int, default=500, help="that are read from each store")
    parser.add_argument("--rounds", type=int, default=5, help="of preparing")
    parser.add_argument("--work", type=Path, help="a folder for what is made; a temporary one if not given")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        tables = {
            "prepare": lambda: prepare_table(arguments.text, work, arguments.rounds),
            "memory": lambda: memory_table(arguments.text, work),
            "read": lambda: read_table(arguments.tokens, work, arguments.batches),
        }
        header, rows = tables[arguments.table]()
        print(markdown_table(header, []), flush=True)
        for row in rows:
            print(markdown_table([str(cell) for cell in row], []).splitlines()[0], flush=True)


if __name__ == "__main__":
    main()
