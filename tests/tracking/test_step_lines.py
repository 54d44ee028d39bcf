"""What a run prints of its steps is read back by what watches it."""

import io
import math

import pytest
from rich.console import Console as RichConsole

from sophia_levanter.tracking.console import Console
from sophia_levanter.tracking.step_lines import Progress, StepNumbers, read_progress

METRICS = {"train/loss": 3.14159, "train/tokens_per_second": 1234567.8, "train/mfu": 0.4321}


@pytest.mark.parametrize("more", [{}, {"optim/win_rate": 0.5}])
def test_a_printed_step_is_read_back(more):
    printed = io.StringIO()
    console = Console(log_every=5, rich_console=RichConsole(file=printed, width=200))
    console.start(0, 2000)
    console.step(1039, METRICS | more, seconds_left=61)
    assert read_progress(printed.getvalue().rstrip("\n")) == Progress(1040, 2000, 3.142, 1234568)


def test_where_a_run_goes_on_is_read():
    assert read_progress("resuming after step 40 of /runs/step 7/9") == Progress(40)


def test_a_loss_that_is_no_number():
    line = "step 5/9  loss nan  smoothed 2.500  12 tokens/s  MFU 1.0%"
    progress = read_progress(line)
    assert progress is not None and progress.step == 5 and progress.loss != progress.loss


def test_a_line_without_a_smoothed_loss():
    assert read_progress("step 5/9  loss 2.5  12 tokens/s  MFU 1.0%") == Progress(5, 9, 2.5, 12)


def test_other_lines_tell_nothing():
    for line in (
        "",
        "step 5: validation loss 2.5 nats per token",
        "  step 5/9  loss 2.5",
        "compiling 2 training step(s)",
    ):
        assert read_progress(line) is None


def test_it_is_shown_for_people():
    assert str(Progress(40)) == "step 40"
    assert str(Progress(1040, 2000, 3.14159, 1234568)) == "step 1040/2000, loss 3.142, 1,234,568 tokens/s"


def test_the_smoothed_loss_has_no_bias_and_passes_over_what_is_no_number():
    numbers = StepNumbers()
    assert math.isnan(numbers.smoothed_loss)
    numbers.update(METRICS | {"train/loss": 4.0})
    assert numbers.smoothed_loss == pytest.approx(4.0)
    numbers.update(METRICS | {"train/loss": math.nan})
    numbers.update(METRICS | {"train/loss": math.inf})
    assert numbers.smoothed_loss == pytest.approx(4.0)
    numbers.update(METRICS | {"train/loss": 2.0})
    assert numbers.smoothed_loss == pytest.approx((0.95 * 4 + 2) / 1.95)


def test_the_win_rate_is_the_last_one():
    numbers = StepNumbers()
    numbers.update(METRICS | {"optim/win_rate": 0.25})
    numbers.update(METRICS)
    assert str(numbers).endswith("  win rate 25.0%")
