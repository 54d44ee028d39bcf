"""Which runs compare, and what is beside each other: configurations, texts, machines."""

import json

import numpy as np
import pytest

from sophia_levanter.config.baselines import AdamWConfig
from sophia_levanter.config.optimizer import SophiaGConfig
from sophia_levanter.studies.comparability import compare, configurations, facts
from sophia_levanter.studies.page import COLUMNS, headline
from sophia_levanter.studies.runs import read_run
from tiny_runs import FACTS, TEXT, run_config, write_manifest, write_run


def read_with_facts(path, facts=FACTS, **config):
    write_run(path, run_config(**config))
    if facts is not None:
        write_manifest(path / "checkpoints", 10, facts)
    return read_run(path.name, path)


def test_runs_that_compare(tmp_path):
    found = compare([read_with_facts(tmp_path / "a"), read_with_facts(tmp_path / "b")])
    assert (found.same_tokenizer, found.same_text, found.notes) == (True, True, [])


def test_runs_of_different_tokenizers(tmp_path):
    other = FACTS | {"validation": TEXT | {"tokenizer": "gpt2'", "tokens": 300, "digest": "xyz"}}
    runs = [read_with_facts(tmp_path / "a"), read_with_facts(tmp_path / "b", other, data={"tokenizer": "gpt2"})]
    found = compare(runs)
    assert (found.same_tokenizer, found.same_text) == (False, True)
    assert len(found.notes) == 1 and "Losses per token cannot be compared" in found.notes[0]
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in headline(runs, found)]
    assert not any(row["last validation loss"].best or row["best validation loss"].best for row in rows)


@pytest.mark.parametrize("with_facts", [True, False])
def test_runs_of_different_validation_texts(with_facts, tmp_path):
    others = FACTS | {"validation": TEXT | {"digest": "xyz"}}
    runs = [
        read_with_facts(tmp_path / "a", FACTS if with_facts else None),
        read_with_facts(tmp_path / "b", others if with_facts else None, data={"validation": "/texts/other.txt"}),
    ]
    found = compare(runs)
    assert (found.same_tokenizer, found.same_text) == (True, False)
    assert "Even bits per byte are not exactly comparable" in found.notes[0]
    assert not any(cell.best for row in headline(runs, found) for cell in row)


def test_a_tokenizer_of_one_name_may_have_changed(tmp_path):
    other = FACTS | {"validation": TEXT | {"tokenizer": "other'", "documents": 4}}
    found = compare([read_with_facts(tmp_path / "a"), read_with_facts(tmp_path / "b", other)])
    assert (found.same_tokenizer, found.same_text) == (False, False)


def test_other_windows_are_pointed_out(tmp_path):
    runs = [read_with_facts(tmp_path / "a"), read_with_facts(tmp_path / "b", trainer={"evaluation_windows": 7})]
    assert "different sequences" in compare(runs).notes[0]
    masked = read_with_facts(tmp_path / "c", data={"mask_documents": True})
    assert "data.mask_documents" in compare([runs[0], masked]).notes[0]


def test_facts_come_from_the_newest_checkpoint_that_can_be_read(tmp_path):
    write_run(tmp_path)
    write_manifest(tmp_path / "checkpoints", 5)
    write_manifest(tmp_path / "checkpoints", 8).write_text("{}")
    write_manifest(tmp_path / "checkpoints", 10, {"of": "another program"})
    run = read_run("a", tmp_path)
    assert run.checkpoint == "step 10 was not saved by a training run; step 8 is damaged; step 5"
    assert any("damaged checkpoints" in note for note in compare([run]).notes)
    rows = dict(facts([run]))
    assert rows["device"] == ["1 × cpu, 2 threads"] and rows["jax"] == ["0.10.2"]
    assert rows["checkpoint"] == [run.checkpoint]
    assert "--secret" not in json.dumps(rows)


@pytest.mark.parametrize(
    "text", [{}, {"mixture": 5}, {"mixture": [1, {}]}, {"tokens": "many"}, {"tokens": None, "digest": ["x"]}], ids=str
)
def test_facts_of_another_program_s_checkpoint(text, tmp_path):
    write_run(tmp_path)
    write_manifest(tmp_path / "checkpoints", 10, {"environment": {"device": "cpu"}, "data": text, "validation": text})
    run = read_run("a", tmp_path)
    assert dict(facts([run]))["device"] == ["None × cpu, None threads"] and compare([run]).same_text


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (None, "none yet"),
        ("s3://nobody/answers", "not checked: s3://nobody/answers"),
        ("s3://a/damaged/disk", "not checked: s3://a/damaged/disk"),
    ],
)
def test_a_run_without_checkpoints_at_hand(place, says, tmp_path):
    run = read_run("a", write_run(tmp_path, run_config(trainer={"checkpoint_dir": place})))
    assert (run.checkpoint, dict(facts([run]))["jax"]) == (says, ["–"])
    assert compare([run]).notes == []


def test_checkpoints_elsewhere_are_read(tmp_path):
    write_manifest(tmp_path / "far", 10)
    run = read_run("a", write_run(tmp_path / "run", run_config(trainer={"checkpoint_dir": str(tmp_path / "far")})))
    assert run.checkpoint == "step 10"
    assert dict(facts([run]))["training text"] == ["/texts/train.txt"]


def test_named_validation_sets(tmp_path):
    sets = {"books": "/texts/books.txt", "code": "/texts/code.txt"}
    write_run(tmp_path, run_config(data={"validation": sets}))
    text = {"tokenizer": "bytes'", "sets": [{"name": "books", **TEXT}, {"name": "code", **TEXT, "digest": "def"}]}
    write_manifest(tmp_path / "checkpoints", 10, FACTS | {"validation": text})
    run = read_run("a", tmp_path)
    shown = [
        values for name, values in facts([run]) if name in ("validation text", "validation digest", "validation tokens")
    ]
    assert shown == [["books: /texts/books.txt, code: /texts/code.txt"], ["abc, def"], ["1,000, 1,000"]]
    assert compare([run, run]).same_text


def test_a_tokenizer_that_has_gone(tmp_path):
    config = run_config(data={"tokenizer": str(tmp_path / "gone.tokenizer.json")})
    run = read_run("a", write_run(tmp_path, config))
    assert run.parameters is None and run.flops_at(np.array(1)) is None
    assert "its parameter count and FLOPs are unknown" in compare([run]).notes[0]
    write_manifest(tmp_path / "checkpoints", 10)
    assert read_run("a", tmp_path).parameters == 8 * (384 + 10 + 12 * 8 + 3)


def test_configurations_differ_first_where_all_have_the_field(tmp_path):
    sophia = run_config(optimizer=SophiaGConfig(learning_rate=1e-3, warmup=0), trainer={"run_dir": "/a"})
    adamw = run_config(optimizer=AdamWConfig(learning_rate=2e-3, warmup=0), trainer={"run_dir": "/b"})
    runs = [read_run(n, write_run(tmp_path / n, c)) for n, c in (("s", sophia), ("a", adamw))]
    differing, same = configurations(runs)
    assert differing[:2] == [("optimizer.type", ["sophia_g", "adamw"]), ("optimizer.learning_rate", ["0.001", "0.002"])]
    assert ("optimizer.rho", ["0.05", "–"]) in differing and ("trainer.batch_size", ["5", "5"]) in same
    lacking = [name for name, values in differing if "–" in values]
    assert [name for name, _ in differing][-len(lacking) :] == lacking
    assert "trainer.run_dir" not in dict(differing) | dict(same)
