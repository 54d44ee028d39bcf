"""Run attempts inside a Slurm job: one srun per attempt, with one process per node. The module `job` submits the job.

Statements about Slurm in these modules were verified with version 22.05.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable

from sophia_levanter.cluster.backend import Backend, HostCommand, Job, Say, Unavailable, training_command
from sophia_levanter.cluster.config import SlurmCluster
from sophia_levanter.errors import InputError, counted

# The name of Slurm steps for training, which distinguishes them from the user's own steps in the same allocation.
STEP = "sophia_levanter"
# Seconds to wait for processes from an earlier attempt to end after SIGKILL.
LEFTOVERS_TIMEOUT = 60
# On SIGTERM, srun kills its tasks with SIGKILL. Tasks therefore save and exit when srun's standard input closes. The
# process that waits for the input to end does not keep the task's streams open, because srun would wait for it too.
TASK = 'exec 3<&0; {{ cat <&3; kill -TERM $$; }} >/dev/null 2>&1 & exec "$@"{mesh} </dev/null 3<&-'


class SlurmBackend(Backend):
    """Starts one process of the run on each node in the launcher's allocation."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster
        self.num_processes = cluster.nodes
        self._first_node: str | None = None

    def describe(self, job: Job) -> list[str]:
        """Describe the resources used by the job and the command that it runs."""
        return [_taken(self.cluster), f"each attempt: {self.commands(job, 1)[0].shown()}"]

    def prepare(self, job: Job, attempt: int, say: Say, stopped: Callable[[], bool]) -> None:
        """Check that the allocation matches the request, and kill processes from an earlier attempt.

        Raises:
            InputError: if this is not a Slurm job, its number of nodes differs from `nodes`, or a secret is not set.
            Unavailable: if Slurm does not respond, or if processes from an earlier attempt cannot be killed.
        """
        _check_allocation(self.cluster)
        nodes = ask("scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")).split()
        if len(nodes) != self.cluster.nodes:
            raise Unavailable(f"nodes is {self.cluster.nodes}, but scontrol lists {len(nodes)} nodes for this job")
        self._first_node = nodes[0]
        _end_leftovers(say, stopped)

    def commands(self, job: Job, attempt: int) -> list[HostCommand]:
        """Return a single srun command, which prints the output of all processes."""
        cluster = self.cluster
        mesh: dict[str, object] = {}
        if cluster.nodes > 1:
            coordinator = f"{self._first_node}:{_port(attempt)}" if self._first_node else "FIRST_NODE:PORT"
            mesh = {"coordinator": coordinator, "num_processes": cluster.nodes}
        words = [
            "srun",
            f"--job-name={STEP}",
            "--export=ALL",  # even if the job itself was submitted with a different --export
            "--label",
            # With 1, if one process saved and exited with 75, the others would be killed before printing their last
            # lines, and srun would return 143. Peers of a dead process exit on their own; --wait kills those that hang.
            "--kill-on-bad-exit=0",
            f"--wait={cluster.stop_timeout}",
            f"--nodes={cluster.nodes}",
            f"--ntasks={cluster.nodes}",
            "--ntasks-per-node=1",
        ]
        if cluster.gpus_per_node:
            words.append(f"--gpus-per-node={cluster.gpus_per_node}")
        if cluster.cpus_per_node is not None:
            words.append(f"--cpus-per-task={cluster.cpus_per_node}")
        words += ["bash", "-c", TASK.format(mesh=' --mesh.process_id "$SLURM_PROCID"' if mesh else ""), "-"]
        words += training_command(cluster.python, str(job.config_file), mesh)
        return [HostCommand("srun", words, env=cluster.env, labelled=True, by_stdin=True)]


def _check_allocation(cluster: SlurmCluster) -> None:
    if "SLURM_JOB_ID" not in os.environ:
        raise InputError("backend slurm: SLURM_JOB_ID is not set; attempts must run inside a Slurm job")
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "an unknown number")
    if nodes != str(cluster.nodes):
        raise InputError(
            f"nodes is {cluster.nodes}, but this Slurm job has {nodes}; use the same number or launch outside the job"
        )
    cluster.check_secrets()


def _end_leftovers(say: Say, stopped: Callable[[], bool]) -> None:
    """Kill hanging tasks that are left over after their srun was killed."""
    deadline = time.monotonic() + LEFTOVERS_TIMEOUT
    said = False
    while (steps := _steps()) and not stopped():
        if time.monotonic() > deadline:
            raise Unavailable(f"processes from an earlier attempt are still running (Slurm steps {', '.join(steps)})")
        if not said:
            say("killing processes left over from an earlier attempt")
        said = True
        # This fails for a step that has ended in the meantime.
        subprocess.run(["scancel", "--signal=KILL", *steps], stderr=subprocess.DEVNULL, check=False)
        time.sleep(1)


def _steps() -> list[str]:
    listed = ask("squeue", "--noheader", "--steps", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%i %j")
    steps = [line.split() for line in listed.splitlines()]
    return [words[0] for words in steps if words[1:] == [STEP]]


def ask(*words: str) -> str:
    """Run a Slurm command and return its output.

    Raises:
        InputError: if the command is not installed on this machine.
        Unavailable: if the command fails.
    """
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(f"backend slurm: {words[0]} not found; run this on a machine with Slurm installed") from None
    if done.returncode:
        raise Unavailable(f"{words[0]}: {last_line(done.stderr) or f'exited with status {done.returncode}'}")
    return done.stdout


def last_line(text: str) -> str:
    """Return the last line of a Slurm error message, without the command name."""
    lines = text.strip().splitlines()
    return re.sub(r"^\w+: error: ", "", lines[-1]) if lines else ""


def _port(attempt: int) -> int:
    """Return a port below Linux's ephemeral ports that varies by attempt and is far from those of neighboring jobs."""
    return 12_000 + (int(os.environ["SLURM_JOB_ID"]) * 127 + attempt) % 20_000


def _taken(cluster: SlurmCluster) -> str:
    cpus = "all their CPUs" if cluster.cpus_per_node is None else f"{counted(cluster.cpus_per_node, 'CPU')} each"
    gpus = counted(cluster.nodes * cluster.gpus_per_node, "GPU")
    shown = f"{counted(cluster.nodes, 'node')}, {cpus}, {counted(cluster.gpus_per_node, 'GPU')} each"
    time_limit = f"up to {cluster.time}" if cluster.time else "up to the partition's time limit"
    return f"uses {shown}, {gpus} in total, for {time_limit} at a time, until the run is done"
