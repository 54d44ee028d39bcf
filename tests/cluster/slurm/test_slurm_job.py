"""The Slurm job of a launcher, against stand-ins for Slurm's commands."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fake_slurm
import pytest
from fake_slurm import ODD_NAME, tasks, until

from sophia_levanter.cluster.backend import Job
from sophia_levanter.cluster.config import SlurmCluster, read_cluster
from sophia_levanter.cluster.record import STOP
from sophia_levanter.cluster.slurm.job import active_job, describe_submission, sbatch_script, submit
from sophia_levanter.commands import launch
from sophia_levanter.errors import InputError


def shell(script: str) -> list[str]:
    return ["bash", "-c", script]


def run_job(slurm_run: Job, words: list[str], **fields: object) -> tuple[int, str]:
    """The status of a submitted slurm_run, and its log."""
    said: list[str] = []
    status = submit(SlurmCluster(**fields), slurm_run, words, said.append)
    return status, (slurm_run.directory / "slurm-100.log").read_text()


def start_job(slurm_run: Job, words: list[str], **fields: object) -> subprocess.Popen[str]:
    """The same, not waited for."""
    (slurm_run.directory / "job.sh").write_text(sbatch_script(SlurmCluster(**fields), slurm_run, words))
    return subprocess.Popen(["sbatch", "--wait", "--parsable", str(slurm_run.directory / "job.sh")], text=True)


def ready_job(slurm_run: Job, words: list[str], **fields: object) -> tuple[subprocess.Popen[str], Path]:
    """The same when it has printed that it is ready, and its log."""
    process, log = start_job(slurm_run, words, **fields), slurm_run.directory / "slurm-100.log"
    until(lambda: log.exists() and "ready" in log.read_text())
    return process, log


def tell_script(state: Path) -> None:
    """As Slurm does before the job's time ends."""
    pid = state / "pid-100"
    until(lambda: pid.exists() and pid.read_text())  # a script may print before this is written
    os.kill(int(pid.read_text()), signal.SIGTERM)


FULL = {
    "nodes": 2,
    "gpus_per_node": 8,
    "cpus_per_node": 96,
    "partition": "h100",
    "account": "lab",
    "time": "1:00:00",
    "options": ("--qos=high", '--constraint=a#"b'),
    "setup": ("source .venv/bin/activate", "echo 'it''s {set}'"),
}


def test_script_is_shell_and_says_what_is_asked(tmp_path: Path, slurm_run: Job):
    script = sbatch_script(SlurmCluster(**FULL), slurm_run, ["python", "a b"])
    (tmp_path / "job.sh").write_text(script)
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], capture_output=True).stderr == b""
    assert fake_slurm.directives(script) == {
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "cpus-per-task": "96",
        "partition": "h100",
        "account": "lab",
        "time": "1:00:00",
        "open-mode": "append",
        "requeue": "",
        "signal": "B:TERM@180",
        "qos": "high",
        "constraint": 'a#"b',
        "job-name": "run_a_b_c_j_touch_no_d_e",
        "output": f"{slurm_run.directory}/slurm-%j.log".replace(ODD_NAME, ODD_NAME.replace("%", "%%")),
    }


def test_whole_nodes_unless_cpus_are_given(slurm_run: Job):
    assert "exclusive" in fake_slurm.directives(sbatch_script(SlurmCluster(), slurm_run, ["python"]))
    assert "exclusive" not in fake_slurm.directives(sbatch_script(SlurmCluster(cpus_per_node=4), slurm_run, ["python"]))


@pytest.mark.parametrize("name", ["slurm_1_node", "slurm_2x8_h100"])
def test_clusters_that_come_along(slurm_run: Job, name: str):
    cluster = read_cluster(Path(__file__).parents[3] / "infra" / "gpu" / f"{name}.yaml")
    options = fake_slurm.directives(sbatch_script(cluster, slurm_run, ["python"]))
    assert options["gpus-per-node"] == "8" and options["time"] == cluster.time
    assert cluster.save_before >= cluster.stop_timeout


