"""Stand-ins for Slurm's commands, which behave as those of Slurm 22.05 were seen to, on one machine.

`install` puts sbatch, srun, scontrol, squeue and scancel into a folder for PATH. All are this file, run under their
names; they share the folder that FAKE_SLURM names: job-ID holds a job's state, pid-ID its script's process, exit-ID its
status, step-ID.N a step's name and tasks, and requeued the jobs that were queued again.
"""

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

VALUE, FLAG, OPTIONAL = "value", "flag", "optional"
SBATCH = {
    **dict.fromkeys(
        ["account", "cpus-per-task", "gpus-per-node", "job-name", "mem", "nodes", "ntasks-per-node"], VALUE
    ),
    **dict.fromkeys(["open-mode", "output", "partition", "qos", "signal", "time", "constraint", "export"], VALUE),
    **dict.fromkeys(["wait", "parsable", "requeue"], FLAG),
    "exclusive": OPTIONAL,
}
SRUN = {
    **dict.fromkeys(["cpus-per-task", "export", "gpus-per-node", "job-name", "nodes", "ntasks"], VALUE),
    **dict.fromkeys(["ntasks-per-node", "wait"], VALUE),
    "label": FLAG,
    "kill-on-bad-exit": OPTIONAL,
}
# Of a run directory.
ODD_NAME = """run "a" 'b' #c %j $(touch no) `d`; e"""
NAME = os.environ.pop("FAKE_NAME", "")
COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel")


def install(folder: Path) -> None:
    """Put the commands into a folder."""
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).write_text(
            f'#!/bin/sh\nFAKE_NAME={name} exec {shlex.quote(sys.executable)} {shlex.quote(__file__)} "$@"\n'
        )
        (folder / name).chmod(0o755)


