"""The process that holds a training process on a host: how it hears that it should end, and what comes of it."""

import json
import os
import signal
import subprocess
import sys

import pytest
from launched import wait_until_gone

# Says that it is there, then what it hears; without end unless told.
CHILD = """
import signal, sys, time
def heard(number, frame):
    print("heard", number, flush=True)
    if len(sys.argv) > 1:
        sys.exit(int(sys.argv[1]))
signal.signal(signal.SIGTERM, heard)
print("up", flush=True)
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def start(*words, grace=30, log="logs/a.log", stdout=subprocess.PIPE):
        host = [sys.executable, "-m", "sophia_levanter.cluster.host", "--grace", str(grace), "--log", log, "--"]
        started.append(
            subprocess.Popen(
                [*host, *words], stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE, cwd=tmp_path
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.stdin.close()
        process.kill()
        process.wait()


def child(*words):
    return [sys.executable, "-c", CHILD, *words]


def test_the_end_of_standard_input_is_a_sigterm_and_the_status_is_passed_on(start, tmp_path):
    host = start(*child("75"))
    assert host.stdout.readline() == b"up\n"
    host.stdin.close()
    assert host.wait(30) == 75
    assert host.stdout.read() == b"heard 15\n"
    assert (tmp_path / "logs" / "a.log").read_bytes() == b"up\nheard 15\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_host_process_is_a_sigterm(start, number):
    host = start(*child("75"))
    assert host.stdout.readline() == b"up\n"
    host.send_signal(number)
    assert host.wait(30) == 75


def test_what_does_not_heed_sigterm_is_killed_after_the_grace(start):
    host = start(*child(), grace=1)
    host.stdout.readline()
    host.stdin.close()
    assert host.wait(30) == 128 + signal.SIGKILL
    assert host.stdout.read() == b"heard 15\n"


def test_the_process_dies_with_a_host_process_that_is_killed(start):
    host = start("bash", "-c", 'echo $$; exec "$0" -c "$1"', sys.executable, CHILD)
    pid = int(host.stdout.readline())
    assert host.stdout.readline() == b"up\n"
    host.kill()
    wait_until_gone(pid)


def test_what_the_process_leaves_behind_goes_too(start):
    host = start("bash", "-c", "sleep 600 & echo $!; exit 3")
    pid = int(host.stdout.readline())
    assert host.wait(30) == 3
    wait_until_gone(pid)


def test_the_process_saves_and_ends_where_nobody_reads_what_it_prints(start, tmp_path):
    reading, writing = os.pipe()
    host = start(
        "bash",
        "-c",
        "trap 'echo saving; echo saved > saved; exit 75' TERM; echo up; while :; do sleep 0.05; done",
        stdout=writing,
    )
    os.close(writing)
    assert os.read(reading, 3) == b"up\n"
    os.close(reading)
    host.stdin.close()
    assert host.wait(30) == 75
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "logs" / "a.log").read_text() == "up\nsaving\n"


def test_the_process_is_not_started_a_second_time(start, tmp_path):
    assert start("touch", "first").wait(30) == 0
    again = start("touch", "second")
    assert again.wait(30) == 1
    assert (
        again.stderr.read() == b"error: logs/a.log already exists; the process was started, but the connection broke\n"
    )
    assert (tmp_path / "first").exists()
    assert not (tmp_path / "second").exists()


def test_the_process_of_an_earlier_attempt_is_told_to_end_and_waited_for(start):
    earlier = start(*child("75"))
    assert earlier.stdout.readline() == b"up\n"
    later = start("echo", "later", log="logs/b.log")
    assert later.wait(30) == 0
    assert earlier.wait(30) == 75
    assert later.stdout.read() == b"waiting for a process from an earlier attempt to exit\nlater\n"


def test_words_arrive_unchanged(start):
    words = ["a  b", "--help", "", "$(touch x); 'q' \"r\"\n"]
    host = start(sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *words)
    assert json.loads(host.stdout.read()) == words


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--grace", "1", "--log", "x.log"], "error: -- WORD... is missing"),
        (["--log", "x.log", "--", "true"], "error: --grace SECONDS is missing"),
        (["--grace", "1", "--", "true"], "error: --log FILE is missing"),
        (["--grace", "soon", "--log", "x.log", "--", "true"], "error: --grace is 'soon'"),
    ],
)
def test_bad_input(arguments, wanted, tmp_path):
    words = [sys.executable, "-m", "sophia_levanter.cluster.host", *arguments]
    result = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(wanted)
    assert result.stderr.count("\n") == 1


def test_a_command_that_is_not_there(start):
    host = start("./nothing")
    assert host.stdout.read() == b"error: ./nothing cannot be started: No such file or directory\n"
    assert host.wait() == 1


def test_it_imports_nothing_heavy():
    code = "import sys, sophia_levanter.cluster.host; print(*{'jax', 'numpy', 'yaml', 'draccus'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
