"""The numbers of each run that a page begins with; pages are in tests/commands/test_report_command.py."""

import os
import time

import numpy as np
import pytest

from sophia_levanter.config.baselines import AdamWConfig
from sophia_levanter.config.optimizer import SophiaGConfig
from sophia_levanter.studies.comparability import compare
from sophia_levanter.studies.page import COLUMNS, headline, in_lines, notes, sets_and_tasks, short, status
from sophia_levanter.studies.runs import read_run
from tiny_runs import run_config, step_lines, write_run


def test_rates_that_cannot_be_are_left_out(tmp_path):
    lines = [
        line | {"train/tokens_per_second": 50.0, "train/mfu": 0.25} for line in step_lines(5) if "train/loss" in line
    ]
    for line, rate in zip(lines, (0, -3, None, 50.0), strict=False):
        line["train/tokens_per_second"] = rate
    run = read_run("a", write_run(tmp_path, lines=[*lines, {"step": 4, "train/mfu": 0.5}]))
    assert run.seconds_at(np.array(5)) == pytest.approx(5)
    row = dict(zip(COLUMNS, headline([run], compare([run]))[0], strict=True))
    assert (row["tokens/s"].text, row["MFU"].text) == ("50", "25.0%")


def test_a_run_without_rates_has_no_time(tmp_path):
    run = read_run("a", write_run(tmp_path, lines=[{"step": 0, "train/loss": 5.0}]))
    assert run.seconds_at(np.array(1)) is None
    row = dict(zip(COLUMNS, headline([run], compare([run]))[0], strict=True))
    assert (row["tokens/s"].text, row["MFU"].text, row["last validation loss"].text) == ("–", "–", "–")


def with_losses(losses: list[float | None], **more: float | None) -> list[dict]:
    lines: list[dict] = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses)]
    return [*lines, {"step": len(losses) - 1, **more}] if more else lines


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (step_lines(10), "finished"),
        (step_lines(7), "at step 7, 3 s ago"),
        (with_losses([5.0] * 9 + [None]), "finished"),  # one step was skipped
        (with_losses([5.0, None, None, None]), "diverged at step 4"),
        (with_losses([5.0] * 10, **{"validation/loss": None}), "diverged"),
        (with_losses([None]), "diverged at step 1"),
        (with_losses([5.0] * 50 + [9.0] * 50), "diverged"),
    ],
)
def test_status(lines, expected, tmp_path, monkeypatch):
    run = read_run("a", write_run(tmp_path, run_config(trainer={"max_skipped_steps": 3}), lines))
    monkeypatch.setattr(time, "time", lambda: run.written_at + 3)
    assert status(run) == expected


def test_a_run_that_was_left_has_stopped(tmp_path):
    write_run(tmp_path, lines=step_lines(7))
    old = time.time() - 2 * 86_400
    os.utime(tmp_path / "metrics.jsonl", (old, old))
    assert status(read_run("a", tmp_path)) == "stopped at step 7"


def test_the_headline(tmp_path):
    other = run_config(optimizer=AdamWConfig(warmup=0))
    plain = [{k: v for k, v in line.items() if not k.startswith("optim/")} for line in step_lines(10, 3.5)]
    plain[-2] |= {"train/skipped_steps": 2}
    lines = step_lines(10)
    lines[4] |= {"validation/loss": 3.0}
    lines[-3] |= {"optim/win_rate": 0.05}
    runs = [
        read_run("a", write_run(tmp_path / "a", lines=lines)),
        read_run("b", write_run(tmp_path / "b", other, plain)),
    ]
    first, second = (dict(zip(COLUMNS, row, strict=True)) for row in headline(runs, compare(runs)))
    texts = {name: (first[name].text, second[name].text) for name in COLUMNS}
    assert texts["optimizer"] == ("sophia_g", "adamw") and texts["steps"][0] == "10 / 10"
    # The padded vocabulary, positions, a block's matrices and three norms.
    assert texts["parameters"] == (short(8 * (384 + 10 + 12 * 8 + 3)),) * 2
    assert texts["tokens"] == ("500", "500") and texts["tokens/s"] == ("500", "500")
    assert texts["MFU"] == ("25.0%", "25.0%") and texts["skipped steps"] == ("0", "2")
    assert texts["last validation loss"] == ("4.1000", "3.6000")
    assert texts["best validation loss"] == ("3.0000", "3.6000")
    assert texts["win rate"] == ("0.05", "–") and first["win rate"].remark == "low"
    best = [(name, first[name].best, second[name].best) for name in COLUMNS if first[name].best or second[name].best]
    assert best == [
        ("last validation loss", False, True),
        ("best validation loss", True, False),
        ("bits per byte", False, True),
    ]


def test_what_speaks_against_the_settings_of_runs(tmp_path):
    runs = []
    for rate, loss in ((1e-3, 4.0), (2e-3, 3.5), (4e-3, 3.0)):
        optimizer = SophiaGConfig(interval=2, warmup=0, learning_rate=rate)
        config = run_config(optimizer=optimizer, trainer={"evaluate_every": 2 if rate < 4e-3 else 5})
        lines = step_lines(10, loss)
        lines[-3] |= {"optim/win_rate": 0.95 if rate < 2e-3 else 0.5}
        runs.append(read_run(f"rate {rate}", write_run(tmp_path / str(rate), config, lines)))
    assert notes(runs, compare(runs)) == [
        "sophia_g: the best learning_rate, 0.004, is at the edge of its grid; try larger values.",
        "rate 0.001: the last win rate is 0.95; typical values are 0.1 to 0.9, so try a smaller rho.",
        "2 validation losses in rate 0.004 are too few for a curve; use 5 or more.",
    ]
    assert notes(runs[1:2], compare(runs[1:2])) == []
    assert in_lines(runs, compare(runs))[-1].startswith("NOTE: 2 validation losses")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (12_345, "12.3k"), (999_600, "1.00M"), (1.5577e9, "1.56B")],
)
def test_short_numbers(number, text):
    assert short(number) == text


def test_the_last_numbers_of_named_sets_and_tasks(tmp_path):
    scores = {"tasks/piqa/accuracy": 0.5, "tasks/piqa/accuracy_interval": 0.02, "tasks/words/perplexity": 30.0}
    lines = [*step_lines(10), {"step": 4, "validation/books/loss": 3.0}, {"step": 9, "validation/books/loss": 2.5}]
    runs = [
        read_run("a", write_run(tmp_path / "a", lines=[*lines, {"step": 9, **scores}])),
        read_run("b", write_run(tmp_path / "b")),
    ]
    assert sets_and_tasks(runs) == [
        ("validation/books/loss", ["2.5000", "–"]),
        ("tasks/piqa/accuracy", ["0.5000 ± 0.0200", "–"]),
        ("tasks/words/perplexity", ["30.0000", "–"]),
    ]
    assert sets_and_tasks(runs[1:]) == []
