"""What commands print, as a whole, against files in tests/snapshots/, so that a change of words is seen in a review.

UPDATE_SNAPSHOTS=1 pytest tests/test_console_output.py writes the files anew.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sophia_levanter.commands import launch, report
from sophia_levanter.main import main
from tiny_runs import FACTS, TEXT, run_config, step_lines, write_manifest, write_run

SNAPSHOTS = Path(__file__).parent / "snapshots"
# What differs between runs and between machines.
VARYING = {
    r"\b[0-9a-f]{16,}\b": "<digest>",
    r"\d+:\d\d:\d\d": "<time>",
    r"\d+ s ago": "<time> ago",
    r"[\d,.]+ [KMG]iB": "<size>",
    r"[\d,]+ tokens/s": "<rate> tokens/s",
    r"\d+ steps? waited": "<count> steps waited",
    r"\d+\.\d+": "<number>",
    # A slow machine prints more lines of progress, which are alike without their numbers.
    r"(?m)^step \d+/": "step <count>/",
    r"(?m)^(step <count>/.*\n)\1+": r"\1",
}


def check(name: str, printed: str, *folders: Path) -> None:
    """Compares what was printed with a snapshot, which has placeholders for folders and for what varies."""
    for folder in folders:
        printed = printed.replace(str(folder), "<folder>")
    printed = printed.replace(sys.executable, "<python>")
    for pattern, placeholder in VARYING.items():
        printed = re.sub(pattern, placeholder, printed)
    file = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOTS.mkdir(exist_ok=True)
        file.write_text(printed, encoding="utf-8")
    before = file.read_text(encoding="utf-8") if file.exists() else None
    if printed != before:
        lines = [text.splitlines(keepends=True) for text in (before or "", printed)]
        diff = "".join(difflib.unified_diff(*lines, f"tests/snapshots/{file.name}", "printed now"))
        pytest.fail(f"if this is meant: UPDATE_SNAPSHOTS=1 pytest tests/test_console_output.py\n{diff}", pytrace=False)


@pytest.fixture
def said(capsys) -> Callable[..., str]:
    """Runs a command, and returns its command line and all that it prints."""

    def run(command: Callable[[Sequence[str]], int], words: str, status: int = 0) -> str:
        capsys.readouterr()
        ended = command(words.split())
        out, error = capsys.readouterr()
        assert ended == status, out + error
        return f"$ {words}\n{out}{error}"

    return run


def test_a_run(finished_run):
    check("run", finished_run.output, finished_run.path.parent)


def test_a_resumed_run(finished_run, tmp_path, said):
    run_dir = finished_run.copy(tmp_path / "run", steps=[6])
    check("resume", said(main, f"--resume {run_dir}"), tmp_path, finished_run.path.parent)


REFUSED = (
    "--optimizer.lerning_rate 1",
    "--trainer.num_train_steps many",
    "--optimizer.eps 1e-50",
    "--model.num_heads 3",
    "--trainer.microbatch_size 5",
    "--data.train nowhere.txt",
    "--trainer.run_dir full",
    "--resume auto",
)


def test_refusals(config_file, tmp_path, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    full = write_run(tmp_path / "full")
    before = sorted(full.iterdir())
    check("refusals", "".join(said(main, f"--config tiny.yaml {words}", 2) for words in REFUSED), tmp_path)
    assert sorted(full.iterdir()) == before and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("cluster", ["local\nprocesses: 2", "ray\nworkers: 2"])
def test_a_launch(cluster, config_file, tmp_path, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.yaml").write_text(f"backend: {cluster}\n")
    printed = said(launch.main, "--config tiny.yaml --cluster cluster.yaml --trainer.run_dir run --dry_run")
    check(f"launch_{cluster.split()[0]}", printed, tmp_path)


def test_a_report(tmp_path, said, monkeypatch):
    """Of a finished run, and of one with another tokenizer that goes on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sophia_levanter.studies.page.png", lambda *_: b"")
    monkeypatch.setattr("sophia_levanter.studies.page.svg", lambda *_: "data:")
    other = FACTS | {"validation": TEXT | {"tokenizer": "gpt2'", "digest": "xyz"}}
    write_run(tmp_path / "small")
    write_manifest(tmp_path / "small" / "checkpoints", 10)
    write_run(tmp_path / "gpt2", run_config(data={"tokenizer": "gpt2"}), step_lines(7))
    write_manifest(tmp_path / "gpt2" / "checkpoints", 7, other, vocab_size=50304)
    check("report", said(report.main, "small GPT-2=gpt2"))
