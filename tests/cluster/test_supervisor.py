"""Attempts of runs whose training processes are lines of shell: what is started, ended, counted and said."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from launched import lives, wait_until_gone

from sophia_levanter.cluster import supervisor
from sophia_levanter.cluster.attempt import Attempt
from sophia_levanter.cluster.backend import HostCommand, Job, Unavailable
from sophia_levanter.cluster.config import LocalCluster
from sophia_levanter.cluster.record import LaunchRecord
from sophia_levanter.cluster.supervisor import Supervisor
from sophia_levanter.errors import InputError
from sophia_levanter.files import lock

STEP = "step 4/9"
# A process that tells the launcher its step, and people another line.
REPORTS = f"""echo '{STEP}'; echo '@status {{"step": 4, "total": 9, "loss": 2.5, "tokens_per_second": 1234}}'"""
REFUSES = """echo '@status {"failed": "bad_input", "message": "model.num_heads 3: no"}'; exit 2"""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "GATHER_SECONDS", 0.2)


class Scripts:
    """A backend whose attempts are scripts, each a list with one for each process."""

    def __init__(self, *attempts, preempted=(), labelled=False, by_stdin=False):
        self.attempts = attempts
        self.preempted = preempted
        self.options = {"labelled": labelled, "by_stdin": by_stdin}
        self.num_processes = max(len(a) for a in attempts if isinstance(a, list))
        self.started = 0
        self.released = 0

    def describe(self, job):
        return []

    def prepare(self, job, attempt, say, stopped):
        self.started += 1
        if isinstance(self._now, Exception):
            raise self._now

    @property
    def _now(self):
        return self.attempts[self.started - 1]

    def commands(self, job, attempt):
        return [
            HostCommand(f"process-{i}", ["bash", "-c", s], {"N": str(i)}, **self.options)
            for i, s in enumerate(self._now)
        ]

    def was_preempted(self):
        return self.started in self.preempted

    def release(self, say):
        self.released += 1


def run(tmp_path, backend, **policy):
    """The exit status, the lines that were said, and the last status."""
    job = Job(tmp_path / "run", tmp_path / "run" / "launch")
    record = LaunchRecord(job.directory)
    said = []
    policy = {"back_off": 0.0, "stop_timeout": 5, **policy}
    with record.held():
        status = Supervisor(
            backend, job, LocalCluster(processes=backend.num_processes, **policy), record, said.append
        ).run()
    assert backend.released == 1
    return status, said, record


def test_all_processes_end_well(tmp_path):
    status, said, record = run(tmp_path, Scripts([f"{REPORTS}; echo tail >&2", "echo two"]))
    assert status == 0
    *lines, outcome = said
    assert lines == [STEP, "tail"]
    told = r"launch: attempt 1: 2 processes, step 4/9, loss 2\.500, 1,234 tokens/s, \d+ s; done: the run is complete; "
    assert re.fullmatch(told + "failures 0 of 10, preemptions 0 of 100", outcome)
    left = record.read()
    assert (left.state, left.attempt, left.exit_status, left.progress.step) == ("done", 1, 0, 4)
    logs = record.attempt_directory(1)
    assert [line[9:] for line in (logs / "process-0.log").read_text().splitlines()] == [STEP, "tail"]
    assert (logs / "process-1.log").read_text().endswith(" two\n")


def test_a_dead_process_ends_its_peers_and_all_begin_again(tmp_path):
    marker = tmp_path / "peer"
    first = ["echo $$; kill -9 $$", f"echo $$ > {marker}; sleep 1000 & echo $! >> {marker}; wait"]
    status, said, record = run(tmp_path, Scripts(first, ["true", "true"]))
    assert status == 0
    assert "failed: process-0 was killed by SIGKILL; failures 1 of 10" in said[-2]
    # What the peer had started is gone, too.
    assert not any(lives(int(pid)) for pid in marker.read_text().split())
    assert record.read().failures == 1


def test_a_process_that_does_not_end_with_the_others_is_a_failure(tmp_path):
    status, said, _ = run(tmp_path, Scripts(["true", "sleep 1000"], ["true", "true"]), stop_timeout=1)
    assert status == 0
    assert "failed: a process exited, but others did not" in said[0]


def test_bad_input_is_not_tried_again(tmp_path):
    backend = Scripts([REFUSES, "sleep 1000"])
    status, said, record = run(tmp_path, backend)
    assert (status, backend.started) == (2, 1)
    assert said[-1] == "error: model.num_heads 3: no"
    assert record.read().state == "refused"
    backend = Scripts(InputError("setup failed:\npip: no"), ["true"])
    status, said, _ = run(tmp_path / "other", backend)
    assert status == 2
    assert said[0] == "  | pip: no"
    assert said[-1] == "error: setup failed:"


def test_a_run_that_has_trained_survives_a_failing_preparation(tmp_path):
    status, said, record = run(
        tmp_path, Scripts([f"{REPORTS}; exit 1"], InputError("setup failed:\npip: no"), ["true"])
    )
    assert status == 0
    assert any("setup failed:; failures 2 of 10" in line for line in said)
    assert record.read().failures == 2


def test_what_is_refused_without_a_message_shows_what_was_printed(tmp_path):
    status, said, _ = run(tmp_path, Scripts(["echo 'unknown option' >&2; exit 2"]))
    assert (status, said[-2:]) == (2, ["  | unknown option", "error: the run rejected its input"])


def test_text_for_people_is_not_read(tmp_path):
    line = "step 4/9  loss 2.500  1,234 tokens/s  MFU 1.0%"
    status, said, record = run(tmp_path, Scripts([f"echo '{line}'; echo '@status [1'; echo 'a @status {{}}'"]))
    assert (status, record.read().progress) == (0, None)
    assert said[:3] == [line, "@status [1", "a @status {}"]


def test_preemptions_have_a_budget_of_their_own(tmp_path):
    backend = Scripts([f"{REPORTS}; exit 75"], ["exit 1"], ["exit 75"], ["true"], preempted=(2,))
    status, said, record = run(tmp_path, backend, max_failures=0)
    assert status == 0
    assert "preempted: machines were lost; process-0 exited with status 1" in " ".join(said)
    assert (record.read().failures, record.read().preemptions) == (0, 3)
    status, said, _ = run(tmp_path / "other", Scripts(["exit 75"], ["exit 75"]), max_preemptions=1)
    assert status == 1
    assert said[-1].startswith("error: gave up after 2 preemptions (max_preemptions); the logs are in ")


def test_a_crash_loop_ends_with_the_tail_of_the_log(tmp_path):
    script = f"{REPORTS}; for i in $(seq 30); do echo line $i; done; exit 1"
    status, said, _ = run(tmp_path, Scripts(*[[script]] * 4), crash_loop=3)
    assert status == 1
    assert said[-1].startswith("error: gave up after 3 consecutive failures, each after step 4 (crash_loop)")
    assert said[-22:-2] == [f"  | line {i}" for i in range(11, 31)]


def test_machines_that_do_not_come_are_a_failure(tmp_path):
    status, said, _ = run(tmp_path, Scripts(Unavailable("no capacity"), ["true"]))
    assert status == 0
    assert "unavailable: no capacity; failures 1 of 10" in said[0]


@pytest.mark.parametrize(
    ("by_stdin", "number", "expected"),
    [(False, signal.SIGTERM, 75), (True, signal.SIGINT, 130), (False, None, 75)],
)
def test_told_to_stop_all_save_and_end(by_stdin, number, expected, tmp_path):
    listens, saves = ("", "read line; exit 75") if by_stdin else ("trap 'exit 75' TERM; ", "sleep 1000 & wait")

    def tell():
        while sum(STEP in log.read_text() for log in tmp_path.glob("run/launch/attempt-001/*.log")) < 2:
            time.sleep(0.02)
        if number is None:
            LaunchRecord(tmp_path / "run" / "launch").ask_to_stop()
        else:
            os.kill(os.getpid(), number)

    threading.Thread(target=tell).start()
    status, said, record = run(tmp_path, Scripts([f"{listens}{REPORTS}; {saves}"] * 2, by_stdin=by_stdin))
    assert status == expected
    assert "stopped: as requested; the run was saved" in said[-1]
    assert record.read().state == "stopped"


def test_labelled_lines_are_told_apart_and_secrets_kept_out(tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "hunter2hunter2")
    backend = Scripts(
        [f"echo '1: two'; {REPORTS.replace('@status', '0: @status')}; echo all; echo 1: $THE_KEY; exit 1"],
        ["true"],
        labelled=True,
    )
    status, said, record = run(tmp_path, backend, secrets=("THE_KEY",))
    assert status == 0
    assert any("1 process, step 4/9" in line for line in said)
    logs = record.attempt_directory(1)
    assert (logs / "process-1.log").read_text().count("\n") == 2
    everything = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file()) + "".join(said)
    assert "hunter2" not in everything and "***" in everything


def test_a_reader_that_has_left_and_a_full_disk_do_not_stop_the_run(tmp_path, monkeypatch):
    """Else a process would wait for ever to print."""
    job = Job(tmp_path / "run", tmp_path / "run" / "launch")
    record = LaunchRecord(job.directory)
    backend = Scripts(["for i in $(seq 20000); do echo a long line of output; done"])

    def fail(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(Attempt, "_keep", fail)
    monkeypatch.setattr(record, "write", fail)
    monkeypatch.setattr(Supervisor, "_tell", lambda self, line: None)
    with record.held():
        assert Supervisor(backend, job, LocalCluster(), record, fail).run() == 0


def test_bad_input_after_training_has_begun_is_tried_again(tmp_path):
    status, _, record = run(tmp_path, Scripts([f"{REPORTS}; exit 1"], [REFUSES], ["true"]))
    assert status == 0
    assert record.read().failures == 2


def test_a_secret_in_a_reported_message_is_kept_out(tmp_path, monkeypatch):
    """JSON writes its characters in another way."""
    monkeypatch.setenv("THE_KEY", 'hunter"2é')
    code = "import json, os; print('@status', json.dumps({'failed': 'bad_input', 'message': os.environ['THE_KEY']}))"
    script = f'"{sys.executable}" -c "{code}"; exit 2'
    status, said, _ = run(tmp_path, Scripts([script]), secrets=("THE_KEY",))
    assert (status, said) == (2, ["error: ***"])


def test_a_secret_of_several_lines_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "-----BEGIN\nabcdefgh \n}\n")
    status, said, _ = run(tmp_path, Scripts(['echo "$THE_KEY"; echo " abcdefgh"']), secrets=("THE_KEY",))
    assert status == 0
    assert said[:4] == ["***", "*** ", "}", ""]
    assert said[4] == " ***"


@pytest.mark.parametrize("names", [("SHORT", "LONG", "TAIL"), ("TAIL", "LONG", "SHORT"), ("LONG", "SHORT", "TAIL")])
def test_secrets_that_overlap_are_kept_out(names, tmp_path, monkeypatch):
    values = {"SHORT": "tokabc", "LONG": "tokabcDEF123456", "TAIL": "DEF1234"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    script = 'echo "a $LONG b"; echo "a $SHORT b"; echo "a $TAIL b"; echo "$SHORT$LONG"'
    status, said, _ = run(tmp_path, Scripts([script]), secrets=names)
    assert status == 0
    assert said[:4] == ["a *** b", "a *** b", "a *** b", "******"]


@pytest.mark.parametrize(("restarted", "expected"), [(True, 75), (False, 0)])
def test_a_stop_request_survives_a_restart_by_slurm(restarted, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarted:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    record = LaunchRecord(tmp_path / "run" / "launch")
    record.directory.mkdir(parents=True)
    record.ask_to_stop()
    status, said, _ = run(tmp_path, Scripts(["true"]))
    assert status == expected
    assert ("stopped: before any process started" in said[-1]) is restarted


def test_one_who_looks_does_not_keep_a_launcher_out(tmp_path):
    record = LaunchRecord(tmp_path / "launch")
    record.directory.mkdir()
    looking = lock(record.directory / ".lock")
    threading.Timer(0.3, looking.close).start()
    with record.held():
        pass


def test_a_killed_launcher_leaves_no_process(tmp_path):
    code = f"""
