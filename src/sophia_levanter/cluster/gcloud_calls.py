"""Calls of gcloud, and what it answers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sophia_levanter.errors import InputError

# The end of what was printed that an error shows.
_TAIL_LINES = 15
# What only a person can put right. All else, such as a name server that does not answer, may pass.
_FINAL = ("INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED", "NOT_FOUND", "FAILED_PRECONDITION")
_USAGE = 2  # gcloud's exit status for a command line that it does not understand
_SSH_FAILED = 255  # ssh's own
_NO_ACCOUNT = "gcloud auth login"  # part of what gcloud says where nobody is logged in


class Stopped(Exception):
    """The launcher was told to stop while gcloud ran."""


@dataclass(frozen=True)
class Answer:
    """What gcloud answered.

    Attributes:
        status: its exit status.
        output: what it printed.
        errors: what it printed on standard error.
    """

    status: int
    output: str
    errors: str

    @property
    def error(self) -> str:
        """gcloud's own first line about what is wrong, without the name of its command."""
        match = re.search(r"^ERROR: (?:\(gcloud[\w.-]*\) )?(.+)", self.errors, re.MULTILINE)
        return match[1].strip() if match else ((self.errors.strip().splitlines() or [""])[-1])

    @property
    def code(self) -> str | None:
        """Google's name of the error: NOT_FOUND."""
        match = re.match(r"([A-Z]+(?:_[A-Z]+)*): ", self.error)
        return match[1] if match else None

    @property
    def final(self) -> bool:
        """Whether asking again would not help."""
        return self.code in _FINAL or self.status == _USAGE or _NO_ACCOUNT in self.errors

    @property
    def unreachable(self) -> bool:
        """Whether a command for a host did not get there, as opposed to one that failed there."""
        return self.status == _SSH_FAILED or "ERROR: (gcloud" in self.errors or "gcloud crashed" in self.errors

    @property
    def tail(self) -> str:
        """The last lines of all that was printed."""
        lines = [line.rstrip() for line in f"{self.output}\n{self.errors}".splitlines() if line.strip()]
        return "\n".join(lines[-_TAIL_LINES:])

    def json(self) -> dict[str, Any]:
        """What it describes."""
        return json.loads(self.output)


def call(words: Sequence[str], stopped: Callable[[], bool] = lambda: False) -> Answer:
    """Runs gcloud to its end.

    Args:
        words: the command line.
        stopped: whether not to wait any longer.

    Raises:
        InputError: if gcloud is not there.
        Stopped: if `stopped` says so; gcloud is gone.
    """
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise InputError(missing_gcloud()) from None
    try:
        while True:
            try:
                output, errors = process.communicate(timeout=0.2)
                return Answer(process.returncode, output, errors)
            except subprocess.TimeoutExpired:
                if stopped():
                    raise Stopped from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def missing_gcloud() -> str:
    """What is said where gcloud is not installed."""
    return "backend gcloud: there is no gcloud command; install it from https://cloud.google.com/sdk/docs/install"