@pytest.mark.parametrize("name", ["a\nb", "a\\b"])
def test_directory_that_slurm_cannot_take(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="cannot contain a newline or backslash"):
        sbatch_script(SlurmCluster(), Job(tmp_path / name, tmp_path / name / "launch"), ["python"])


@pytest.mark.parametrize("status", [0, 1, 2, 75, 130])
def test_status_is_the_launchers_and_nothing_is_queued_again(slurm_commands: Path, slurm_run: Job, status: int):
    assert run_job(slurm_run, shell(f"exit {status}"))[0] == status
    assert not (slurm_commands / "requeued").exists()


def test_words_reach_the_launcher(slurm_commands: Path, slurm_run: Job):
    odd = [ODD_NAME, "", "a\nb", "$HOME", "*", "\\"]
    words = [sys.executable, "-c", "import sys, json; print(json.dumps(sys.argv[1:]))", *odd]
    status, log = run_job(slurm_run, words, setup=("set -u", "echo ready"))
    assert (status, log) == (0, f"ready\n{json.dumps(odd)}\n")


def test_setup_that_fails_ends_the_job(slurm_commands: Path, slurm_run: Job):
    status, log = run_job(slurm_run, shell("echo launched"), setup=("source nowhere/activate",))
    assert status == 1
    assert "nowhere/activate" in log and "launched" not in log


LISTENING = "trap 'echo told; sleep 0.3; exit {}' TERM; echo ready; while :; do sleep 0.05; done"


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (1, False), (2, False)])
def test_time_that_ends(slurm_commands: Path, slurm_run: Job, status: int, requeued: bool):
    process, log = ready_job(slurm_run, shell(LISTENING.format(status)))
    tell_script(slurm_commands)
    until(lambda: "told" in log.read_text())
    tell_script(slurm_commands)
    assert process.wait(timeout=60) == status
    assert (slurm_commands / "requeued").exists() == requeued
    if requeued:
        assert (slurm_commands / "requeued").read_text() == "100\n"
        assert "requeuing job 100" in log.read_text()


def test_time_that_ends_before_the_launcher_listens(slurm_commands: Path, slurm_run: Job):
    process, _ = ready_job(slurm_run, shell("echo ready; sleep 60"))
    tell_script(slurm_commands)
    assert process.wait(timeout=60) == 75
    assert (slurm_commands / "requeued").read_text() == "100\n"


def test_time_that_ends_during_setup(slurm_commands: Path, slurm_run: Job, tmp_path: Path):
    wait = f"echo ready; while [ ! -e {shlex.quote(str(tmp_path / 'go'))} ]; do sleep 0.05; done"
    process, log = ready_job(slurm_run, shell("echo launched"), setup=(wait,))
    tell_script(slurm_commands)
    (tmp_path / "go").touch()
    assert process.wait(timeout=60) == 75
    assert (slurm_commands / "requeued").read_text() == "100\n"
    assert "launched" not in log.read_text()


def test_stopped_run_is_not_queued_again(slurm_commands: Path, slurm_run: Job):
    """Somebody has asked it to stop, and the job's time ends while it saves."""
    process, _ = ready_job(slurm_run, shell(LISTENING.format(75)))
    (slurm_run.directory / STOP).touch()
    tell_script(slurm_commands)
    assert process.wait(timeout=60) == 75
    assert not (slurm_commands / "requeued").exists()