def state() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def parse(words: list[str], known: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Options, and what follows them."""
    options: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("--"):
        name, equals, value = rest.pop(0)[2:].partition("=")
        if name not in known or (known[name] == VALUE) > bool(equals) or (known[name] == FLAG and equals):
            raise SystemExit(f"{NAME}: error: unrecognized option '--{name}'")
        options[name] = value
    return options, rest


def directives(script: str) -> dict[str, str]:
    """Of the lines of a script up to its first command."""
    options: dict[str, str] = {}
    for line in script.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
            found, rest = parse(words, SBATCH)
            if rest:
                raise SystemExit(f"sbatch: error: {line}: what is {rest[0]}?")
            options |= found
    return options


def sbatch(words: list[str]) -> int:
    given, (script,) = parse(words, SBATCH)
    options = directives(Path(script).read_text()) | given
    if options.get("partition") == "nope":
        print("sbatch: error: invalid partition specified: nope", file=sys.stderr)
        print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
        return 1
    number = str(100 + len(list(state().glob("job-*"))))
    (state() / f"job-{number}").write_text("PENDING")
    log = re.sub("%[%j]", lambda match: {"%%": "%", "%j": number}[match[0]], options["output"])
    nodes = options.get("nodes", "1")
    environment = {
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_JOB_NODELIST": "127.0.0.1" if nodes == "1" else f"127.0.0.[1-{nodes}]",
    }
    with open(log, "a") as file:
        subprocess.Popen(
            [sys.executable, __file__, number, script],
            env={**os.environ, **environment, "FAKE_NAME": "job"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    print(number, flush=True)
    while not (state() / f"exit-{number}").exists():
        time.sleep(0.02)
    return int((state() / f"exit-{number}").read_text())


def job(words: list[str]) -> int:
    number, script = words
    process = subprocess.Popen(["bash", script])
    (state() / f"pid-{number}").write_text(str(process.pid))
    (state() / f"job-{number}").write_text("RUNNING")
    status = process.wait()
    for file in state().glob(f"step-{number}.*"):
        scancel(["--signal=KILL", file.name.removeprefix("step-")])
    cancelled = (state() / f"job-{number}").read_text() == "COMPLETING"
    (state() / f"job-{number}").write_text("CANCELLED" if cancelled else "COMPLETED" if status == 0 else "FAILED")
    temporary = state() / f"tmp-{number}"
    temporary.write_text("0" if cancelled else str(status))
    temporary.rename(state() / f"exit-{number}")
    return 0


class Srun:
    """A step: its tasks are processes of this machine, each in a session of its own."""

    def __init__(self, options: dict[str, str], words: list[str]) -> None:
        self.options, self.words = options, words
        self.count = int(options["ntasks"])
        number = os.environ["SLURM_JOB_ID"]
        self.step = f"{number}.{len(list(state().glob(f'*step-{number}.*')))}"
        self.tasks: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self.force)
        self.tasks = [self.start(number) for number in range(self.count)]
        file = state() / f"step-{self.step}"
        file.write_text("\n".join([self.options["job-name"], *(str(task.pid) for task in self.tasks)]))
        readers = [
            Thread(target=self.label, args=(number, stream), daemon=True)
            for number, task in enumerate(self.tasks)
            for stream in ((task.stdout, 1), (task.stderr, 2))
        ]
        for thread in [*readers, Thread(target=self.broadcast, daemon=True)]:
            thread.start()
        self.wait()
        for reader in readers:
            reader.join()
        file.rename(state() / f"past-step-{self.step}")
        statuses = [task.returncode for task in self.tasks]
        return max(128 - status if status < 0 else status for status in statuses)

    def start(self, number: int) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        env = {**os.environ, "SLURM_PROCID": str(number), "SLURM_LOCALID": "0", "SLURM_NTASKS": str(self.count)}
        env |= {"SLURM_STEP_ID": str(self.step), "SLURM_STEP_NUM_TASKS": str(self.count)}
        env["SLURM_STEP_NODELIST"] = env["SLURM_JOB_NODELIST"]
        return subprocess.Popen(self.words, env=env, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)

    def label(self, number: int, stream: tuple) -> None:
        width = len(str(self.count - 1))
        for line in stream[0]:
            os.write(stream[1], b"%*d: %s\n" % (width, number, line.rstrip(b"\n")))

    def broadcast(self) -> None:
        while data := os.read(0, 4096):
            for task in self.tasks:
                with contextlib.suppress(BrokenPipeError):
                    task.stdin.write(data)
                    task.stdin.flush()
        for task in self.tasks:
            with contextlib.suppress(BrokenPipeError):
                task.stdin.close()

    def wait(self) -> None:
        ended_at = None
        limit = float(self.options.get("wait", 0)) or math.inf
        while None in (statuses := [task.poll() for task in self.tasks]):
            bad = any(statuses) and self.options.get("kill-on-bad-exit", "0") == "1"
            if ended_at is None and statuses != [None] * self.count:
                ended_at = time.monotonic()
            if bad or (ended_at is not None and time.monotonic() - ended_at > limit):
                self.force()
            time.sleep(0.02)

    def force(self, *_: object) -> None:
        print("srun: forcing job termination", file=sys.stderr, flush=True)
        for task in self.tasks:
            kill(task.pid)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs: not one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(met: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tasks(tmp_path: Path, number: int = 2) -> list[dict]:
    files = [tmp_path / "record" / f"task-{i}.json" for i in range(number)]
    until(lambda: all(file.exists() and file.read_text().endswith("}") for file in files))
    return [json.loads(file.read_text()) for file in files]


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        match = re.fullmatch(r"([\w.]+)\[(\d+)-(\d+)\]", words[2])
        names = [f"{match[1]}{i}" for i in range(int(match[2]), int(match[3]) + 1)] if match else [words[2]]
        print("\n".join(names))
        return 0
    assert words[0] == "requeue", words
    with (state() / "requeued").open("a") as file:
        file.write(f"{words[1]}\n")
    return 0


def squeue(words: list[str]) -> int:
    number = next(word for word in words if word.startswith("--jobs=")).removeprefix("--jobs=")
    if "--steps" not in words:
        assert "--format=%T" in words, words
        print((state() / f"job-{number}").read_text())
        return 0
    assert "--format=%i %j" in words, words
    print(f"{number}.batch batch")
    for file in sorted(state().glob(f"step-{number}.*")):
        name, *pids = file.read_text().split("\n")
        if any(alive(int(pid)) for pid in pids):
            print(f"{file.name.removeprefix('step-')} {name}")
    return 0


def scancel(words: list[str]) -> int:
    if words[0] == "--signal=KILL":
        for step in words[1:]:
            for pid in (state() / f"step-{step}").read_text().split("\n")[1:]:
                kill(int(pid))
        return 0
    job, pid = state() / f"job-{words[0]}", state() / f"pid-{words[0]}"
    if not pid.exists():
        job.write_text("CANCELLED")
        return 0
    job.write_text("COMPLETING")
    os.kill(int(pid.read_text()), signal.SIGTERM)
    return 0


def srun(words: list[str]) -> int:
    return Srun(*parse(words, SRUN)).run()


if __name__ == "__main__":
    sys.exit(globals()[NAME](sys.argv[1:]))
