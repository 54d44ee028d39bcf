"""How an attempt ended, and whether there is to be another."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sophia_levanter.cluster.config import ClusterConfig
from sophia_levanter.cluster.record import counted
from sophia_levanter.errors import DirectoryInUse
from sophia_levanter.exit_status import BAD_INPUT, DONE, PREEMPTED
from sophia_levanter.status import Failure, Progress

LONGEST_BACK_OFF = 300.0


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        kind: done; refused for bad input; stopped as the launcher was told; preempted; failed; or unavailable, where
            it could not begin.
        reason: for people.
        progress: as the run last reported it in this attempt.
        tail: the last lines of the process that ended first.
    """

    kind: Literal["done", "refused", "stopped", "preempted", "failed", "unavailable"]
    reason: str
    progress: Progress | None = None
    tail: Sequence[str] = ()


def outcome_of(
    statuses: Sequence[int | None],
    first: int | None,
    culprit: str | None,
    tail: Sequence[str],
    progress: Progress | None,
    failures: Sequence[Failure],
    *,
    told_to_stop: bool,
    has_begun: bool,
) -> Outcome:
    """What the exit statuses of an attempt's commands say.

    Args:
        statuses: of each command, -N for signal N; None for those that the launcher had to kill.
        first: the status of the one that was the first to end.
        culprit: the command that was the first to end other than well.
        tail: the last lines that it printed.
        progress: of the run, as it last reported it.
        failures: that processes reported.
        told_to_stop: whether the launcher was.
        has_begun: whether an earlier attempt has trained: what is refused then was accepted before, so it is not input
            that is at fault but, say, a disk.
    """
    ended = [status for status in statuses if status is not None]
    all_well = len(ended) == len(statuses) and all(status in (DONE, PREEMPTED) for status in ended)
    if all_well and PREEMPTED not in ended:
        return Outcome("done", "the run is complete", progress)
    if told_to_stop:
        saved = "; the run is saved" if progress else ""
        reason = f"as asked{saved}" if all_well else "as asked, and not saved: the last checkpoint counts"
        return Outcome("stopped", reason, progress)
    if all_well:
        return Outcome("preempted", "the run was told to stop" + (", and is saved" if progress else ""), progress)
    if first == PREEMPTED:
        return Outcome("preempted", f"{culprit} was told to stop; the last checkpoint counts", progress)
    if ended and all(status == BAD_INPUT for status in ended):
        reason = failures[-1].message if failures else "its input is at fault"
        # A lock may be that of an earlier attempt on another machine, which needs a moment to be gone.
        in_use = any(failure.reason == DirectoryInUse.reason for failure in failures)
        if has_begun or in_use:
            return Outcome("failed", reason, progress, tail)
        return Outcome("refused", reason, progress, () if failures else tail)
    return Outcome("failed", f"{culprit or 'a process'} {_how(ended)}", progress, tail)


def _how(ended: Sequence[int]) -> str:
    status = next((status for status in ended if status not in (DONE, PREEMPTED)), None)
    if status is None:
        return "ended, and others did not"
    number = -status if status < 0 else status - 128
    if number in {s.value for s in signal.Signals}:
        return f"was ended by {signal.Signals(number).name}"
    return f"ended with status {status}"


class Budgets:
    """Counts how often a run has failed and was preempted, and says when it is to be given up.

    Args:
        policy: how often it may.

    Attributes:
        failures: so far.
        preemptions: so far.
    """

    def __init__(self, policy: ClusterConfig) -> None:
        self._policy = policy
        self._failed_at: int | None = None
        self._same_step = 0
        self._in_a_row = 0
        self.failures = 0
        self.preemptions = 0

    def charge(self, outcome: Outcome) -> str | None:
        """Count an attempt that was preempted, failed or could not begin.

        Returns:
            Why there is to be no other; None if there is.
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
            return f"{counted(self._same_step, 'attempt')} in a row failed {at} (crash_loop), and another would too"
        if self.failures > self._policy.max_failures:
            return f"{counted(self.failures, 'failure')} (max_failures)"
        return None

    @property
    def pause(self) -> float:
        """Seconds before the next attempt: more with each that came no further; none after one that was preempted."""
        if not self._in_a_row:
            return 0.0
        return min(LONGEST_BACK_OFF, self._policy.back_off * 2 ** min(self._in_a_row - 1, 10))
