"""The command that does a study: bad input, what is done and done again, tiny studies, and how they are stopped."""

import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sophia_levanter.commands.compare import STUDY_STOPS, main
from sophia_levanter.studies import runner
from sophia_levanter.studies.records import Record, flat_config, read_records
from sophia_levanter.studies.runner import CheckStop, Job, RunFailed
from sophia_levanter.studies.sharing import Start
from tiny_runs import write_manifest

STUDY = """
config: [tiny.yaml]
tokens: [640]
evaluations: 2
baseline: adamw
arms:
  adamw: {settings: {optimizer: {type: adamw}}}
  sophia: {settings: {optimizer: {type: sophia_g, interval: 3, rho: 0.5}}}
"""


SEARCH = """
config: [tiny.yaml]
tokens: 640
evaluations: 2
seeds: [0, 7]
search_runs: 9
arms: {sophia: {settings: {optimizer: {type: sophia_g}}, grid: {optimizer: {rho: [0.5, 1, 2]}}}}
"""


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs done; each at once, with a loss of its number. A job of seed 13 fails, and one of seed 66 diverges."""
    jobs: list[Job] = []

    def do(job: Job, check_stop: CheckStop) -> Record:
        jobs.append(job)
        if job.config.trainer.seed == 13:
            raise RunFailed("a.log: no luck")
        loss = None if job.config.trainer.seed == 66 else float(len(jobs))
        outcome = ("done" if loss else "diverged", loss, loss, [[10, loss]], [[10, loss]], [], [0.1, None], 1000, 6e3)
        return Record(flat_config(job.config), *outcome, {"data": {"digest": "abc"}})

    monkeypatch.setattr(runner, "do", do)
    # Pictures are drawn in tests/studies/test_report.py.
    monkeypatch.setattr("sophia_levanter.studies.plots.study_pictures", lambda cells: {})
    return jobs


def arguments(study: Path, *more: object) -> list[str]:
    return ["--config", str(study), "--out", str(study.parent / "out"), *map(str, more)]


# --- bad input


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "--config STUDY is missing"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: file not found"),
        (["--config", "STUDY", "--out", "STUDY"], "study.yaml is a file or inside a file; specify a directory"),
        (["--config", "STUDY", "--out", "STUDY/x"], "study.yaml/x is a file or inside a file; specify a directory"),
        (["--config", "STUDY", "--optimizer.roh", "1"], "arm adamw: unknown option '--optimizer.roh'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, wanted, write, tmp_path, capfd, monkeypatch, done):
    monkeypatch.chdir(tmp_path)
    study = str(write(STUDY))
    before = sorted(tmp_path.rglob("*"))
    for plan in ([], ["--plan"]):
        assert main([*plan, *(word.replace("STUDY", study) for word in words)]) == 2
        out, error = capfd.readouterr()
        assert error.startswith("error: ") and error.count("\n") == 1 and not out
        assert wanted in error
        assert not done and sorted(tmp_path.rglob("*")) == before


def test_a_damaged_file_of_records_stays_as_it_is(write, capfd, done):
    study = write(STUDY)
    assert main(arguments(study)) == 0
    file = study.parent / "out" / "study.json"
    file.write_text(file.read_text()[:-20])
    damaged = file.read_text()
    capfd.readouterr()
    assert main(arguments(study)) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {file} is not a valid study record: ") and error.count("\n") == 1
    assert file.read_text() == damaged and len(done) == 2


def test_a_directory_has_one_comparison_at_a_time(write, tmp_path, capfd, done):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(arguments(write(STUDY))) == 2
        assert (
            "out is in use by another comparison; wait for it or choose another directory\n" in capfd.readouterr().err
        )
        assert main(arguments(write(STUDY), "--plan")) == 0
    assert not done
    assert main(arguments(write(STUDY))) == 0


def test_the_real_command(tmp_path):
    command = [sys.executable, "-m", "sophia_levanter.commands.compare", "--config", "nowhere.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_plans_and_mistakes_need_no_heavy_imports_and_no_letters(write):
    script = """
