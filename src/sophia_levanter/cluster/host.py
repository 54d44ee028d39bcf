"""`python -m sophia_levanter.cluster.host`: run a training process on its host.

With `--parent PID`, this process becomes the training process and is killed when the process that started it exits.
Otherwise, processes would continue to train and keep the run directory locked after their launcher is killed. The kill
is guaranteed only on Linux; on other systems, the command is started without this guarantee.

With `--grace SECONDS --log FILE`, this process runs a training process under ssh. It tells the training process to stop
when standard input closes, which is the only sign of a lost connection or launcher, and on SIGTERM or SIGHUP, such as
at shutdown. It prints the output and also writes it to FILE. Only one process at a time may log to a folder.

This module avoids slow imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, NoReturn

from sophia_levanter.config.arguments import parse_arguments, whole_number
from sophia_levanter.errors import InputError
from sophia_levanter.status import FAILURE, ON_STDOUT, read_status, run_command

USAGE = """\
usage: python -m sophia_levanter.cluster.host --grace SECONDS --log FILE -- WORD...
       python -m sophia_levanter.cluster.host --parent PID -- WORD...

  WORD...           command to run; it receives SIGTERM when standard input closes
  --grace SECONDS   time between SIGTERM and SIGKILL
  --log FILE        new file for the command's output; if it already exists, the command is not started again
  --parent PID      replace this process with the command, which is killed when its parent PID exits
  --help            show this help message and exit"""
PR_SET_PDEATHSIG = 1
_PATIENCE = 10.0  # seconds to wait, beyond the grace period, for a process from an earlier attempt


def start_process(
    words: Sequence[str], env: Mapping[str, str] = MappingProxyType({}), *, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a process in a new session; it is killed when this process exits. The caller must read its output.

    Args:
        words: the command line.
        env: environment variables to add to those of this process.
        stdin: the standard input of the new process.
    """
    parent = ["--parent", str(os.getpid())]
    return subprocess.Popen(
        [sys.executable, "-m", "sophia_levanter.cluster.host", *parent, "--", *words],
        env=os.environ | dict(env) | ON_STDOUT,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that only the launcher handles Ctrl-C
    )


def kill_group(leader: int) -> None:
    """Kill a process started by `start_process` and its descendants, even if the process itself has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command given after `--`.

    Returns:
        The training process's exit status (128 + N for signal N), 1 if it was already started, or 2 for bad input.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    own = given[: given.index("--")] if "--" in given else given
    # A --help after `--` is an argument of the training process.
    return run_command(own, lambda arguments: _run(arguments, given[len(own) + 1 :]), usage=USAGE)


def _run(given: Sequence[str], words: Sequence[str]) -> int:
    arguments = parse_arguments(given, options=("--grace", "--log", "--parent"))
    if "--parent" in arguments.options:
        _become(words, whole_number("--parent", arguments.options["--parent"]))
    grace = whole_number(
        "--grace", arguments.needed("--grace", "SECONDS", "specify the time between SIGTERM and SIGKILL")
    )
    log_file = Path(arguments.needed("--log", "FILE", "specify a file for the process's output"))
    if not words:
        raise InputError("-- WORD... is missing; specify the command to run")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        log = log_file.open("xb", buffering=0)
    except FileExistsError:
        # After a broken connection, gcloud reconnects and would start a second process alongside the first.
        print(f"error: {log_file} already exists; the process was started, but the connection broke", file=sys.stderr)
        return FAILURE
    with log, _alone_on_this_host(log_file.parent, grace + _PATIENCE):
        return run_child(words, grace, log)


def _become(words: Sequence[str], parent: int) -> NoReturn:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        os.execvp(words[0], list(words))
    except OSError as error:
        sys.exit(f"error: {words[0]} cannot be started: {error.strerror}")


def run_child(words: Sequence[str], grace: float, log: IO[bytes]) -> int:
    """Run a process until it exits.

    Args:
        words: the command line.
        grace: seconds between SIGTERM and SIGKILL.
        log: the file that receives the output.

    Returns:
        The exit status; 128 + N if the process was killed by signal N.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    child = start_process(words)
    assert child.stdout is not None
    printing = threading.Thread(target=_pass_on, args=(child.stdout, log), daemon=True)
    for thread in (
        printing,
        threading.Thread(target=_wait_for_end_of_input, args=(stop,), daemon=True),
        threading.Thread(target=_end, args=(child, stop, grace), daemon=True),
    ):
        thread.start()
    status = child.wait()
    # Kill its descendants too, because they could still hold the devices or the pipe.
    kill_group(child.pid)
    printing.join(timeout=5)
    return 128 - status if status < 0 else status


@contextlib.contextmanager
def _alone_on_this_host(folder: Path, seconds: float) -> Iterator[None]:
    """Tell any process from an earlier attempt to exit, and wait until it has released the devices."""
    with (folder / "lock").open("a+") as lock:
        deadline = time.monotonic() + seconds
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(f"{folder}: a process from an earlier attempt is still running") from None
            if not told:
                print("waiting for a process from an earlier attempt to exit", flush=True)
                lock.seek(0)
                if (holder := lock.read()).isdecimal():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(holder), signal.SIGTERM)
                told = True
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _wait_for_end_of_input(stop: threading.Event) -> None:
    while os.read(0, 65536):
        pass
    stop.set()


def _end(child: subprocess.Popen[bytes], stop: threading.Event, grace: float) -> None:
    stop.wait()
    child.terminate()
    try:
        child.wait(grace)
    except subprocess.TimeoutExpired:
        kill_group(child.pid)


def _pass_on(source: IO[bytes], log: IO[bytes]) -> None:
    """Copy output to standard output and to the log. If writing to one of them fails, only that copy ends.

    Status lines are for the launcher and are not logged.
    """
    sinks = {1: True, log.fileno(): True}
    for line in source:
        for sink in sinks:
            if sink != 1 and read_status(line.decode(errors="replace").rstrip()):
                continue
            try:
                if sinks[sink]:
                    _write(sink, line)
            except OSError:
                sinks[sink] = False


def _write(sink: int, content: bytes) -> None:
    while content:
        content = content[os.write(sink, content) :]


if __name__ == "__main__":
    sys.exit(main())
