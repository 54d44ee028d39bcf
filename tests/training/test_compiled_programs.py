"""Compiled steps are kept from one process for the next."""

import os
import subprocess
import sys


def test_the_next_run_compiles_nothing_and_computes_the_same(config_file, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["JAX_DEBUG_LOG_MODULES"] = "jax._src.compiler"

    def run(name):
        command = [sys.executable, "-m", "sophia_levanter.main", "--config", str(config_file)]
        command += ["--trainer.run_dir", str(tmp_path / name), "--trainer.num_train_steps", "4"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [line.split(', "train/tokens_per_second"')[0] for line in lines]

    hit = "Persistent compilation cache hit for 'jit_train_step'"
    assert hit not in run("first")
    steps = sorted((tmp_path / "cache" / "compiled").glob("jit_train_step-*-cache"))
    assert len(steps) == 2
    assert run("second").count(hit) == 2
    assert losses("second") == losses("first")

    steps[0].write_bytes(steps[0].read_bytes()[:1000])
    damaged = run("third")
    assert damaged.count(hit) == 1
    assert "Error reading persistent compilation cache entry for 'jit_train_step'" in damaged
    assert losses("third") == losses("first")
