"""metrics.jsonl: what is written, and what a resumed run keeps of it."""

import json
import math
import shutil
from pathlib import Path

import pytest

from sophia_levanter.tracking.jsonl import JsonLines


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.log(0, {"train/loss": 2.5})
    # Readable before the file is closed: a run may be watched, or die.
    assert records(path) == [{"step": 0, "train/loss": 2.5}]
    # The reader takes a number as large as the last one for damage.
    lines.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "tasks/a/perplexity": 1e200})
    lines.close()
    assert records(path)[1] == {"step": 1, "train/loss": None, "train/grad_norm": None, "tasks/a/perplexity": None}


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in range(5):
        lines.log(step, {"train/loss": float(step)})
    lines.close()
    with path.open("ab") as file:
        file.write(b'{"step": null}\n{"step": "x"}\n[]\n\xff\n{"step": 5, "train/lo')
    lines = JsonLines(path, first_step=3)
    lines.log(3, {"train/loss": 30.0})
    lines.close()
    assert [(r["step"], r["train/loss"]) for r in records(path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "remove",
    [
        lambda run: shutil.rmtree(run),
        lambda run: run.rename(run.with_name("renamed")),
        lambda run: (run / "metrics.jsonl").unlink(),
        lambda run: (run / "other").replace(run / "metrics.jsonl"),
    ],
    ids=["removed", "renamed", "file removed", "file replaced"],
)
def test_a_file_that_is_gone_is_noticed(tmp_path, remove):
    run = tmp_path / "run"
    run.mkdir()
    (run / "other").touch()
    path = run / "metrics.jsonl"
    lines = JsonLines(path)
    lines.log(0, {"train/loss": 2.5})
    remove(run)
    for write in (lambda: lines.log(1, {"train/loss": 2.5}), lines.sync, lines.close):
        with pytest.raises(OSError, match=r"metrics\.jsonl was removed, renamed or replaced during the run"):
            write()
