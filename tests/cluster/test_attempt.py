"""How an attempt's exit statuses are read, and when a run is given up."""

import pytest

from sophia_levanter.cluster.attempt import Ending, Outcome
from sophia_levanter.cluster.config import LocalCluster
from sophia_levanter.cluster.supervisor import Budgets
from sophia_levanter.status import Failure, Progress

UNSAVED = "as requested, but without saving; the next attempt will resume from the last checkpoint"
ASKED = "process-1 was asked to stop; the next attempt will resume from the last checkpoint"


@pytest.mark.parametrize(
    ("statuses", "told", "kind", "reason"),
    [
        ([0, 0], False, "done", "the run is complete"),
        ([0, 0], True, "done", "the run is complete"),
        ([75, 75], False, "preempted", "the run was asked to stop and was saved"),
        ([75, 75], True, "stopped", "as requested; the run was saved"),
        ([75, None], True, "stopped", UNSAVED),
        ([75, None], False, "preempted", ASKED),
        ([75, -6], False, "preempted", ASKED),
        ([0, None], False, "failed", "process-1 exited, but others did not"),
        ([-9, 75], False, "failed", "process-1 was killed by SIGKILL"),
        ([2, None], False, "refused", "model.num_heads 3: no"),
        ([2, -9], False, "failed", "process-1 exited with status 2"),
        ([-9, None], False, "failed", "process-1 was killed by SIGKILL"),
        ([None, 137], False, "failed", "process-1 was killed by SIGKILL"),
        ([1, -6], False, "failed", "process-1 exited with status 1"),
        ([-6, -6], True, "stopped", UNSAVED),
        ([None, None], True, "stopped", UNSAVED),
    ],
)
def test_statuses(statuses, told, kind, reason):
    failures = [Failure("bad_input", "model.num_heads 3: no")]
    first = next((status for status in statuses if status is not None), None)
    ending = Ending(statuses, first, "process-1", progress=Progress(3), failures=failures)
    outcome = ending.outcome(told_to_stop=told, has_begun=False)
    assert (outcome.kind, outcome.reason, outcome.progress) == (kind, reason, Progress(3))


def test_what_has_not_trained_has_saved_nothing():
    stopped = Ending([75], 75, "process-0").outcome(told_to_stop=True, has_begun=False)
    assert (stopped.kind, stopped.reason) == ("stopped", "as requested")
    preempted = Ending([75], 75, "process-0").outcome(told_to_stop=False, has_begun=False)
    assert (preempted.kind, preempted.reason) == ("preempted", "the run was asked to stop")


def test_a_directory_that_is_still_in_use_is_tried_again():
    failures = [Failure("directory_in_use", "run is in use"), Failure("bad_input", "run is in use")]
    outcome = Ending([2, 2], 2, "process-0", failures=failures).outcome(told_to_stop=False, has_begun=False)
    assert (outcome.kind, outcome.reason) == ("failed", "run is in use")


def test_what_is_refused_once_the_run_has_trained_is_a_failure():
    failures = [Failure("bad_input", "trainer.run_dir run cannot be used: Stale file handle")]
    ending = Ending([2, None], 2, "process-0", ["tail"], failures=failures)
    outcome = ending.outcome(told_to_stop=False, has_begun=True)
    assert (outcome.kind, outcome.tail) == ("failed", ["tail"])


@pytest.mark.parametrize("has_begun", [False, True])
def test_machines_that_are_missing_are_not_a_crash(has_begun):
    failures = [Failure("unavailable", "no nodes were found")]
    ending = Ending([69], 69, "ray", ["tail"], failures=failures)
    outcome = ending.outcome(told_to_stop=False, has_begun=has_begun)
    assert (outcome.kind, outcome.reason, outcome.tail) == ("unavailable", "no nodes were found", ())
    assert ending.outcome(told_to_stop=True, has_begun=has_begun).kind == "stopped"


def failed_at(step):
    return Outcome("failed", "because", None if step is None else Progress(step))


PREEMPTED = Outcome("preempted", "because", Progress(7))


def test_failures_at_one_step_are_a_crash_loop():
    budgets = Budgets(LocalCluster(crash_loop=3))
    assert [budgets.charge(failed_at(step)) for step in (5, 5, 6, 6)] == [None] * 4
    assert budgets.charge(failed_at(6)) == "3 consecutive failures, each after step 6 (crash_loop)"
    budgets = Budgets(LocalCluster(crash_loop=2))
    assert budgets.charge(failed_at(None)) is None
    assert "each before the first step" in budgets.charge(failed_at(None))


def test_a_preemption_breaks_a_crash_loop():
    budgets = Budgets(LocalCluster(crash_loop=2))
    assert [budgets.charge(o) for o in (failed_at(6), PREEMPTED, failed_at(6))] == [None] * 3
    assert budgets.charge(failed_at(6)) is not None


def test_the_budgets_are_apart():
    budgets = Budgets(LocalCluster(max_failures=2, max_preemptions=1))
    assert [budgets.charge(o) for o in (failed_at(1), PREEMPTED, failed_at(2))] == [None] * 3
    assert (budgets.failures, budgets.preemptions) == (2, 1)
    assert budgets.charge(PREEMPTED) == "2 preemptions (max_preemptions)"
    assert budgets.charge(failed_at(3)) == "3 failures (max_failures)"
    assert Budgets(LocalCluster(max_failures=0)).charge(failed_at(3)) == "1 failure (max_failures)"


def test_what_could_not_begin_is_a_failure_and_no_crash_loop():
    budgets = Budgets(LocalCluster(crash_loop=1, max_failures=1))
    missing = Outcome("unavailable", "no machines")
    assert budgets.charge(missing) is None
    assert budgets.charge(missing) == "2 failures (max_failures)"


def test_the_pause_doubles_until_the_run_comes_further():
    budgets = Budgets(LocalCluster(back_off=10, crash_loop=100, max_failures=100))
    pauses = []
    for outcome in [failed_at(1)] * 7 + [failed_at(2), PREEMPTED, Outcome("preempted", "at once")]:
        budgets.charge(outcome)
        pauses.append(budgets.pause)
    assert pauses == [10, 20, 40, 80, 160, 300, 300, 10, 0, 10]
