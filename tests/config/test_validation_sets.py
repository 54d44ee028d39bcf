"""Named validation sets and tasks in configurations: how they are written and merged, and what is refused."""

from pathlib import Path

import pytest
from refusals import load_error

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.build import flat
from sophia_levanter.config.command_line import dump_config, load_config
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.run import with_steps
from sophia_levanter.config.trainer import TaskConfig
from sophia_levanter.run.directory import with_absolute_paths
from sophia_levanter.run.provenance import shared_config

SETS = "data: {validation: {books: books.txt, code: 'code/*.py'}}\n"
TASKS = "trainer: {tasks: [{task: arc, file: easy.jsonl, name: arc_easy}, {task: piqa, file: piqa.jsonl}]}\n"


def test_sets_have_names(write):
    config = load_config(write(SETS))
    assert config.data.validation_sets == {"books": "books.txt", "code": "code/*.py"}
    assert load_config(write(dump_config(config))) == config
    assert flat(config)["data.validation.code"] == "code/*.py"
    assert hash(config.data) == hash(load_config(write(dump_config(config))).data)
    one = load_config(write("data: {validation: text.txt}"))
    assert one.data.validation_sets == {"": "text.txt"} and DataConfig().validation_sets == {}


@pytest.mark.parametrize(
    ("above", "overrides", "expected"),
    [
        ("data: {validation: {code: other, laws: laws}}", [], {"books": "books.txt", "code": "other", "laws": "laws"}),
        ("data: {validation: text.txt}", [], "text.txt"),
        ("data: {validation: null}", [], None),
        ("data: {train: text.txt}", [("data.validation", "text.txt")], "text.txt"),
        ("", [("data.validation", "null")], None),
        ("", [("data.validation.code", "1")], {"books": "books.txt", "code": "1"}),
        ("data: {validation: text.txt}", [("data.validation.code", "1")], {"code": "1"}),
    ],
)
def test_what_is_given_later_counts(above, overrides, expected, write):
    write(SETS, "sets.yaml")
    assert load_config(write(f"defaults: [sets.yaml]\n{above}"), overrides).data.validation == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("validation: {}", "data.validation is empty; specify a source, or several as NAME: SOURCE"),
        (
            "validation: {a/b: x}",
            "data.validation: 'a/b' is not a valid name; use letters, digits, _ and - ('type' is reserved)",
        ),
        ("validation: {type: x}", "data.validation: 'type' is not a valid name; use letters"),
        (
            "validation: {a: ''}",
            "data.validation.a is empty; specify a file, hub:NAME or another source, or omit the setting",
        ),
        ("validation: {a: 5}", "data.validation.a is *** (int); it must be a quoted string"),
        ("validation: {a: {b: c}}", "data.validation.a is a mapping; it must be a quoted string"),
    ],
)
def test_sets_that_are_none(text, expected, write):
    assert expected in load_error(write(f"data: {{{text}}}"))


def test_a_source_and_sets_do_not_go_together(write):
    overrides = [("data.validation", "a.txt"), ("data.validation.code", "b.txt")]
    expected = "data.validation and data.validation.code cannot be combined; specify only one"
    assert load_error(write(""), *overrides) == load_error(write(SETS), *overrides[::-1]) == expected


def test_the_best_is_by_a_set_that_is_there(write):
    assert load_config(write(SETS)).trainer.best_metric == "validation/loss"
    assert load_config(write(SETS), [("trainer.best_by", "code")]).trainer.best_metric == "validation/code/loss"
    assert load_error(write(SETS), ("trainer.best_by", "laws")) == (
        "trainer.best_by is 'laws', which is not a set in data.validation; valid sets are books, code"
    )
    for data in ("", "data: {validation: books}"):
        assert load_error(write(data), ("trainer.best_by", "books")) == (
            "trainer.best_by is 'books', which is not a set in data.validation; specify sets as NAME: SOURCE, or "
            "omit best_by"
        )


def test_paths_hold_from_anywhere_and_processes_agree_on_names_alone(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("books.txt", "code/a.py", "text.txt"):
        write("x", name)
    config = load_config(write(f"{SETS}{TASKS}"), [("trainer.best_by", "code"), ("data.train", "text.txt")])
    resolved = with_absolute_paths(config)
    assert resolved.data.validation == {"books": f"{tmp_path}/books.txt", "code": f"{tmp_path}/code/*.py"}
    assert [task.file for task in resolved.trainer.tasks] == [f"{tmp_path}/easy.jsonl", f"{tmp_path}/piqa.jsonl"]
    elsewhere = load_config(write(f"{SETS}{TASKS}"), [("trainer.best_by", "code"), ("data.validation.books", "other")])
    assert shared_config(config) == shared_config(elsewhere)
    assert shared_config(config) != shared_config(load_config(write(f"{SETS}{TASKS}"), [("data.validation.c", "x")]))


def test_tasks(write):
    trainer = load_config(write(TASKS)).trainer
    assert trainer.tasks == (TaskConfig("arc", "easy.jsonl", "arc_easy"), TaskConfig("piqa", "piqa.jsonl"))
    assert [task.title for task in trainer.tasks] == ["arc_easy", "piqa"]
    config = load_config(write(TASKS), [("trainer.num_train_steps", "80")])
    assert config.trainer.tasks_interval == with_steps(config).trainer.tasks_every == 20
    assert load_config(write(dump_config(config))) == config
    assert TrainConfig().trainer.tasks == ()


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("[{task: squad, file: f}]", "trainer.tasks.task is 'squad'; it must be one of hellaswag, piqa, arc, lambada"),
        ("[{task: piqa}]", "trainer.tasks[0].file is missing; valid fields are task, file, name"),
        ("[{task: piqa, file: f, name: a b}]", "trainer.tasks: 'a b' is not a valid name; use letters"),
        (
            "[{task: arc, file: a}, {task: arc, file: b}]",
            "trainer.tasks contains several tasks named arc; give each a unique name",
        ),
    ],
)
def test_tasks_that_are_none(tasks: str, expected: str, write, tmp_path: Path):
    assert expected in load_error(write(f"trainer: {{tasks: {tasks}}}"))
