"""Whole runs through a Slurm job, whose commands are stand-ins: script, launcher and training processes are real."""

import os
import subprocess
import sys

import numpy as np
import pytest
from launched import Launched, losses, training_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def slurm_file(slurm_commands, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    path = tmp_path / "slurm.yaml"
    lines = [
        "backend: slurm",
        "nodes: 2",
        "back_off: 1",
        "stop_timeout: 40",
        "save_before: 90",
        f"python: {sys.executable}",
    ]
    path.write_text("\n".join([*lines, "secrets: [THE_API_KEY]"]))
    return path


def test_a_killed_task(slurm_file, undisturbed, tmp_path):
    secret = "correct-horse-battery"
    with Launched(tmp_path / "run", slurm_file, env={"THE_API_KEY": secret}) as run:
        run.until_step(15)
        killed = training_process(run.run_dir, 1)
        assert killed.environ()["THE_API_KEY"] == secret
        killed.kill()
        assert run.wait() == 0, run.text
    np.testing.assert_allclose(losses(run.run_dir), undisturbed, rtol=0, atol=1e-5)
    status = run.status()
    assert (status["state"], status["attempt"], status["failures"]) == ("done", 2, 1)
    assert run.text.startswith("submitted Slurm job ")
    assert (run.run_dir / "launch" / "attempt-001" / "process-1.log").exists()
    assert not any(secret.encode() in path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file())


def test_stop(slurm_file, tmp_path):
    with Launched(tmp_path / "run", slurm_file, env={"THE_API_KEY": "correct-horse-battery"}) as run:
        run.until_step(5)
        stopped = subprocess.run(
            [sys.executable, "-m", "sophia_levanter.commands.launch", "stop", str(run.run_dir)],
            capture_output=True,
            text=True,
            env=os.environ,
        )
        assert "stopped; 2 processes (slurm); attempt 1; step " in stopped.stdout, stopped
        assert run.wait() == 75, run.text
    assert (
        "stopped: as requested; the run was saved" in (next((run.run_dir / "launch").glob("slurm-*.log"))).read_text()
    )
