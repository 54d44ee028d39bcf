"""`python -m sophia_levanter.cluster.host`: how a training process is held on its host.

With `--parent PID` this process becomes the training process, and dies with the one that started it. A launcher that is
killed must not leave processes that train on without it and hold the run's directory. Linux alone can promise that;
elsewhere the command is started without the promise.

With `--grace SECONDS --log FILE` it holds a training process under ssh, and tells it to stop at the end of standard
input, which is all that a host hears of a connection or a launcher that is gone, or at a SIGTERM or SIGHUP, as when the
machine is shut down. What the process prints is passed on, and kept in the file, in whose folder there is one process
at a time.

Imports nothing heavy.
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

  WORD...           the command line of a process; it gets SIGTERM when standard input ends
  --grace SECONDS   after which it then gets SIGKILL
  --log FILE        a new file for what it prints; where there is one already, the process is not started a second time
  --parent PID      becomes the process, which ends with this parent
  --help            prints this and exits"""
PR_SET_PDEATHSIG = 1
_PATIENCE = 10.0  # seconds beyond the grace in which the process of an earlier attempt ends


def start_process(
    words: Sequence[str], env: Mapping[str, str] = MappingProxyType({}), *, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Starts a process that dies with this one, in a session of its own; its status lines and output are to be read.

    Args:
        words: its command line.
        env: environment variables on top of this process's.
        stdin: its standard input.
    """
    parent = ["--parent", str(os.getpid())]
    return subprocess.Popen(
        [sys.executable, "-m", "sophia_levanter.cluster.host", *parent, "--", *words],
        env=os.environ | dict(env) | ON_STDOUT,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is the launcher's to pass on
    )


def kill_group(leader: int) -> None:
    """Ends a process of `start_process` at once with all that it has started, be it there itself or not."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says.

    Returns:
        The process's exit status, 128 + N if signal N ended it; 1 if it was started before, 2 for bad input.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    own = given[: given.index("--")] if "--" in given else given
    # A --help behind the dashes is the process's.
    return run_command(own, lambda arguments: _run(arguments, given[len(own) + 1 :]), usage=USAGE)


def _run(given: Sequence[str], words: Sequence[str]) -> int:
    arguments = parse_arguments(given, options=("--grace", "--log", "--parent"))
    if "--parent" in arguments.options:
        _become(words, whole_number("--parent", arguments.options["--parent"]))
    grace = whole_number("--grace", arguments.needed("--grace", "SECONDS", "then comes SIGKILL"))
    log_file = Path(arguments.needed("--log", "FILE", "what the process prints is kept there"))
    if not words:
        raise InputError("-- WORD... is missing; it is the command line of the process")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        log = log_file.open("xb", buffering=0)
    except FileExistsError:
        # gcloud connects again where a connection has broken, and would run a second process beside the first.
        print(f"error: {log_file} exists: the process was started once, and its connection is gone", file=sys.stderr)
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
    """Runs a process to its end.

    Args:
        words: its command line.
        grace: seconds between the SIGTERM and the SIGKILL.
        log: for what it prints.

    Returns:
        Its exit status; 128 + N if signal N ended it.
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
    # What it has started must not hold the devices, nor the pipe.
    kill_group(child.pid)
    printing.join(timeout=5)
    return 128 - status if status < 0 else status


@contextlib.contextmanager
def _alone_on_this_host(folder: Path, seconds: float) -> Iterator[None]:
    """Waits until the process of an earlier attempt is gone, which holds the devices; it is told to end."""
    with (folder / "lock").open("a+") as lock:
        deadline = time.monotonic() + seconds
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(f"{folder}: the process of an earlier attempt does not end") from None
            if not told:
                print("waiting until the process of an earlier attempt has ended", flush=True)
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
    """To standard output and the log, each as long as it takes it: a process that saves must not fail at printing.

    Status lines are for the launcher, not for the log.
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
