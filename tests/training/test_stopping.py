"""The first signal asks a run to stop, the second acts. A step that hangs ends it."""

import signal
import subprocess
import sys

import pytest

from sophia_levanter.training.stopping import StopRequest


@pytest.fixture(autouse=True)
def default_handlers():
    """Ctrl-C's own handler: a process started in the background of a script begins with the signal ignored."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)]
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


def test_the_first_ctrl_c_is_noted_and_the_second_acts():
    stop = StopRequest()
    assert stop.signal is None
    signal.raise_signal(signal.SIGINT)
    assert stop.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("further", [signal.SIGTERM, signal.SIGINT])
def test_after_sigterm_no_signal_stops_the_saving(further):
    stop = StopRequest()
    signal.raise_signal(signal.SIGTERM)
    for _ in range(3):
        signal.raise_signal(further)
    assert stop.signal == signal.SIGTERM


def test_sigterm_counts_after_ctrl_c_too():
    stop = StopRequest()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    assert stop.signal == signal.SIGTERM


def test_it_says_so_at_once_and_once(capfd):
    StopRequest("stop requested: it saves")
    signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "stop requested: it saves\n"
    signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_in_a_terminal_the_line_takes_the_place_of_the_bar(capfd, monkeypatch):
    monkeypatch.setattr("os.isatty", lambda number: True)
    StopRequest("stop requested: it saves")
    signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == "\r\x1b[2Kstop requested: it saves\n"


def test_what_waits_ends_where_it_asks():
    stop = StopRequest(signals=[signal.SIGTERM])
    stop.check()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        stop.check()


HANGING = """
import time
from sophia_levanter.training.stopping import Watchdog
with Watchdog(1) as watchdog:
    watchdog.begin("step 7")
    time.sleep(100)
"""


def test_a_step_that_takes_too_long_ends_the_process():
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True)
    assert done.returncode == 1
    started = "error: step 7 took longer than 1 s (trainer.step_timeout); resume the run to continue from"
    assert done.stderr.startswith(started)
    assert "most recent call first" in done.stderr  # where each thread is
