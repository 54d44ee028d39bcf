"""What is shown of a run, in a terminal and in a log."""

import io

from rich.console import Console as RichConsole

from sophia_levanter.tracking.console import Console

NUMBERS = {"train/loss": 3.14159, "train/tokens_per_second": 12345.6, "train/mfu": 0.256}


def shown(terminal: bool, steps: range, log_every: int = 10) -> str:
    out = io.StringIO()
    console = Console(log_every, RichConsole(file=out, force_terminal=terminal, width=120, soft_wrap=True))
    console.line("model: [small] :x:")
    console.start(0, 20)
    for step in steps:
        console.step(step, NUMBERS, seconds_left=3671.0)
    console.stop()
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    lines = shown(False, range(20)).splitlines()
    # Brackets are text here, not rich's markup.
    assert lines[0] == "model: [small] :x:"
    assert lines[1] == "step 10/20  loss 3.142  12,346 tokens/s  MFU 25.6%  1:01:11 left"
    assert [line.split()[1] for line in lines[1:]] == ["10/20", "20/20"]


def test_the_last_step_is_always_shown():
    assert shown(False, range(20), log_every=7).splitlines()[-1].startswith("step 20/20")


def test_a_bar_in_a_terminal():
    out = shown(True, range(10))
    assert "loss 3.142" in out and "12,346 tokens/s" in out and "10/20" in out
    assert "step 10/20" not in out
