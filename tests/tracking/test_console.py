"""What is shown of a run, in a terminal and in a log."""

import io
import itertools
import math
import re
from types import SimpleNamespace

import pytest
from rich.console import Console as RichConsole

from sophia_levanter.tracking import console as console_module
from sophia_levanter.tracking.console import Console, StepNumbers

NUMBERS = {"train/loss": 3.14159, "train/tokens_per_second": 12345.6, "train/mfu": 0.256}
REFRESHED = {**NUMBERS, "optim/win_rate": 0.421}
ROWS = [("model", "[small] :x:, " + "long " * 20), ("run directory", "/runs/[red]" + "x" * 100)]


def console_on(out: io.StringIO, *, terminal: bool, width: int = 120, **options) -> Console:
    return Console(10, RichConsole(file=out, force_terminal=terminal, width=width, soft_wrap=True), **options)


def shown(terminal: bool, steps: range, total: int = 20, width: int = 120, **options) -> str:
    out = io.StringIO()
    console = console_on(out, terminal=terminal, width=width, **options)
    console.line("model: [small] :x:")
    console.start(0, total)
    for step in steps:
        console.step(step, REFRESHED if step == 12 else NUMBERS, seconds_left=3671.0)
    console.stop()
    console.notice("WARNING: [red] :x:")
    return out.getvalue()


def lines_of(output: str) -> list[str]:
    """What a terminal shows, each state of the bar as a line."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).strip())


def test_plain_lines_where_there_is_no_terminal():
    lines = shown(False, range(20)).splitlines()
    # Brackets are text here, not rich's markup.
    assert lines == [
        "model: [small] :x:",
        "step 10/20  loss 3.142  smoothed 3.142  12,346 tokens/s  MFU 25.6%  1:01:11 left",
        "step 20/20  loss 3.142  smoothed 3.142  12,346 tokens/s  MFU 25.6%  win rate 42.1%  1:01:11 left",
        "WARNING: [red] :x:",
    ]


def test_slow_steps_have_a_line_every_ten_seconds(monkeypatch):
    clock = itertools.count(0, 4)
    monkeypatch.setattr(console_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lines = shown(False, range(13), total=100).splitlines()[1:-1]
    # After 12 s each time, and at the tenth step.
    assert [line.split()[1] for line in lines] == ["3/100", "6/100", "9/100", "10/100", "13/100"]


def test_characters_that_the_output_lacks_are_replaced():
    output = io.TextIOWrapper(io.BytesIO(), "ascii")
    Console(rich_console=RichConsole(file=output)).line("naïve")
    output.flush()
    assert output.buffer.getvalue() == b"na?ve\n"


def test_the_last_step_is_always_shown():
    assert shown(False, range(20), total=20).splitlines()[-2].startswith("step 20/20")
    assert shown(False, range(17), total=17).splitlines()[-2].startswith("step 17/17")


def test_a_bar_in_a_terminal():
    out = shown(True, range(14), width=160)
    assert "step 10/20" not in out
    last = lines_of(out)[-2]
    numbers = "loss 3.142  smoothed 3.142  12,346 tokens/s  MFU 25.6%  win rate 42.1%"
    assert last.startswith("14/20 ━") and f"{numbers} 0:00:0" in last and last.endswith("1:01:11 left")


@pytest.mark.parametrize("width", [40, 69, 70, 80, 119, 120])
def test_a_narrow_terminal_has_what_fits_on_one_line(width):
    lines = lines_of(shown(True, range(14), total=100_000, width=width))
    bars = [line for line in lines if "1:01:11 left" in line]
    assert len(bars) >= 1 and all(len(line) <= width for line in bars)
    assert all("loss 3.142" in line and "…" not in line for line in bars)
    assert ("smoothed" in bars[-1]) == (width >= 69)


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_leaves_the_notices(terminal):
    assert lines_of(shown(terminal, range(20), quiet=True)) == ["WARNING: [red] :x:"]


def test_rows_are_lines_in_a_log():
    out = io.StringIO()
    console_on(out, terminal=False, width=40).rows(ROWS)
    assert out.getvalue() == "".join(f"{name}: {text}\n" for name, text in ROWS)


@pytest.mark.parametrize("width", [40, 80])
def test_rows_are_a_table_in_a_terminal(width):
    out = io.StringIO()
    console_on(out, terminal=True, width=width).rows(ROWS)
    lines = lines_of(out.getvalue())
    assert max(map(len, lines)) <= width
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in lines if "│" in line]
    assert [name for name, _ in cells if name] == ["model", "run directory"]
    assert "".join(text for _, text in cells).replace(" ", "") == "".join(text for _, text in ROWS).replace(" ", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_prints_the_rows_that_are_the_result(terminal):
    out = io.StringIO()
    console_on(out, terminal=terminal, quiet=True).rows([*ROWS, ("done", "12 steps [b]")], notices=("done",))
    assert out.getvalue() == "done: 12 steps [b]\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_no_rows_print_nothing(terminal):
    out = io.StringIO()
    console_on(out, terminal=terminal).rows([])
    assert out.getvalue() == ""


def test_the_smoothed_loss_has_no_bias_and_passes_over_what_is_no_number():
    numbers = StepNumbers()
    assert math.isnan(numbers.smoothed_loss)
    numbers.update(NUMBERS | {"train/loss": 4.0})
    assert numbers.smoothed_loss == pytest.approx(4.0)
    numbers.update(NUMBERS | {"train/loss": math.nan})
    numbers.update(NUMBERS | {"train/loss": math.inf})
    assert numbers.smoothed_loss == pytest.approx(4.0)
    numbers.update(NUMBERS | {"train/loss": 2.0})
    assert numbers.smoothed_loss == pytest.approx((0.95 * 4 + 2) / 1.95)


def test_the_win_rate_is_the_last_one():
    numbers = StepNumbers()
    numbers.update(NUMBERS | {"optim/win_rate": 0.25})
    numbers.update(NUMBERS)
    assert str(numbers).endswith("  win rate 25.0%")
