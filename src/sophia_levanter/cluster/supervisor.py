"""Supervise a run: start attempts, each in new processes, until the run is done or a limit is reached."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sophia_levanter.cluster.attempt import Attempt, Outcome
from sophia_levanter.cluster.backend import Backend, Job, Say, Unavailable
from sophia_levanter.cluster.config import ClusterConfig
from sophia_levanter.cluster.record import LaunchRecord, Status
from sophia_levanter.errors import InputError, counted
from sophia_levanter.status import BAD_INPUT, DONE, FAILURE, INTERRUPTED, PREEMPTED

POLL_SECONDS = 0.2
LONGEST_BACK_OFF = 300.0  # seconds
STATUS_SECONDS = 2.0
# After the first process fails, the other processes have this many seconds to report their own failures.
GATHER_SECONDS = 2.0
STATES = {DONE: "done", FAILURE: "failed", BAD_INPUT: "refused", PREEMPTED: "stopped", INTERRUPTED: "stopped"}


class Budgets:
    """Counts a run's failed and preempted attempts and decides when to give up, based on the limits in `policy`."""

    def __init__(self, policy: ClusterConfig) -> None:
        self._policy = policy
        self._failed_at: int | None = None
        self._same_step = 0
        self._in_a_row = 0
        self.failures = 0
        self.preemptions = 0

    def charge(self, outcome: Outcome) -> str | None:
        """Count an attempt that was preempted, failed or could not start.

        Returns:
            The reason for giving up; None if another attempt may start.
        """
        if outcome.kind == "preempted":
            self.preemptions += 1
            self._same_step = 0
            self._in_a_row = 0 if outcome.progress else self._in_a_row + 1
            if self.preemptions > self._policy.max_preemptions:
                return f"{counted(self.preemptions, 'preemption')} (max_preemptions)"
            return None
        self.failures += 1
        step = outcome.progress.step if outcome.progress else None
        if outcome.kind == "failed":
            self._same_step = self._same_step + 1 if step == self._failed_at else 1
            self._in_a_row = self._in_a_row + 1 if step == self._failed_at else 1
            self._failed_at = step
        else:
            self._in_a_row += 1
        if self._same_step >= self._policy.crash_loop:
            at = "before the first step" if step is None else f"after step {step}"
            return f"{counted(self._same_step, 'consecutive failure')}, each {at} (crash_loop)"
        if self.failures > self._policy.max_failures:
            return f"{counted(self.failures, 'failure')} (max_failures)"
        return None

    @property
    def pause(self) -> float:
        """Seconds to wait before the next attempt.

        The delay doubles after each attempt without progress and is 0 after a preempted attempt with progress.
        """
        if not self._in_a_row:
            return 0.0
        return min(LONGEST_BACK_OFF, self._policy.back_off * 2 ** min(self._in_a_row - 1, 10))


