import itertools
import os

import numpy as np
import pytest

from sophia_levanter.benchmarks import runs_per_hour
from sophia_levanter.benchmarks.runs_per_hour import (
    ProcessFailed,
    Way,
    environment,
    in_rounds,
    rows_of,
    tokens_per_second,
    ways,
)
from sophia_levanter.comparison.runner import MALLOC


def test_the_ways_go_from_one_process_to_vmapped_runs_on_every_core():
    assert [(w.processes, w.threads, w.malloc, w.runs) for w in ways(3)] == [
        (1, None, False, 1),
        (3, 1, False, 1),
        (3, 1, True, 1),
        (3, 1, True, 2),
        (3, 1, True, 4),
    ]


def test_threads_and_malloc_are_the_ways_own():
    given = {"HOME": "/home", "NPROC": "7", "MALLOC_ARENA_MAX": "9", "JAX_PLATFORMS": "cuda"}
    kept = {"HOME": "/home", "JAX_PLATFORMS": "cpu"}
    plain, each, malloc = (environment(way, given) for way in ways(3)[:3])
    assert plain == kept
    assert each == kept | {"NPROC": "1"}
    assert malloc == each | MALLOC


def test_the_ways_take_turns(monkeypatch, tmp_path):
    rates = iter(range(6))
    asked = []

    def taken(way, config_file, seconds):
        asked.append((way.name, config_file, seconds))
        return next(rates)

    monkeypatch.setattr(runs_per_hour, "tokens_per_second", taken)
    found = in_rounds([Way("a"), Way("b")], tmp_path, rounds=3, seconds=2.0)
    assert found.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert asked == [("a", tmp_path, 2.0), ("b", tmp_path, 2.0)] * 3


def test_ratios_are_of_the_same_round():
    rates = np.array([[100.0, 200, 400], [300.0, 400, 1000]])
    first, second = rows_of([Way("a"), Way("b")], rates, tokens_of_run=1e5)
    assert (first.way, second.way) == ("a", "b")
    assert first.ratio == (1, 1, 1)
    assert second.ratio == (2.25, 2.5, 2.75)
    assert first.tokens == (150, 200, 300)
    assert (first.runs, second.runs) == pytest.approx((7.2, 14.4))


class Fake:
    """Processes that run some shell, in place of `stacked_steps`; `$0` counts them from 0."""

    @staticmethod
    def install(monkeypatch, program: str) -> None:
        popen, number = runs_per_hour.subprocess.Popen, itertools.count()
        monkeypatch.setattr(
            runs_per_hour.subprocess, "Popen", lambda _, **kw: popen(["sh", "-c", program, str(next(number))], **kw)
        )


def test_the_processes_of_a_way_start_together_and_add_up(monkeypatch, tmp_path):
    # All but the first take their time until they are ready; then each counts those that are.
    program = f"""
    [ $0 = 0 ] || sleep 0.5
    mkdir {tmp_path}/$0; echo ready; read line
    echo "{{\\"tokens\\": $(ls {tmp_path} | wc -l)00, \\"seconds\\": 2.0}}"
    """
    Fake.install(monkeypatch, program)
    assert tokens_per_second(Way("x", processes=3, threads=1), tmp_path, 1.0) == 3 * 300 / 2


@pytest.mark.parametrize("program", ["echo why >&2; echo no >&2; exit 1", "echo ready; read line; echo no >&2"])
def test_a_process_that_fails_says_why(monkeypatch, tmp_path, program):
    Fake.install(monkeypatch, program)
    with pytest.raises(ProcessFailed, match=r"^no$"):
        tokens_per_second(Way("x", processes=2), tmp_path, 1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds is 0; it must be above 0"),
        (["--tokens", "-1"], "--tokens is -1.0; it must be above 0"),
        (["--trainer.batchsize", "3"], "did you mean --trainer.batch_size"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tiny, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        runs_per_hour.main(["--config", str(tiny), *words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_failed_process_is_status_1(tiny, capsys, monkeypatch):
    Fake.install(monkeypatch, "echo broken >&2; exit 1")
    with pytest.raises(SystemExit) as stop:
        runs_per_hour.main(["--config", str(tiny)])
    assert (stop.value.code, capsys.readouterr().err) == (1, "error: broken\n")


@pytest.mark.slow
def test_main_prints_a_table(tiny, capsys, monkeypatch):
    monkeypatch.setattr(runs_per_hour, "num_cores", lambda: 2)
    runs_per_hour.main(["--config", str(tiny), "--rounds", "1", "--seconds", "0.2", "--trainer.batch_size", "2"])
    printed = capsys.readouterr().out
    assert "Plain steps of 2 x 8 tokens (SophiaG)" in printed
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == [way.name for way in ways(2)]
    assert rows[2][2] == "1.000 (1.000 to 1.000)"
    assert all(float(row[1].split()[0]) > 0 and float(row[3]) > 0 for row in rows[2:])


def test_the_cores_are_those_this_process_may_use():
    assert 1 <= runs_per_hour.num_cores() <= (os.cpu_count() or 1)
