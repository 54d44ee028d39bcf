"""Kill -9 at random moments of preparing a text: python tests/data/kill_preparing.py --text FILE --kills 20.

Each time the same command goes on; the finished store must be, byte for byte, the one that was never disturbed.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def kill_at_random(text: str, tokenizer: str, kills: int, work: Path, seed: int) -> list[float]:
    """Prepares a text undisturbed, and again with `kills` kills that hit it at work.

    Returns:
        Seconds from each killed process's start to its end.

    Raises:
        AssertionError: if the stores are not the same.
    """
    rng = random.Random(seed)
    work.joinpath("data.yaml").write_text(f"data:\n  tokenizer: {tokenizer}\n  num_workers: 2\n")
    started = time.perf_counter()
    assert _start(text, work, "whole").wait() == 0
    longest = time.perf_counter() - started
    expected = content(work / "whole")
    moments: list[float] = []
    attempt = 0
    while len(moments) < kills:
        process = _start(text, work, f"killed{attempt}")
        moment = rng.uniform(0, longest)
        time.sleep(moment)
        process.kill()
        if process.wait() == 0:  # it was done before: the next kills are of a new one
            assert content(work / f"killed{attempt}") == expected
            attempt += 1
        else:
            moments.append(moment)
    assert _start(text, work, f"killed{attempt}").wait() == 0
    assert content(work / f"killed{attempt}") == expected
    return moments


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _start(text: str, work: Path, cache_dir: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sophia_levanter.commands.prepare_data", "--config", str(work / "data.yaml")]
    command += ["--data.train", text, "--data.cache_dir", str(work / cache_dir)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        moments = kill_at_random(arguments.text, arguments.tokenizer, arguments.kills, Path(work), arguments.seed)
    print(f"killed {len(moments)} times, after {', '.join(f'{moment:.1f}' for moment in moments)} s: the same store")


if __name__ == "__main__":
    main()