class Supervisor:
    """Runs a job on a backend within the limits in `policy`, updating `record` and printing messages with `say`."""

    def __init__(self, backend: Backend, job: Job, policy: ClusterConfig, record: LaunchRecord, say: Say) -> None:
        self._backend = backend
        self._job = job
        self._policy = policy
        self._record = record
        self._say = say
        self._budgets = Budgets(policy)
        self._signal: signal.Signals | None = None
        self._interrupts = 0
        self._has_begun = False
        self._status = Status("starting", policy.backend, backend.num_processes)
        self._written = 0.0

    def run(self) -> int:
        """Start attempts until the run ends.

        Returns:
            Exit status: 0 if done, 1 after giving up, 2 on bad input, 75 on SIGTERM or `launch stop`, 130 on Ctrl-C.
        """
        with self._signals_noted():
            try:
                status = self._until_the_end()
            finally:
                self._backend.release(self._tell)
        self._update(state=STATES[status], exit_status=status)
        return status

    def _until_the_end(self) -> int:
        while True:
            number = self._record.next_attempt()
            self._record.attempt_directory(number).mkdir(parents=True)
            self._update(state="starting", attempt=number)
            began = time.monotonic()
            outcome = self._attempt(number)
            given_up = None
            if outcome.kind in ("preempted", "failed", "unavailable"):
                given_up = self._budgets.charge(outcome)
            if outcome.kind == "refused":
                for line in outcome.tail:
                    self._say(f"  | {line}")
                self._say(f"error: {outcome.reason}")
                return BAD_INPUT
            self._tell_outcome(outcome, time.monotonic() - began)
            if outcome.kind == "done":
                return DONE
            if outcome.kind == "stopped":
                return self._stopped_status
            if given_up is not None:
                self._say(f"error: gave up after {given_up}; the logs are in {self._record.directory}")
                return FAILURE
            self._pause()
            if self._told_to_stop():
                self._tell("stop requested; run the same command again to continue")
                return self._stopped_status

    @property
    def _stopped_status(self) -> int:
        return INTERRUPTED if self._signal == signal.SIGINT else PREEMPTED

    def _attempt(self, number: int) -> Outcome:
        try:
            self._backend.prepare(self._job, number, self._tell, self._told_to_stop)
            if self._told_to_stop():
                return Outcome("stopped", "before any process started")
            commands = self._backend.commands(self._job, number)
        except (InputError, Unavailable) as error:
            reason, *details = str(error).splitlines()
            # A run that has trained was accepted before, so the cause may pass.
            refused = isinstance(error, InputError) and not self._has_begun
            return Outcome("refused" if refused else "unavailable", reason, tail=details)
        secrets = [value for name in self._policy.secrets if (value := os.environ.get(name))]
        attempt = Attempt(commands, self._record.attempt_directory(number), self._hear, secrets)
        try:
            self._follow(attempt)
        finally:
            attempt.close()
        outcome = attempt.ending().outcome(told_to_stop=self._told_to_stop(), has_begun=self._has_begun)
        self._has_begun |= attempt.progress is not None
        if outcome.kind == "failed" and self._backend.was_preempted():
            return Outcome("preempted", f"machines were lost; {outcome.reason}", attempt.progress)
        return outcome

    def _follow(self, attempt: Attempt) -> None:
        """Wait until all processes have ended. If only some of them end, kill the others after a delay."""
        deadline = float("inf")
        told = ended_well = False
        while True:
            statuses = attempt.poll()
            if attempt.all_ended:
                return
            now = time.monotonic()
            ended = [status for status in statuses if status is not None]
            if any(status not in (DONE, PREEMPTED) for status in ended):
                # The other processes would wait for the failed process forever.
                deadline = min(deadline, now + GATHER_SECONDS)
            elif ended and not ended_well:
                ended_well = True
                deadline = min(deadline, now + self._policy.stop_timeout)
            if self._told_to_stop() and not told:
                told = True
                self._tell("stop requested; the run will save and stop; a second Ctrl-C stops it immediately")
                attempt.stop()
                deadline = min(deadline, now + self._policy.stop_timeout)
            if now > deadline or self._interrupts > 1:
                attempt.kill()
                return
            if now > self._written + STATUS_SECONDS:
                self._update(state="running", progress=attempt.progress or self._status.progress)
            time.sleep(POLL_SECONDS)

    def _tell(self, line: str) -> None:
        """Print a line with a prefix that distinguishes it from the output of the run."""
        self._say(f"launch: {line}")

    def _tell_outcome(self, outcome: Outcome, seconds: float) -> None:
        budgets, policy = self._budgets, self._policy
        self._update(
            failures=budgets.failures,
            preemptions=budgets.preemptions,
            progress=outcome.progress or self._status.progress,
        )
        for line in outcome.tail:
            self._say(f"  | {line}")
        parts = [counted(self._backend.num_processes, "process")]
        parts += [str(outcome.progress)] if outcome.progress else []
        self._tell(
            f"attempt {self._status.attempt}: {', '.join(parts)}, {seconds:.0f} s; "
            f"{outcome.kind}: {outcome.reason}; "
            f"failures {budgets.failures} of {policy.max_failures}, "
            f"preemptions {budgets.preemptions} of {policy.max_preemptions}"
        )

    def _pause(self) -> None:
        if self._told_to_stop() or not (seconds := self._budgets.pause):
            return
        self._tell(f"the next attempt starts in {seconds:.0f} s")
        self._update(state="waiting")
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._told_to_stop():
            time.sleep(POLL_SECONDS)

    def _hear(self, label: str, line: str) -> None:
        if label == "process-0":
            self._say(line)

    def _update(self, **changes: Any) -> None:
        self._status = dataclasses.replace(self._status, **changes)
        self._written = time.monotonic()
        # If this fails, other commands see an outdated status, but the run is not affected.
        with contextlib.suppress(OSError):
            self._record.write(self._status)

    def _told_to_stop(self) -> bool:
        return self._signal is not None or self._record.asked_to_stop

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self._signal = self._signal or signal.Signals(number)
            self._interrupts += number == signal.SIGINT

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # Under nohup, SIGHUP is ignored and must stay ignored.
        before = {n: signal.signal(n, note) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
