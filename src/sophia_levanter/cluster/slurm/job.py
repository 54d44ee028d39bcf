"""Write the script of the Slurm job that runs the launcher, and submit the job on a login node."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from sophia_levanter.cluster.backend import Job, Say, Unavailable
from sophia_levanter.cluster.config import SlurmCluster
from sophia_levanter.cluster.record import STOP
from sophia_levanter.cluster.slurm import SlurmBackend, ask, last_line
from sophia_levanter.errors import InputError
from sophia_levanter.files import read_regular
from sophia_levanter.status import FAILURE, INTERRUPTED, PREEMPTED

NUMBER = "slurm_job"  # name of the file, next to the script, that contains the job's number
COMPLETING_SECONDS = 60.0  # time for which `active_job` waits for a job to be requeued or to end
# Final job states for which sbatch --wait may return 0 even though the run is not done.
BAD_ENDS = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")


SCRIPT_BODY = """\
# Slurm sends SIGTERM only to this script, before the time limit. The script forwards it, and the launcher saves.
told='' again='' launcher='' status={preempted}
tell() {{
  told=yes again=yes
  [ -z "$launcher" ] || kill -TERM "$launcher" 2>/dev/null
}}
trap tell TERM

set -e
{setup}
set +e

if [ -z "$told" ]; then
  {words} </dev/null &
  launcher=$!
  [ -z "$told" ] || tell
  again=yes
fi
# A signal interrupts `wait` while the launcher is still running.
while [ -n "$again" ] && [ -n "$launcher" ]; do
  again=''
  wait "$launcher"
  status=$?
done
# 143: the signal arrived before the launcher could handle it.
[ -z "$told" ] || [ "$status" != 143 ] || status={preempted}

# Requeue, unless the job was cancelled (it is no longer running) or the user stopped the run.
if [ -n "$told" ] && [ "$status" = {preempted} ] && [ ! -e {stop} ] &&
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  echo "requeuing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def sbatch_script(cluster: SlurmCluster, job: Job, words: Sequence[str]) -> str:
    """Return the sbatch script for the job.

    Args:
        cluster: the cluster settings.
        job: the run.
        words: the launcher's command line inside the allocation.

    Raises:
        InputError: if Slurm cannot write a log to the run directory because of the directory's name.
    """
    directory = os.path.abspath(job.directory)
    if re.search(r"[\n\r\\]", directory):
        raise InputError(
            f"trainer.run_dir {directory!r}: the path of a Slurm log cannot contain a newline or backslash; "
            "choose another directory"
        )
    options = [
        f"--job-name={re.sub(r'[^A-Za-z0-9_.-]+', '_', job.run_dir.name) or 'run'}",
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1",
        f"--output={directory.replace('%', '%%')}/slurm-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:TERM@{cluster.save_before}",
    ]
    if cluster.gpus_per_node:
        options.append(f"--gpus-per-node={cluster.gpus_per_node}")
    options.append("--exclusive" if cluster.cpus_per_node is None else f"--cpus-per-task={cluster.cpus_per_node}")
    for name in ("partition", "account", "time"):
        if (value := getattr(cluster, name)) is not None:
            options.append(f"--{name}={value}")
    body = SCRIPT_BODY.format(
        setup="\n".join(cluster.setup) or ":",
        words=" ".join(shlex.quote(word) for word in words),
        preempted=PREEMPTED,
        stop=shlex.quote(f"{directory}/{STOP}"),
    )
    directives = "\n".join(f"#SBATCH {_quoted(option)}" for option in (*options, *cluster.options))
    return f"#!/bin/bash\n{directives}\n\n{body}"


def describe_submission(cluster: SlurmCluster, job: Job, words: Sequence[str]) -> list[str]:
    """Describe what `submit` would do: the command, the script, and the job's resources and command."""
    return [
        f"would run: {shlex.join(_sbatch(job))}",
        f"{_script(job)}:",
        *(f"  {line}".rstrip() for line in sbatch_script(cluster, job, words).splitlines()),
        *SlurmBackend(cluster).describe(job),
    ]


