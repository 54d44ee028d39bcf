"""An attempt at a run: start, monitor, stop and kill processes on the launcher's machine, and determine the outcome."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

from sophia_levanter.cluster.backend import HostCommand
from sophia_levanter.cluster.host import kill_group, start_process
from sophia_levanter.config.build import MASK
from sophia_levanter.errors import DirectoryInUse
from sophia_levanter.status import BAD_INPUT, DONE, PREEMPTED, UNAVAILABLE, Failure, Progress, read_status

_LABELLED = re.compile(r" *(\d+): (.*)")
TAIL_LINES = 20
RESUMES = "the next attempt will resume from the last checkpoint"
SHORTEST_SECRET = 6  # in characters; shorter secrets would match ordinary text
Kind = Literal["done", "refused", "stopped", "preempted", "failed", "unavailable"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of an attempt.

    Attributes:
        kind: done, refused (because of bad input), stopped (because the launcher was asked to stop), preempted, failed
            or unavailable (because machines were missing).
        reason: a one-line explanation.
        progress: the last progress reported by the run in this attempt.
        tail: the last lines printed by the first process that failed.
    """

    kind: Kind
    reason: str
    progress: Progress | None = None
    tail: Sequence[str] = ()


@dataclass(frozen=True)
class Ending:
    """The results of an attempt after all of its commands have ended.

    Attributes:
        statuses: the exit status of each command, -N for signal N; None if the launcher had to kill the command.
        first: the exit status of the first command that ended on its own; None if all were killed.
        culprit: the label of the first command that ended on its own with a nonzero status; None if none did.
        tail: the last lines printed by the culprit.
        progress: the last progress reported by the run.
        failures: the failures reported by processes.
    """

    statuses: Sequence[int | None]
    first: int | None = None
    culprit: str | None = None
    tail: Sequence[str] = ()
    progress: Progress | None = None
    failures: Sequence[Failure] = ()

    def outcome(self, *, told_to_stop: bool, has_begun: bool) -> Outcome:
        """Determine the outcome of the attempt from the exit statuses.

        Args:
            told_to_stop: whether the launcher was asked to stop.
            has_begun: whether an earlier attempt reported progress. If so, its input was accepted, and a refusal now
                must have another cause, such as a disk error.
        """
        ended = [status for status in self.statuses if status is not None]
        all_well = len(ended) == len(self.statuses) and all(status in (DONE, PREEMPTED) for status in ended)
        if all_well and PREEMPTED not in ended:
            return self._outcome("done", "the run is complete")
        if told_to_stop:
            saved = "; the run was saved" if self.progress else ""
            return self._outcome(
                "stopped",
                f"as requested{saved}" if all_well else f"as requested, but without saving; {RESUMES}",
            )
        if all_well:
            saved = " and was saved" if self.progress else ""
            return self._outcome("preempted", f"the run was asked to stop{saved}")
        if self.statuses == [UNAVAILABLE]:
            return self._outcome("unavailable", self.failures[-1].message if self.failures else "machines are missing")
        if self.first == PREEMPTED:
            return self._outcome("preempted", f"{self.culprit} was asked to stop; {RESUMES}")
        if not ended or any(status != BAD_INPUT for status in ended):
            return self._outcome("failed", f"{self.culprit or 'a process'} {_how(ended)}", self.tail)
        reason = self.failures[-1].message if self.failures else "the run rejected its input"
        # It may take a moment for the lock of an earlier attempt on another machine to be released.
        if has_begun or any(failure.reason == DirectoryInUse.reason for failure in self.failures):
            return self._outcome("failed", reason, self.tail)
        return self._outcome("refused", reason, () if self.failures else self.tail)

    def _outcome(self, kind: Kind, reason: str, tail: Sequence[str] = ()) -> Outcome:
        return Outcome(kind, reason, self.progress, tail)


def _how(ended: Sequence[int]) -> str:
    status = next((status for status in ended if status not in (DONE, PREEMPTED)), None)
    if status is None:
        return "exited, but others did not"
    number = -status if status < 0 else status - 128
    if number in {s.value for s in signal.Signals}:
        return f"was killed by {signal.Signals(number).name}"
    return f"exited with status {status}"


class Attempt:
    """Runs commands and logs the output of each training process to a separate file.

    Args:
        commands: the commands to start.
        directory: the directory for the logs, process-N.log.
        on_line: function called for each line of output with the log's name and the line.
        secrets: strings to mask in logs.

    Attributes:
        progress: the last progress reported by the first process of the run.
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
        # Longest first, because one secret may be a prefix of another.
        self._secrets = sorted((part for part in parts if len(part) >= SHORTEST_SECRET), key=len, reverse=True)
        self.progress: Progress | None = None
        self._failures: list[Failure] = []
        self._logs: dict[str, IO[str]] = {}
        self._tails: dict[str, deque[str]] = {command.label: deque(maxlen=TAIL_LINES) for command in commands}
        self._lock = threading.Lock()
        self._killed: set[int] = set()
        self._ended: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                stdin = subprocess.PIPE if command.by_stdin else subprocess.DEVNULL
                self._processes.append(start_process(command.words, command.env, stdin=stdin))
        except OSError:
            self.kill()
            raise
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in zip(commands, self._processes, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    def poll(self) -> list[int | None]:
        """Return the exit status of each command, -N for signal N; None if it is running or was killed by `kill`."""
        for index, process in enumerate(self._processes):
            if process.poll() is not None and index not in self._ended:
                self._ended.append(index)
        return [None if i in self._killed else process.returncode for i, process in enumerate(self._processes)]

    @property
    def all_ended(self) -> bool:
        """Whether all commands had ended at the last `poll`."""
        return len(self._ended) == len(self._processes)

    def stop(self) -> None:
        """Tell all processes to save and exit."""
        for command, process in zip(self._commands, self._processes, strict=True):
            if process.poll() is not None:
                continue
            if command.by_stdin:
                assert process.stdin is not None
                process.stdin.close()
            else:
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill all running processes and their descendants."""
        for index, process in enumerate(self._processes):
            if process.poll() is None:
                self._killed.add(index)
                kill_group(process.pid)
        for process in self._processes:
            process.wait()

    def close(self) -> None:
        """Kill all processes, including the descendants of processes that have ended, and close the logs."""
        self.kill()
        for process in self._processes:
            kill_group(process.pid)
        for reader in self._readers:
            reader.join(timeout=5)
        with self._lock:
            for log in self._logs.values():
                log.close()
            self._logs.clear()

    def ending(self) -> Ending:
        """Return the results of the attempt. All commands must have ended."""
        statuses = self.poll()
        ended = [index for index in self._ended if index not in self._killed]
        first = self._processes[ended[0]].returncode if ended else None
        bad = next((self._commands[index].label for index in ended if statuses[index]), None)
        tail = list(self._tails[bad]) if bad else ()
        return Ending(statuses, first, bad, tail, self.progress, self._failures)

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
            # A full disk or a closed output must not end this loop, because the process would then block forever.
            with contextlib.suppress(OSError):
                self._keep(label, line)
            with contextlib.suppress(OSError):
                self._on_line(label, line)

    def _note(self, label: str, status: Progress | Failure) -> None:
        if isinstance(status, Failure):
            # Mask the message after decoding, because JSON may escape characters in a secret.
            self._failures.append(replace(status, message=self._masked(status.message)))
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
