"""What a process reports to its starter is read back by it."""

import io
import math
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from sophia_levanter import status
from sophia_levanter.status import Failure, Progress, read_status
from sophia_levanter.tracking.console import Console

METRICS = {"train/loss": 3.14159, "train/tokens_per_second": 1234567.8, "train/mfu": 0.4321}


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """Gives what was reported so far."""
    file = (tmp_path / "status").open("w")
    monkeypatch.setenv(status.VARIABLE, str(file.fileno()))
    yield lambda: [read_status(line) for line in (tmp_path / "status").read_text().splitlines()]
    file.close()


@pytest.mark.parametrize("options", [{}, {"quiet": True}])
def test_steps_are_reported_when_their_lines_are_due(options, reported):
    console = Console(log_every=5, rich_console=RichConsole(file=io.StringIO()), **options)
    console.resumed(40, Path("/runs/step 7/9"))
    console.start(1030, 2000)
    for step in range(1035, 1040):
        console.step(step, METRICS, seconds_left=61)
    assert reported() == [Progress(40), Progress(1040, 2000, 3.142, 1234568)]


def test_a_loss_that_is_not_finite(reported):
    status.report_step(5, 9, math.nan, 12.0)
    (progress,) = reported()
    assert progress.step == 5 and math.isnan(progress.loss)


def test_a_failure_is_read_back(reported):
    status.report_failure("bad_input", 'no "such" file\n: é')
    assert reported() == [Failure("bad_input", 'no "such" file\n: é')]


def test_nothing_is_reported_unless_asked_for(monkeypatch, capfd):
    monkeypatch.delenv(status.VARIABLE, raising=False)
    status.report_resumed(40)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("number", ["", "none", "-1", "987"])
def test_a_starter_that_cannot_hear_changes_nothing(number, monkeypatch):
    monkeypatch.setenv(status.VARIABLE, number)
    status.report_resumed(40)


def test_a_starter_that_has_left_changes_nothing(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setenv(status.VARIABLE, str(writing))
    status.report_resumed(40)
    os.close(writing)


@pytest.mark.parametrize(("status_of_run", "wanted"), [(0, 1), (2, 2), (75, 75)])
def test_a_reader_that_leaves_does_not_change_a_status_other_than_done(status_of_run, wanted, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)

    def run(words):
        print("a line that is still in the buffer when the command has ended")
        return status_of_run

    with open(writing, "w") as stdout, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stdout)
        assert status.run_command([], run) == wanted


@pytest.mark.parametrize(
    "line",
    [
        "",
        "step 5/9  loss 2.500  12 tokens/s  MFU 1.0%",
        "@status",
        "@status {",
        "@status []",
        "@status {}",
        '@status {"step": "5"}',
        '@status {"failed": "bad_input"}',
        ' @status {"resumed_from": 5}',
        "@status " + "[" * 100_000,
    ],
)
def test_other_lines_tell_nothing(line):
    assert read_status(line) is None


def test_progress_is_shown_for_people():
    assert str(Progress(40)) == "step 40"
    assert str(Progress(1040, 2000, 3.14159, 1234568)) == "step 1040/2000, loss 3.142, 1,234,568 tokens/s"