import sys
from sophia_levanter.commands.compare import main
assert main(["--config", sys.argv[1], "--plan"]) == 0
assert main(["--config", sys.argv[1], "--optimizer.roh", "1"]) == 2
print(*sorted({"jax", "numpy", "haliax", "equinox", "matplotlib", "ray"} & set(sys.modules)), file=sys.stderr)
"""
    command = [sys.executable, "-c", script, str(write(STUDY.replace("sophia:", "größer:")))]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ended.stderr.splitlines()[1:] == [""]
    assert "gr??er" in ended.stdout


# --- what is done, and what is not done again


def test_the_plan_is_printed_and_not_done(write, capfd, done, tmp_path):
    study = write(f"{STUDY}  lion: {{seeds: [3], settings: {{optimizer: {{type: lion}}}}}}\n")
    assert main(arguments(study, "--plan")) == 0
    assert capfd.readouterr().out.splitlines() == [
        "study: 3 runs, 3 to do",
        "to do  adamw tokens=640 seed=0",
        "to do  sophia tokens=640 seed=0",
        "to do  lion tokens=640 seed=3",
    ]
    assert not done and not (tmp_path / "out").exists()
    assert main(arguments(write(STUDY))) == 0
    study = write(f"{STUDY}  third: {{grid: {{optimizer: {{type: [adamw], b1: [0.9, 0.5]}}}}}}\n")
    capfd.readouterr()
    assert main(arguments(study, "--plan")) == 0
    # The first point of the third arm is the first arm's run.
    assert capfd.readouterr().out.splitlines() == [
        "study: 4 runs, 1 to do",
        "done   adamw tokens=640 seed=0",
        "done   sophia tokens=640 seed=0",
        "done   third optimizer.type=adamw optimizer.b1=0.9 tokens=640 seed=0",
        "to do  third optimizer.type=adamw optimizer.b1=0.5 tokens=640 seed=0",
    ]


def test_the_second_call_does_nothing_more_and_a_removed_record_is_done_again(write, tmp_path, capfd, done):
    study = write(f"{STUDY}seeds: [0, 1]\n")
    assert main(arguments(study)) == 0
    assert len(done) == 4
    assert main(arguments(study)) == 0
    assert len(done) == 4
    # Where the text lies makes no other run.
    other = tmp_path / "other.txt"
    other.write_text((tmp_path / "validation.txt").read_text())
    assert main(arguments(study, "--data.validation", other)) == 0
    assert len(done) == 4
    file = tmp_path / "out" / "study.json"
    tree = json.loads(file.read_text())
    removed = tree["runs"].pop(1)
    file.write_text(json.dumps(tree))
    assert main(arguments(study)) == 0
    assert [flat_config(job.config) for job in done[4:]] == [removed["config"]]
    assert [record.loss for record in read_records(file)] == [1.0, 3.0, 4.0, 5.0]
    assert "study: 4 runs, 1 to do\n1/1 sophia tokens=640 seed=0: validation loss 5.0000\n" in (capfd.readouterr().out)


LENGTHS = """
config: [tiny.yaml]
tokens: [640, 1280]
evaluations: 2
settings: {optimizer: {type: adamw, schedule: {type: wsd, decay: 0.25}}}
arms: {adamw: {settings: {optimizer: {WARMUP}}}}
"""


@pytest.mark.parametrize(
    ("warmup", "wanted", "step"),
    [
        ("warmup: 2", "1 run will start from a shorter run's checkpoint, reusing 9 steps", 9),
        ("warmup: 0.2", "each run trains in full: optimizer.warmup resolves to 2 or 4 steps; give it in steps", None),
    ],
)
def test_lengths_share_their_steps_or_it_says_why_not(warmup, wanted, step, write, capfd, done):
    study = write(LENGTHS.replace("WARMUP", warmup))
    assert main(arguments(study)) == 0
    assert f"study: 2 runs, 2 to do\n{wanted}" in capfd.readouterr().out
    short, long = done
    assert short.keep_step == step and long.start == (step and Start(short.directory, step))


def test_checkpoints_that_a_killed_study_left_are_removed(write, done):
    """It was killed after writing a record and before removing what the run no longer needs."""
    study = write(LENGTHS.replace("WARMUP", "warmup: 2"))
    assert main(arguments(study)) == 0
    own = [job.directory for job in done]
    others = [directory.with_name(f"{directory.name}.old") for directory in own]
    for directory in (*own, *others):
        write_manifest(directory / "checkpoints", 9)
    assert main(arguments(study)) == 0
    assert len(done) == 2
    assert [(path / "checkpoints").exists() for path in (*own, *others)] == [False, False, True, True]


def test_another_text_needs_another_place(write, tmp_path, capsys, done):
    study = write(STUDY)
    assert main(arguments(study)) == 0
    before = (tmp_path / "out" / "study.json").read_text()
    other = tmp_path / "other.txt"
    other.write_text("Another text altogether.")
    assert main(arguments(study, "--data.validation", other)) == 2
    error = capsys.readouterr().err
    assert "study.json contains runs on different text: the digest of data.validation was" in error
    assert error.count("\n") == 1
    assert (tmp_path / "out" / "study.json").read_text() == before


def test_arms_that_differ_only_in_their_text_are_refused(write, tmp_path, capfd, done):
    """A record does not say which text it is of."""
    other = tmp_path / "other.txt"
    other.write_text("Another text altogether.")
    study = write(f"{STUDY}  again: {{settings: {{data: {{train: {other}}}, optimizer: {{type: adamw}}}}}}\n")
    assert main(arguments(study)) == 2
    error = capfd.readouterr().err
    assert error == (
        "error: adamw tokens=640 seed=0 and again tokens=640 seed=0 differ only in their text, so their records could "
        "not be told apart; give each text a study with its own --out\n"
    )
    assert not done


def test_arms_share_the_runs_that_are_the_same(write, done):
    assert main(arguments(write(f"{STUDY}  again: {{settings: {{optimizer: {{type: adamw}}}}}}\n"))) == 0
    assert len(done) == 2
    assert len({job.directory for job in done}) == 2


def test_coordinate_descent_trains_until_no_neighbor_is_better(write, tmp_path, capfd, done):
    """Each run has a higher loss than the one before, so the first point is the best."""
    study = write(SEARCH)
    assert main(arguments(study)) == 0
    out = capfd.readouterr().out
    counts = [
        f"study: {done}; the search may add runs" for done in ("1 run, 1 to do", "3 runs, 2 to do", "4 runs, 1 to do")
    ]
    assert [line for line in out.splitlines() if line.startswith("study: ")] == counts
    assert [(job.config.optimizer.rho, job.config.trainer.seed) for job in done] == [
        (1.0, 0),
        (2.0, 0),
        (0.5, 0),
        (1.0, 7),
    ]
    assert "| sophia | 640 | 3 | rho 1 | 4.0000 | 1 |" in out  # the loss of seed 7
    assert "| sophia | 640 | rho 2 | 2.0000 | seed 0 | 0 | – |\n| sophia | 640 | rho 0.5 | 3.0000 | seed 0 |" in out
    assert "edge" not in out and "search used" not in out and "optimistic" not in out
    assert main(arguments(study)) == 0
    assert len(done) == 4


def test_a_search_that_ends_early_or_at_the_edge_or_with_one_seed_is_named(write, capfd, done):
    text = SEARCH.replace("[0, 7]", "[0]").replace("rho: [0.5, 1, 2]", "rho: [1, 2], b1: [0.8, 0.9]")
    assert main(arguments(write(text.replace("search_runs: 9", "search_runs: 2")))) == 0
    out = capfd.readouterr().out
    early = "the search used all 2 runs before it reached a minimum and did not vary b1; increase search_runs."
    edge = "the best rho, 1, is at the edge of its grid; try smaller values."
    one = "the reported loss also selected the best point, so it is optimistic; add seeds."
    assert all(f"- **sophia at 640 tokens: {caution}**" in out for caution in (early, edge, one))
    assert "b1, 0.8" not in out


def test_a_search_reads_the_text_of_each_point(write, done):
    """A grid over the data asks for text that the first point does not read."""
    text = SEARCH.replace("{optimizer: {rho: [0.5, 1, 2]}}", "{data: {mask_documents: [false, true]}}")
    assert main(arguments(write(text))) == 0
    assert [job.config.data.mask_documents for job in done] == [False, True, False]


def test_a_search_stops_where_a_run_fails(write, capfd, done):
    other = "adamw: {seeds: [0, 7], grid: {optimizer: {type: [adamw, lion]}}}"
    study = write(SEARCH.replace("[0, 7]", "[13, 7]").replace("arms: {", f"arms: {{{other}, "))
    assert main(arguments(study)) == 1
    # The other arm is searched to its end, and the run that failed is tried once.
    assert [job.config.trainer.seed for job in done] == [0, 13, 0, 7]
    assert "adamw at 640 tokens" not in capfd.readouterr().out


def test_failures_and_divergences_leave_the_others(write, tmp_path, capfd, done):
    study = write(f"{STUDY}seeds: [13, 66, 0]\n")
    assert main(arguments(study)) == 1
    out, error = capfd.readouterr()
    assert error == "error: a.log: no luck\n" * 2
    assert "3/6 adamw tokens=640 seed=66: diverged\n" in out
    assert "4 runs ended; 2 diverged" in out
    records = read_records(tmp_path / "out" / "study.json")
    assert [(record.config["trainer.seed"], record.status) for record in records] == [
        (66, "diverged"), (66, "diverged"), (0, "done"), (0, "done"),
    ]  # fmt: skip
    # What failed is tried again, what diverged is not.
    assert main(arguments(study)) == 1
    assert [job.config.trainer.seed for job in done[6:]] == [13, 13]


def test_results_go_to_a_directory_of_the_studys_name(write, tmp_path, monkeypatch, done):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", str(write(STUDY))]) == 0
    assert {path.name for path in (tmp_path / "studies" / "study").iterdir()} >= {"study.json", "report.md", "runs"}
    # The run's process may be elsewhere.
    assert all(job.directory.is_absolute() and Path(job.config.data.train).is_absolute() for job in done)


# --- how it is stopped


def raise_where_it_is_dropped(number: signal.Signals) -> None:
    """Raises a signal in a callback of the garbage collector, from which Python only prints exceptions. jax has one."""

    def callback(*arguments: object) -> None:
        gc.callbacks.remove(callback)
        signal.raise_signal(number)

    gc.callbacks.append(callback)
    gc.collect()


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 130, "interrupted; run the same command again to continue"),
        (signal.SIGTERM, 75, "SIGTERM: stopped; run the same command again to continue"),
    ],
)
def test_a_signal_during_a_run_ends_the_study_after_it(number, status, said, write, tmp_path, capfd, monkeypatch, done):
    do, before = runner.do, signal.getsignal(number)

    def signalled(job: Job, check_stop: CheckStop) -> Record:
        raise_where_it_is_dropped(number)
        return do(job, check_stop)

    monkeypatch.setattr(runner, "do", signalled)
    assert main(arguments(write(STUDY))) == status
    assert capfd.readouterr().err == f"{STUDY_STOPS}\n{said}\n"
    assert len(done) == len(read_records(tmp_path / "out" / "study.json")) == 1
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("first", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_ctrl_c_after_sigterm_ends_the_study_at_once(first, write, capfd, monkeypatch):
    def signalled(job: Job, check_stop: CheckStop) -> Record:
        for number in (*first, signal.SIGINT):
            signal.raise_signal(number)
        raise AssertionError("the run was not interrupted")

    monkeypatch.setattr(runner, "do", signalled)
    assert main(arguments(write(STUDY))) == 75
    said = "SIGTERM: stopped; run the same command again to continue"
    assert capfd.readouterr().err == f"{STUDY_STOPS}\n{said}\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_run_starts_after_a_signal_whose_exception_was_dropped(write, tmp_path, capfd, monkeypatch, done):
    def digests(data: object) -> dict[str, str]:
        raise_where_it_is_dropped(signal.SIGINT)
        return {"train": "a", "validation": "b"}

    monkeypatch.setattr(runner, "digests", digests)
    assert main(arguments(write(STUDY))) == 130
    assert capfd.readouterr().err.endswith("interrupted; run the same command again to continue\n")
    assert not done and not read_records(tmp_path / "out" / "study.json")