def test_run_whose_job_waits_is_not_submitted_again(
    slurm_commands: Path, slurm_run: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    config, cluster = tmp_path / "config.yaml", tmp_path / "slurm.yaml"
    config.write_text("optimizer: {type: adamw}\n")
    cluster.write_text("backend: slurm\npython: 'true'\n")
    words = ["--config", str(config), "--cluster", str(cluster), "--trainer.run_dir", str(slurm_run.run_dir)]
    (slurm_run.directory / "slurm_job").write_text("100")
    (slurm_commands / "job-100").write_text("PENDING")
    assert launch.main(words) == 2
    message = f"error: Slurm job 100 is PENDING; run launch stop {slurm_run.run_dir} first\n"
    assert capsys.readouterr().err == message
    assert [path.name for path in slurm_run.directory.iterdir()] == ["slurm_job"]
    (slurm_commands / "job-100").write_text("COMPLETED")
    assert launch.main(words) == 0
    assert (slurm_run.directory / "slurm_job").read_text() == "101"


@pytest.mark.parametrize("state", ["PENDING", "CONFIGURING", "RUNNING"])
def test_job_in_the_queue_is_cancelled_by_stop(state: str, slurm_commands: Path, slurm_run: Job, capsys):
    """A job that boots its nodes or runs `setup` has no launcher yet."""
    (slurm_run.directory / "slurm_job").write_text("100")
    (slurm_commands / "job-100").write_text(state)
    assert launch.main(["status", str(slurm_run.run_dir)]) == 0
    assert capsys.readouterr().out == f"Slurm job 100 is {state}; the launcher starts with it\n"
    assert launch.main(["stop", str(slurm_run.run_dir)]) == 0
    assert capsys.readouterr().out == "cancelled Slurm job 100 before it started\n"
    assert (slurm_commands / "job-100").read_text() == "CANCELLED"
    assert active_job(slurm_run.directory) is None
    assert launch.main(["status", str(slurm_run.run_dir)]) == 2
    assert "contains no launched run" in capsys.readouterr().err


def test_job_that_is_being_requeued_is_cancelled_by_stop(slurm_commands: Path, slurm_run: Job, capsys):
    (slurm_run.directory / "slurm_job").write_text("100")
    (slurm_commands / "job-100").write_text("COMPLETING")
    requeue = threading.Timer(0.5, (slurm_commands / "job-100").write_text, ["PENDING"])
    requeue.start()
    assert launch.main(["stop", str(slurm_run.run_dir)]) == 0
    requeue.join()
    assert capsys.readouterr().out == "cancelled Slurm job 100 before it started\n"


def test_job_that_stays_completing_is_not_waited_for(
    slurm_commands: Path, slurm_run: Job, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sophia_levanter.cluster.slurm.job.COMPLETING_SECONDS", 0.0)
    (slurm_run.directory / "slurm_job").write_text("100")
    (slurm_commands / "job-100").write_text("COMPLETING")
    assert active_job(slurm_run.directory) is None


def test_job_that_cannot_be_cancelled(slurm_commands: Path, slurm_run: Job, tmp_path: Path, capsys):
    (slurm_run.directory / "slurm_job").write_text("100")
    (slurm_commands / "job-100").write_text("PENDING")
    (tmp_path / "bin" / "scancel").write_text("#!/bin/sh\necho 'scancel: error: no response' >&2\nexit 1\n")
    assert launch.main(["stop", str(slurm_run.run_dir)]) == 1
    assert capsys.readouterr() == ("", "error: scancel: no response\n")


def test_cancelled_job_is_not_queued_again(slurm_commands: Path, slurm_run: Job):
    said: list[str] = []
    assert (
        submit(SlurmCluster(), slurm_run, shell("(sleep 0.3; scancel 100) & " + LISTENING.format(75)), said.append) == 1
    )
    assert "Slurm job 100 did not finish: CANCELLED" in said
    assert not (slurm_commands / "requeued").exists()


# What a launcher does with a backend, without its policy: one attempt, told to stop as the backend says.
LAUNCHER = """
import signal, subprocess, sys
from pathlib import Path
from sophia_levanter.cluster.backend import Job
from sophia_levanter.cluster.config import read_cluster
from sophia_levanter.cluster.slurm import SlurmBackend
job = Job(Path(sys.argv[2]), Path(sys.argv[2]) / "launch")
backend = SlurmBackend(read_cluster(Path(sys.argv[1])))
backend.prepare(job, 1, print, lambda: False)
(command,) = backend.commands(job, 1)
process = subprocess.Popen(command.words, stdin=subprocess.PIPE)
signal.signal(signal.SIGTERM, lambda *_: process.stdin.close())
sys.exit(process.wait())
"""


def test_run_through_the_job_saves_and_is_queued_again(
    slurm_commands: Path, slurm_run: Job, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2hunter2")
    (tmp_path / "record" / "ends").write_text("never never")
    cluster_file = tmp_path / "slurm.yaml"
    cluster_file.write_text(f"backend: slurm\nnodes: 2\nsecrets: [WANDB_API_KEY]\npython: {python}\n")
    words = [sys.executable, "-c", LAUNCHER, str(cluster_file), str(slurm_run.run_dir)]
    process = start_job(slurm_run, words, nodes=2, secrets=("WANDB_API_KEY",))
    pids = [task["pid"] for task in tasks(tmp_path)]
    assert all(b"WANDB_API_KEY=hunter2hunter2" in Path(f"/proc/{pid}/environ").read_bytes() for pid in pids)
    tell_script(slurm_commands)
    assert process.wait(timeout=60) == 75
    log = (slurm_run.directory / "slurm-100.log").read_text()
    assert {"0: saved", "1: saved", "requeuing job 100"} <= set(log.splitlines())
    assert (slurm_commands / "requeued").read_text() == "100\n"
    assert not any(b"hunter2" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_submit_says_number_and_log(slurm_commands: Path, slurm_run: Job):
    said: list[str] = []
    assert submit(SlurmCluster(), slurm_run, ["true"], said.append) == 0
    assert said == [f"submitted Slurm job 100; log: {slurm_run.directory}/slurm-100.log"]


def test_no_sbatch(slurm_run: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="sbatch not found; run this on a login node"):
        submit(SlurmCluster(), slurm_run, ["true"], print)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"partition": "nope"}, "sbatch: Batch job submission failed: Invalid partition name specified"),
        ({"options": ("--qso=high",)}, "sbatch: unrecognized option '--qso'"),
    ],
)
def test_what_sbatch_refuses(slurm_commands: Path, slurm_run: Job, fields: dict, message: str):
    with pytest.raises(InputError) as caught:
        submit(SlurmCluster(**fields), slurm_run, ["true"], print)
    assert str(caught.value) == message


