"""Attempts inside a Slurm job, against stand-ins for Slurm's commands."""

import os
import subprocess
import sys
from pathlib import Path

import fake_slurm
import pytest
from fake_slurm import tasks

from sophia_levanter.cluster import slurm
from sophia_levanter.cluster.backend import Job, Unavailable
from sophia_levanter.cluster.config import SlurmCluster
from sophia_levanter.cluster.slurm import SlurmBackend
from sophia_levanter.errors import InputError


def attempt(backend: SlurmBackend, slurm_run: Job) -> subprocess.Popen[str]:
    backend.prepare(slurm_run, 1, lambda line: None, lambda: False)
    (command,) = backend.commands(slurm_run, 1)
    pipe = subprocess.PIPE
    return subprocess.Popen(command.words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def output_of(process: subprocess.Popen[str]) -> str:
    """All of it, the input left open: its end would tell the tasks to stop."""
    output = process.stdout.read()
    process.wait()
    return output


def test_words_arrive_unchanged_at_every_task(allocation: Path, slurm_run: Job, python: str, tmp_path: Path):
    (tmp_path / "record" / "ends").write_text("0 0")
    process = attempt(SlurmBackend(SlurmCluster(nodes=2, python=python)), slurm_run)
    output = output_of(process)
    assert process.returncode == 0
    assert sorted(output.splitlines()) == ["0: words", "1: words"]
    for number, task in enumerate(tasks(tmp_path)):
        assert task["stdin"] == ""
        assert task["words"] == [
            *(
                "-u",
                "-m",
                "sophia_levanter.main",
                "--config",
                str(slurm_run.directory / "config.yaml"),
                "--resume",
                "auto",
            ),
            *("--mesh.coordinator", f"127.0.0.1:{slurm._port(1)}", "--mesh.num_processes", "2"),
            *("--mesh.process_id", str(number)),
        ]
    assert not list(tmp_path.rglob("no"))


def test_one_node_has_no_mesh(
    allocation: Path, slurm_run: Job, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "127.0.0.1")
    (tmp_path / "record" / "ends").write_text("0")
    process = attempt(SlurmBackend(SlurmCluster(python=python)), slurm_run)
    output_of(process)
    assert process.returncode == 0
    assert tasks(tmp_path, 1)[0]["words"][-2:] == ["--resume", "auto"]


def test_what_srun_is_asked_for(slurm_run: Job):
    (command,) = SlurmBackend(SlurmCluster(nodes=2, gpus_per_node=8, cpus_per_node=96, stop_timeout=90)).commands(
        slurm_run, 1
    )
    options = command.words[: command.words.index("bash")]
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--gpus-per-node=8"} < set(options)
    assert {"--cpus-per-task=96", "--label", "--wait=90", "--export=ALL"} < set(options)
    assert command.labelled and command.by_stdin


def test_ports_differ(allocation: Path, monkeypatch: pytest.MonkeyPatch):
    ports = set()
    for number in ("100", "101", "4000000"):
        monkeypatch.setenv("SLURM_JOB_ID", number)
        ports |= {slurm._port(attempt) for attempt in range(1, 101)}
    assert len(ports) == 300
    assert min(ports) >= 1024 and max(ports) < 32768


def test_end_of_input_saves_in_every_task(allocation: Path, slurm_run: Job, python: str, tmp_path: Path):
    (tmp_path / "record" / "ends").write_text("never never")
    process = attempt(SlurmBackend(SlurmCluster(nodes=2, python=python)), slurm_run)
    tasks(tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 75
    # Both tasks write into one pipe, and their lines may be mixed.
    assert output.count("saved") == 2, output


@pytest.mark.parametrize(("ends", "status"), [("0 3", 3), ("2 2", 2), ("1 9", 137), ("75 75", 75)])
def test_status_is_the_highest(allocation: Path, slurm_run: Job, python: str, tmp_path: Path, ends: str, status: int):
    (tmp_path / "record" / "ends").write_text(ends)
    process = attempt(SlurmBackend(SlurmCluster(nodes=2, python=python)), slurm_run)
    output_of(process)
    assert process.returncode == status


def test_stuck_peer_of_a_dead_task_is_ended(allocation: Path, slurm_run: Job, python: str, tmp_path: Path):
    (tmp_path / "record" / "ends").write_text("9 hang")
    process = attempt(SlurmBackend(SlurmCluster(nodes=2, python=python, stop_timeout=1)), slurm_run)
    process.wait(timeout=60)
    assert process.returncode == 137
    assert not any(fake_slurm.alive(task["pid"]) for task in tasks(tmp_path))


def test_tasks_of_a_killed_srun_are_gone_before_the_next_attempt(
    allocation: Path, slurm_run: Job, python: str, tmp_path: Path
):
    (tmp_path / "record" / "ends").write_text("hang hang")
    backend = SlurmBackend(SlurmCluster(nodes=2, python=python))
    process = attempt(backend, slurm_run)
    pids = [task["pid"] for task in tasks(tmp_path)]
    process.kill()
    process.wait()
    assert all(fake_slurm.alive(pid) for pid in pids)
    said: list[str] = []
    backend.prepare(slurm_run, 2, said.append, lambda: False)
    assert not any(fake_slurm.alive(pid) for pid in pids)
    assert said == ["killing processes left over from an earlier attempt"]


def test_a_persons_step_is_left_alone(allocation: Path, slurm_run: Job):
    looking = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (allocation / "step-100.0").write_text(f"bash\n{looking.pid}")
    SlurmBackend(SlurmCluster(nodes=2)).prepare(slurm_run, 1, lambda line: None, lambda: False)
    assert looking.poll() is None
    looking.kill()
    looking.wait()


def test_tasks_that_cannot_be_ended(allocation: Path, slurm_run: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm, "LEFTOVERS_TIMEOUT", 0)
    (allocation / "step-100.0").write_text(f"{slurm.STEP}\n{os.getpid()}")
    with pytest.raises(Unavailable, match=r"Slurm steps 100\.0"):
        SlurmBackend(SlurmCluster(nodes=2)).prepare(slurm_run, 1, lambda line: None, lambda: False)


def test_another_allocation_is_refused(allocation: Path, slurm_run: Job):
    with pytest.raises(InputError, match="nodes is 3, but this Slurm job has 2"):
        SlurmBackend(SlurmCluster(nodes=3)).prepare(slurm_run, 1, lambda line: None, lambda: False)


def test_outside_an_allocation(slurm_commands: Path, slurm_run: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(InputError, match="SLURM_JOB_ID is not set"):
        SlurmBackend(SlurmCluster()).prepare(slurm_run, 1, lambda line: None, lambda: False)


def test_a_secret_that_is_not_there(allocation: Path, slurm_run: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match="secrets lists WANDB_API_KEY, which is not set in the launcher's environment"):
        SlurmBackend(SlurmCluster(nodes=2, secrets=("WANDB_API_KEY",))).prepare(slurm_run, 1, print, lambda: False)


ALL_GPUS = """
import jax
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.partition.processes import start_processes
start_processes(MeshConfig(coordinator="127.0.0.1:{port}", num_processes=1, process_id=0))
print(jax.config.read("jax_cuda_visible_devices"))
"""


def test_a_process_has_all_gpus_of_its_node():
    """jax would give the one of SLURM_LOCALID to a process that it finds in a Slurm slurm_run."""
    task = {"SLURM_JOB_ID": "100", "SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"}
    task |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    code = ALL_GPUS.format(port=15_000 + os.getpid() % 10_000)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **task}, capture_output=True, text=True)
    assert done.stdout == "all\n", done.stderr
