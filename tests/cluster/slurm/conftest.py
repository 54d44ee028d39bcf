"""A fake Slurm, and a run for it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_slurm
import pytest
from fake_slurm import ODD_NAME

from sophia_levanter.cluster.backend import Job

# Stands where the interpreter does: writes down what it was given, and ends as the file `ends` in RECORD says.
TRAINING = f"""#!{sys.executable}
import json, os, signal, sys, time
from pathlib import Path
record = Path(os.environ["RECORD"])
def told(*_):
    print("saved", flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, told)
task = os.environ["SLURM_PROCID"]
found = dict(words=sys.argv[1:], stdin=sys.stdin.read(), pid=os.getpid())
(record / f"task-{{task}}.json").write_text(json.dumps(found))
print("words", flush=True)
how = (record / "ends").read_text().split()[int(task)]
if how == "hang":
    os.kill(os.getpid(), signal.SIGSTOP)
while how == "never":
    time.sleep(0.05)
if how == "9":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(how))
"""


@pytest.fixture
def slurm_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Slurm's commands on PATH, and the folder that holds their state; no process of theirs stays."""
    fake_slurm.install(tmp_path / "bin")
    for folder in ("fake", "record"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "fake"))
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    yield tmp_path / "fake"
    for file in (tmp_path / "fake").glob("*step-*"):
        for pid in file.read_text().split("\n")[1:]:
            fake_slurm.kill(int(pid))


@pytest.fixture
def allocation(slurm_commands: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As inside a job of two nodes."""
    for name, value in (("ID", "100"), ("NUM_NODES", "2"), ("NODELIST", "127.0.0.[1-2]")):
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    (slurm_commands / "job-100").write_text("RUNNING")
    return slurm_commands


@pytest.fixture
def slurm_run(tmp_path: Path) -> Job:
    run_dir = tmp_path / ODD_NAME
    (run_dir / "launch").mkdir(parents=True)
    return Job(run_dir, run_dir / "launch")


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A stand-in for the interpreter that trains."""
    path = tmp_path / "python with blanks"
    path.write_text(TRAINING)
    path.chmod(0o755)
    return str(path)
