"""Launched runs for the tests: real launchers, real training processes, and hands that kill them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tiny_runs import xla_flags

NANO = Path(__file__).parents[2] / "config" / "gpt2_nano_sophia.yaml"
# Some 0.15 s a step on one core: time enough to kill something between two of them.
OPTIONS = [
    *("--config", str(NANO), "--model.scan_unroll", "1", "--mesh.fsdp", "embed", "--trainer.num_train_steps", "40"),
    *("--optimizer.warmup", "5", "--optimizer.interval", "4", "--trainer.checkpoint_every", "10"),
    *("--trainer.batch_size", "8", "--trainer.microbatch_size", "8", "--trainer.log_every", "2"),
    *("--trainer.evaluation_windows", "16", "--trainer.sample_tokens", "0", "--trainer.evaluate_every", "1000"),
]


class Launched:
    """A launcher at work, its output in a file.

    Args:
        run_dir: of the run.
        cluster: the cluster's file.
        options: more of its command line.
        env: more of its environment.
    """

    def __init__(self, run_dir, cluster, *options, env=None, common=OPTIONS):
        self.run_dir = Path(run_dir)
        self.output = Path(f"{run_dir}.log")
        words = [*common, "--cluster", str(cluster), "--trainer.run_dir", str(run_dir), *options]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags()} | (env or {})
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sophia_levanter.commands.launch", *words],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def text(self):
        return self.output.read_text(errors="replace")

    def wait(self, timeout=400):
        """The exit status."""
        return self.process.wait(timeout)

    def until(self, reached, what, timeout=200):
        """Waits for something, which must come while the launcher lives."""
        until = time.monotonic() + timeout
        while not (found := reached()):
            assert self.process.poll() is None, f"ended before {what}: {self.text}"
            assert time.monotonic() < until, f"no {what}: {self.text}"
            time.sleep(0.1)
        return found

    def until_step(self, step):
        """Waits for a step to be done."""
        return self.until(lambda: any(line["step"] >= step for line in metrics(self.run_dir)), f"step {step}")

    def status(self):
        return json.loads((self.run_dir / "launch" / "status.json").read_text())


def metrics(run_dir):
    """The lines of metrics.jsonl; one that is just being written does not count."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(run_dir, first=0):
    """Training losses by step, from the first that there is on; each step once."""
    found = [(line["step"], line["train/loss"]) for line in metrics(run_dir) if "train/loss" in line]
    assert [step for step, _ in found] == list(range(first, first + len(found)))
    return [loss for _, loss in found]


def training_process(run_dir, process_id=None):
    """The training process of a run, of that number if it has several, whichever backend started it."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:4] != ["-u", "-m", "sophia_levanter.main"] or (
            process_id is not None and words[-1] != str(process_id)
        ):
            continue
        with contextlib.suppress(OSError, psutil.Error):
            if str(run_dir) in Path(process.cwd(), words[words.index("--config") + 1]).read_text():
                return process
    return None


def lives(pid):
    """Whether a process is there; one that has ended, and that nobody has asked for its status, is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pid):
    until = time.monotonic() + 30
    while lives(pid):
        assert time.monotonic() < until, "still there"
        time.sleep(0.02)