def submit(cluster: SlurmCluster, job: Job, words: Sequence[str], say: Say) -> int:
    """Submit a job that runs the launcher on the run's nodes, and wait until it ends.

    Args:
        cluster: the cluster settings.
        job: the run. Its directory must exist on a disk shared by all nodes.
        words: the launcher's command line inside the allocation.
        say: function that prints a message.

    Returns:
        The launcher's exit status, 1 if Slurm ended the job, or 130 on Ctrl-C, after which the job continues.

    Raises:
        InputError: if sbatch is not installed on this machine or rejects the job.
    """
    _script(job).write_text(sbatch_script(cluster, job, words), encoding="utf-8")
    number = ""
    try:
        sbatch = subprocess.Popen(
            _sbatch(job), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        raise InputError("backend slurm: sbatch not found; run this on a login node of the cluster") from None
    try:
        assert sbatch.stdout is not None
        # sbatch prints NUMBER or NUMBER;CLUSTER.
        number = sbatch.stdout.readline().strip().partition(";")[0]
        if number:
            (job.directory / NUMBER).write_text(number)
            say(f"submitted Slurm job {number}; log: {job.directory / f'slurm-{number}.log'}")
        _, errors = sbatch.communicate()
        if not number:
            raise InputError(f"sbatch: {last_line(errors) or f'exited with status {sbatch.returncode}'}")
        if errors.strip():
            say(errors.strip())
        return _status_of(number, sbatch.returncode, say)
    except KeyboardInterrupt:
        say(_goes_on(job, number))
        return INTERRUPTED
    finally:
        sbatch.terminate()
        sbatch.wait()


def active_job(directory: Path) -> tuple[str, str] | None:
    """Return the number and state of a run's job; None if it has ended, or if the run has none.

    Args:
        directory: the launcher's directory for the run.
    """
    try:
        number = read_regular(directory / NUMBER).decode()
    except OSError:
        return None
    # A requeued job is COMPLETING before it is PENDING. Do not wait forever, because dead nodes may keep it COMPLETING.
    state = _settled_state(number, COMPLETING_SECONDS)
    return None if state in (None, "COMPLETED", "COMPLETING", "FAILED", *BAD_ENDS) else (number, state)


def _script(job: Job) -> Path:
    return job.directory / "job.sh"


def _sbatch(job: Job) -> list[str]:
    return ["sbatch", "--wait", "--parsable", os.path.abspath(_script(job))]


def _status_of(number: str, status: int, say: Say) -> int:
    state = _settled_state(number)
    if state in BAD_ENDS or status < 0:
        say(f"Slurm job {number} did not finish: {state or f'sbatch was killed by signal {-status}'}")
        return status if status > 0 else FAILURE
    return status


def _settled_state(number: str, seconds: float = math.inf) -> str | None:
    until = time.monotonic() + seconds
    while (state := _state(number)) == "COMPLETING" and time.monotonic() < until:
        time.sleep(1)
    return state


def _state(number: str) -> str | None:
    """Return the state of a job, or None if Slurm does not respond or no longer knows the job."""
    try:
        return ask("squeue", "--noheader", f"--jobs={number}", "--states=all", "--format=%T").strip() or None
    except (Unavailable, InputError):
        return None


def _goes_on(job: Job, number: str) -> str:
    if not number:
        return "interrupted before Slurm responded; check squeue --me for the job"
    stop = shlex.join(["python", "-m", "sophia_levanter.commands.launch", "stop", str(job.run_dir)])
    return f"job {number} keeps running; to stop it, run {stop}, or scancel {number} if it has not started"


def _quoted(option: str) -> str:
    """Quote an option for an sbatch script. Double quotes protect spaces and #; a backslash protects one character."""
    if re.fullmatch(r"[\w./:=,@%+-]+", option):
        return option
    name, equals, value = option.partition("=")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{equals}"{escaped}"'
