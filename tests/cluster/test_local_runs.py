"""Runs of two real training processes on this machine, and what befalls them."""

import subprocess
import sys

import numpy as np
import pytest
from launched import OPTIONS, Launched, losses, training_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def cluster_file(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("backend: local\nprocesses: 2\nback_off: 1\nstop_timeout: 60\n")
    return path


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process(victim, cluster_file, undisturbed, tmp_path):
    with Launched(tmp_path / "run", cluster_file) as run:
        run.until_step(15)
        training_process(run.run_dir, victim).kill()
        assert run.wait() == 0, run.text
    np.testing.assert_allclose(losses(run.run_dir), undisturbed, rtol=0, atol=1e-5)
    assert f"failed: process-{victim} was killed by SIGKILL; failures 1 of 10, preemptions 0 of 100" in run.text
    assert run.status()["attempt"] == 2


def test_stop_and_the_same_command_again(cluster_file, undisturbed, tmp_path):
    launch = [sys.executable, "-m", "sophia_levanter.commands.launch"]
    with Launched(tmp_path / "run", cluster_file) as run:
        run.until_step(5)
        second = subprocess.run(
            [*launch, *OPTIONS, "--cluster", str(cluster_file), "--trainer.run_dir", str(run.run_dir)],
            capture_output=True,
            text=True,
        )
        assert second.returncode == 2
        assert "is already in use by a launcher; run launch status" in second.stderr
        stopped = subprocess.run([*launch, "stop", str(run.run_dir)], capture_output=True, text=True)
        assert stopped.returncode == 0
        assert "stopped; 2 processes (local); attempt 1; step " in stopped.stdout
        assert run.wait() == 75
    assert "stopped: as requested; the run was saved" in run.text
    with Launched(tmp_path / "run", cluster_file) as again:
        assert again.wait() == 0, again.text
    assert losses(run.run_dir) == pytest.approx(undisturbed, abs=1e-5)