import sys, pathlib
sys.path[:] = {sys.path!r}
from test_supervisor import *
run(pathlib.Path({str(tmp_path)!r}), Scripts(["echo $$ > {tmp_path}/pid; exec sleep 1000"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    wait_until_gone(int((tmp_path / "pid").read_text()))
    assert not LaunchRecord(tmp_path / "run" / "launch").is_held


def test_a_command_that_cannot_be_started(tmp_path):
    class Missing(Scripts):
        def commands(self, job, attempt):
            return [HostCommand("process-0", ["/nowhere/srun"])]

    status, said, _ = run(tmp_path, Missing(["true"]), max_failures=0)
    assert status == 1
    assert "  | error: /nowhere/srun cannot be started: No such file or directory" in said


def test_the_status_of_a_run_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "STATUS_SECONDS", 0.0)
    script = f"{REPORTS}; until [ -e {tmp_path}/go ]; do sleep 0.05; done"
    record = LaunchRecord(tmp_path / "run" / "launch")
    seen = []

    def look():
        while not seen or seen[-1].progress is None:
            time.sleep(0.02)
            if (record.directory / "status.json").exists():
                seen.append(record.read())
        assert record.is_held
        (tmp_path / "go").touch()

    watcher = threading.Thread(target=look)
    watcher.start()
    run(tmp_path, Scripts([script]))
    watcher.join()
    assert str(seen[-1]) == (
        "running; 1 process (local); attempt 1; step 4/9, loss 2.500, 1,234 tokens/s; 0 failures, 0 preemptions"
    )
    assert json.loads((record.directory / "status.json").read_text())["state"] == "done"