SUBMITTING = """
import sys
from pathlib import Path
from sophia_levanter.cluster.backend import Job
from sophia_levanter.cluster.config import SlurmCluster
from sophia_levanter.cluster.slurm.job import submit
job = Job(Path(sys.argv[1]), Path(sys.argv[1]) / "launch")
sys.exit(submit(SlurmCluster(), job, sys.argv[2:], lambda line: print(line, flush=True)))
"""


def test_ctrl_c_leaves_the_job(slurm_commands: Path, slurm_run: Job, tmp_path: Path):
    wait = f"while [ ! -e {shlex.quote(str(tmp_path / 'go'))} ]; do sleep 0.05; done; exit 3"
    command = [sys.executable, "-c", SUBMITTING, str(slurm_run.run_dir), *shell(wait)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert "Slurm job 100" in process.stdout.readline()
    until((slurm_commands / "pid-100").exists)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    stop = shlex.join(["python", "-m", "sophia_levanter.commands.launch", "stop", str(slurm_run.run_dir)])
    assert output == f"job 100 keeps running; to stop it, run {stop}, or scancel 100 if it has not started\n"
    (tmp_path / "go").touch()
    until((slurm_commands / "exit-100").exists)
    assert (slurm_commands / "exit-100").read_text() == "3"


def test_dry_run_shows_all_and_starts_nothing(slurm_commands: Path, slurm_run: Job):
    cluster = SlurmCluster(**FULL)
    words = ["python", "-m", "sophia_levanter.commands.launch"]
    shown = "\n".join(describe_submission(cluster, slurm_run, words))
    assert "sbatch --wait --parsable" in shown
    assert "  #SBATCH --nodes=2" in shown and f"  {shlex.join(words)} </dev/null &" in shown
    assert "each attempt: srun" in shown and "--mesh.coordinator FIRST_NODE:PORT" in shown
    assert "uses 2 nodes, 96 CPUs each, 8 GPUs each, 16 GPUs in total, for up to 1:00:00 at a time" in shown
    assert not list(slurm_run.directory.iterdir()) and not list(slurm_commands.iterdir())
