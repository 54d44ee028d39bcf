"""A run with named validation sets and a task: what it measures, which checkpoint is its best, and who reads that."""

import contextlib
import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from sophia_levanter import checkpoint
from sophia_levanter.commands import evaluate
from sophia_levanter.config.command_line import load_config
from sophia_levanter.main import main
from sophia_levanter.run.resuming import best_so_far
from sophia_levanter.studies.page import sets_and_tasks
from sophia_levanter.studies.runs import read_run
from tiny_runs import metrics, write_config, write_text

SETS = ("books", "code")
LOSS = r"\d\.\d{4}"


@dataclass(frozen=True)
class NamedRun:
    """A run of two steps that tests only read, in a folder with its configuration and its texts."""

    folder: Path
    output: str

    @property
    def path(self) -> Path:
        return self.folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> NamedRun:
    folder, output = tmp_path_factory.mktemp("named"), io.StringIO()
    file = write_config(folder, write_text(folder))
    (folder / "books.txt").write_text("It was a dark and stormy night, and nobody wrote a line.\n" * 4)
    (folder / "code.txt").write_text("".join(f"x{i} = {i} * y\n" for i in range(40)))
    questions = [{"goal": f"Line {i}", "sol1": "says that", "sol2": "is", "label": i % 2} for i in range(10)]
    (folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, questions)))
    config = yaml.safe_load(file.read_text())
    config["optimizer"] = {"type": "adamw", "learning_rate": 1e-2, "warmup": 0}
    config["data"]["validation"] = {name: str(folder / f"{name}.txt") for name in SETS}
    config["trainer"] |= {"num_train_steps": 2, "evaluate_every": 1, "checkpoint_every": 1}
    config["trainer"] |= {"best_by": "code", "tasks_every": 2}
    config["trainer"] |= {"tasks": [{"task": "piqa", "file": str(folder / "piqa.jsonl"), "name": "lines"}]}
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    with contextlib.redirect_stdout(output):
        assert main(["--config", str(file), "--trainer.run_dir", str(folder / "run")]) == 0
    return NamedRun(folder, output.getvalue())


def test_it_measures_each_set_and_the_mean_and_the_task(run):
    for key in ("loss", "bits_per_byte"):
        books, code, mean = (metrics(run.path, f"validation/{name}{key}") for name in ("books/", "code/", ""))
        assert list(books) == list(code) == list(mean) == [0, 1]
        assert books != code and mean == {step: pytest.approx((books[step] + code[step]) / 2) for step in mean}
    accuracy = metrics(run.path, "tasks/lines/accuracy")
    assert list(accuracy) == [1] and 0 <= accuracy[1] <= 1
    assert list(metrics(run.path, "tasks/lines/normalized_accuracy_interval")) == [1]
    for wanted in (
        r"\ndata: [\d,]+ training and [\d,]+ validation tokens: books 2\d\d, code [\d,]+\n",
        rf"\nstep 1: validation loss {LOSS} nats per token, {LOSS} bits per byte, "
        rf"the mean of books \({LOSS}, {LOSS}\), code \({LOSS}, {LOSS}\)\n",
        rf"\nstep 2: lines accuracy {LOSS} ± {LOSS}, normalized accuracy {LOSS} ± {LOSS}\n",
        rf"\nvalidation books: {LOSS} nats per token, {LOSS} bits per byte\n",
        rf"\nbest validation: {LOSS} nats per token on code, after step [12]\n",
    ):
        assert re.search(wanted, run.output), wanted


def test_its_best_checkpoint_is_by_the_set_that_is_named(run):
    losses = metrics(run.path, "validation/code/loss")
    best = min(losses, key=losses.get)
    first, last = (checkpoint.read_step(run.path / "checkpoints", step).metadata for step in (1, 2))
    assert last["best"] == {"step": best + 1, "validation/code/loss": losses[best]}
    assert [one["name"] for one in last["validation"]["sets"]] == list(SETS)
    assert "validation/books/loss" in first["metrics"] and "tasks/lines/accuracy" not in first["metrics"]
    assert "tasks/lines/accuracy" in last["metrics"]

    config = load_config(run.path / "config.yaml")
    restored = SimpleNamespace(metadata=last)

    def best_of(validation, restored=restored, name="best", **trainer):
        changed = replace(config, trainer=replace(config.trainer, **trainer))
        return best_so_far(SimpleNamespace(config=changed, provenance={"validation": validation}), restored, name)

    now = last["validation"]
    assert best_of(now) == last["best"]
    assert best_of(now, best_by="books") is None and best_of(now, best_by=None) is None
    assert best_of(now | {"sets": now["sets"] * 2}) is None
    older = SimpleNamespace(metadata={name: last[name] for name in last if name != "best_evaluation"})
    assert best_of(now, older, "best_evaluation") == last["best"]


def test_evaluate_and_reports_read_them(run, capfd):
    def shown(*words):
        assert evaluate.main([str(run.path), *words]) == 0
        return capfd.readouterr().out

    def last(name):
        return f"{metrics(run.path, name)[1]:.4f}"

    out = shown("--windows", "20")
    assert re.findall(r"text +(\w+: .*), tokenizer bytes\n", out) == [f"{n}: {run.folder}/{n}.txt" for n in SETS]
    found = [re.search(rf"{re.escape(name)}.txt, tokenizer bytes\nloss +({LOSS})", out)[1] for name in SETS]
    assert list(map(float, found)) == pytest.approx([float(last(f"validation/{name}/loss")) for name in SETS], abs=2e-4)
    assert f"mean           {last('validation/loss')} nats per token, {last('validation/bits_per_byte')} bits" in out
    # Another text is read without the set that the run's best checkpoint is by.
    alone = shown("--windows", "20", "--data.validation", str(run.folder / "books.txt"))
    assert f"text           {run.folder}/books.txt, tokenizer bytes\nloss           {found[0]}" in alone
    scores = shown("--task", "piqa", "--file", str(run.folder / "piqa.jsonl"))
    assert f"accuracy       {last('tasks/lines/accuracy')} ± {last('tasks/lines/accuracy_interval')}\n" in scores

    rows = dict(sets_and_tasks([read_run("run", run.path)]))
    assert rows["validation/code/loss"] == [last("validation/code/loss")]
    assert rows["tasks/lines/accuracy"] == [f"{last('tasks/lines/accuracy')} ± {last('tasks/lines/accuracy_interval')}"]


def test_a_task_that_cannot_be_read_is_found_before_anything_is_done(run, tmp_path, capfd):
    words = ["--config", str(run.folder / "tiny.yaml"), "--trainer.run_dir", str(tmp_path / "run")]
    assert main([*words, "--trainer.tasks", f"[{{task: arc, file: {run.folder}/piqa.jsonl}}]"]) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith(f"error: trainer.tasks: arc: {run.folder}/piqa.jsonl: line 1 is not a valid arc item: ")
    assert shown.err.count("\n") == 1 and "prepar" not in shown.out and not (tmp_path / "run").exists()
