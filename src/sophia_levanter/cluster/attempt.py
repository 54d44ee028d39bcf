"""The processes of one attempt, as the launcher's machine sees them: started, listened to, told to stop, killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from sophia_levanter.cluster.backend import HostCommand
from sophia_levanter.cluster.child import bound_to_this_process
from sophia_levanter.config.build import MASK
from sophia_levanter.status import ON_STDOUT, Failure, Progress, read_status

_LABELLED = re.compile(r" *(\d+): (.*)")
TAIL_LINES = 20
SHORTEST_SECRET = 6  # in characters: shorter ones would be found everywhere


class Attempt:
    """Runs commands and keeps what they print, a file for each of the run's processes.

    Args:
        commands: what to start.
        directory: for the logs, process-N.log.
        on_line: told of every line: the log's name, and the line.
        secrets: texts that no log is to hold.

    Attributes:
        progress: of the run, as its first process last reported it.
        failures: that processes reported.
    """

    def __init__(
        self,
        commands: Sequence[HostCommand],
        directory: Path,
        on_line: Callable[[str, str], None],
        secrets: Collection[str] = (),
    ) -> None:
        self._commands = commands
        self._directory = directory
        self._on_line = on_line
        parts = {part.strip() for secret in secrets for part in secret.splitlines()}
        # The longest first: one secret may be the beginning of another.
        self._secrets = sorted((part for part in parts if len(part) >= SHORTEST_SECRET), key=len, reverse=True)
        self.progress: Progress | None = None
        self.failures: list[Failure] = []
        self._logs: dict[str, IO[str]] = {}
        self._tails: dict[str, deque[str]] = {command.label: deque(maxlen=TAIL_LINES) for command in commands}
        self._lock = threading.Lock()
        self._killed: set[int] = set()
        self._ended: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                self._processes.append(self._start(command))
        except OSError:
            self.kill()
            raise
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in zip(commands, self._processes, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    def _start(self, command: HostCommand) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            bound_to_this_process(command.words),
            env=os.environ | dict(command.env) | ON_STDOUT,
            stdin=subprocess.PIPE if command.by_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the launcher's to pass on
        )

    def poll(self) -> list[int | None]:
        """The exit status of each command, -N for signal N; None for those that live or were killed by `kill`."""
        for index, process in enumerate(self._processes):
            if process.poll() is not None and index not in self._ended:
                self._ended.append(index)
        return [None if i in self._killed else process.returncode for i, process in enumerate(self._processes)]

    @property
    def all_ended(self) -> bool:
        """Whether no command lives, as `poll` last saw it."""
        return len(self._ended) == len(self._processes)

    def stop(self) -> None:
        """Have all of them save and end."""
        for command, process in zip(self._commands, self._processes, strict=True):
            if process.poll() is not None:
                continue
            if command.by_stdin:
                assert process.stdin is not None
                process.stdin.close()
            else:
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End those that live, at once, with all that they have started."""
        for index, process in enumerate(self._processes):
            if process.poll() is None:
                self._killed.add(index)
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def close(self) -> None:
        """Leave no process, nor what one that has ended left behind, and the logs complete."""
        self.kill()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for reader in self._readers:
            reader.join(timeout=5)
        with self._lock:
            for log in self._logs.values():
                log.close()
            self._logs.clear()

    def tail(self, label: str) -> list[str]:
        """The last lines of a command."""
        return list(self._tails[label])

    @property
    def first_status(self) -> int | None:
        """The exit status of the command that was the first to end by itself; None if none did."""
        return next((self._processes[i].returncode for i in self._ended if i not in self._killed), None)

    def culprit(self) -> str | None:
        """The label of the first command that ended other than well; None if none did."""
        for index in self._ended:
            if index not in self._killed and self._processes[index].returncode:
                return self._commands[index].label
        return None

    def _read(self, command: HostCommand, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            whole = line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
            label = command.label
            if command.labelled and (match := _LABELLED.match(line)):
                label, line = f"process-{match[1]}", match[2]
            if status := read_status(line):
                self._note(label, status)
                continue
            self._tails[command.label].append(self._masked(whole))
            line = self._masked(line)
            # A full disk or a reader that has left must not stop the reading: the process would wait for it for ever.
            with contextlib.suppress(OSError):
                self._keep(label, line)
            with contextlib.suppress(OSError):
                self._on_line(label, line)

    def _note(self, label: str, status: Progress | Failure) -> None:
        if isinstance(status, Failure):
            # Masked here, after decoding: JSON may escape a character of a secret.
            self.failures.append(replace(status, message=self._masked(status.message)))
        elif label == "process-0":
            self.progress = status

    def _masked(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return text

    def _keep(self, label: str, line: str) -> None:
        with self._lock:
            if label not in self._logs:
                path = self._directory / f"{label}.log"
                self._logs[label] = path.open("a", encoding="utf-8", buffering=1)
            self._logs[label].write(f"{time.strftime('%H:%M:%S')} {line}\n")
