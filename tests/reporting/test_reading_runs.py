"""Run directories become runs: metrics, axes, status, facts."""

import json
import os
import time

import numpy as np
import pytest

from sophia_levanter.comparison.costs import flops_per_token as counted_flops_per_token
from sophia_levanter.comparison.runner import read_run as read_record
from sophia_levanter.config.optimizer import AdamWConfig, SophiaGConfig
from sophia_levanter.config.trainer import BatchSizeChange
from sophia_levanter.errors import InputError
from sophia_levanter.reporting.axes import AXES, STEPS
from sophia_levanter.reporting.comparability import compare
from sophia_levanter.reporting.details import configurations, facts
from sophia_levanter.reporting.headline import COLUMNS, headline, short, status
from sophia_levanter.reporting.metrics import read_metrics
from sophia_levanter.reporting.runs import read_run
from written_runs import FACTS, TEXT, run_config, step_lines, write_manifest, write_run


def test_metrics_are_series_of_steps_done(tmp_path):
    write_run(tmp_path, lines=[{"step": 0, "train/loss": 5.0}, {"step": 1, "train/loss": None}, {"step": 1, "v": 2}])
    series = read_metrics(tmp_path / "metrics.jsonl")
    assert series["train/loss"].steps.tolist() == [1, 2]
    np.testing.assert_array_equal(series["train/loss"].values, [5.0, np.nan])
    assert (series["v"].steps.tolist(), series["v"].last) == ([2], 2.0)


@pytest.mark.parametrize("rest", ['{"step": 2, "train/lo', '{"step"', "\0\0\0"])
def test_a_line_that_a_kill_cut_short_is_not_there(rest, tmp_path):
    write_run(tmp_path, lines=step_lines(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rest)
    assert read_metrics(tmp_path / "metrics.jsonl")["train/loss"].steps.tolist() == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[1]", "5", '{"train/loss": 1}', '{"step": "1"}', '{"step": 1, "train/loss": "low"}', "\xff", ""),
        *('{"step": 1.5}', '{"step": 1.0}', '{"step": -1}', '{"step": true}', '{"step": null}', '{"step": 2147483648}'),
        '{"step": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"step": 1, "a": 1' + "0" * 400 + "}",
        '{"step": 1, "a": 1' + "0" * 5000 + "}",
        '{"step": 1, "a": 1e200}',
        '{"step": 1, "a": {}}',
        '{"step": 1, "a": "' + "x" * 3_000_000 + '"}',
    ],
    ids=range(20),
)
def test_a_damaged_line_is_named(line, tmp_path):
    write_run(tmp_path, lines=[])
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "train/loss": 5}\n' + line.encode("latin1") + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    write_run(tmp_path, lines=[])
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "a": NaN}\n{"step": 1, "a": -Infinity}\n{"step": 2, "a": 1e999}\n'
    )
    assert np.isnan(read_metrics(tmp_path / "metrics.jsonl")["a"].values).all()


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


def test_steps_that_go_back_are_no_run(tmp_path):
    write_run(tmp_path, lines=[{"step": 4, "train/loss": 1.0}, {"step": 3, "train/loss": 1.0}])
    with pytest.raises(InputError, match="the steps of train/loss do not ascend"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("content", ["", '{"step": 0, "tr'])
def test_a_run_without_a_step(content, tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match="holds no step yet"):
        read_run("a", tmp_path)


def test_what_is_no_run_directory(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.yaml"):
        read_run("a", tmp_path)
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"holds no metrics\.jsonl; name the directory of a run that has begun"):
        read_run("a", tmp_path)


def positions(run) -> dict:
    return {axis.key: axis.positions(run, np.array([0, 3, 10])) for axis in AXES}


def test_axes_count_what_steps_take(tmp_path):
    lines = [line for line in step_lines(10) if "train/loss" in line]
    for line in lines:
        line["train/tokens_per_second"] = 50 / (0.5 if line["step"] < 3 else 0.1)
    run = read_run("a", write_run(tmp_path, lines=[*lines, *step_lines(10)[-1:]]))
    found = positions(run)
    assert found["steps"].tolist() == [0, 3, 10]
    assert found["tokens"].tolist() == [0, 150, 500]
    np.testing.assert_allclose(found["time"], [0, 1.5, 2.2])
    # As a study counts it: a refresh at every second step, two thirds of a gradient each.
    per_token = counted_flops_per_token(read_record(run_config(), tmp_path, diverged=False))
    assert per_token == pytest.approx((6 * (12 * 8**2 + 384 * 8) + 12 * 8 * 10) * (1 + 1 / 3))
    np.testing.assert_allclose(found["flops"], per_token * np.array([0, 150, 500]))


def test_axes_follow_the_batch_size(tmp_path):
    changes = (BatchSizeChange(2, 10), BatchSizeChange(6, 20))
    optimizer = AdamWConfig(warmup_steps=0)
    lines = [line for line in step_lines(10) if "train/loss" in line]
    for line in lines:
        line["train/tokens_per_second"] = 100.0
    config = run_config(trainer={"batch_size_changes": changes}, optimizer=optimizer)
    run = read_run("a", write_run(tmp_path, config, lines))
    tokens = np.array([0, 2 * 50 + 100, 2 * 50 + 4 * 100 + 4 * 200])
    found = positions(run)
    np.testing.assert_allclose(found["tokens"], tokens)
    np.testing.assert_allclose(found["time"], tokens / 100)
    np.testing.assert_allclose(found["flops"], tokens * (6 * (12 * 8**2 + 384 * 8) + 12 * 8 * 10))


def test_steps_whose_lines_are_gone_take_time(tmp_path):
    lines = [line | {"train/tokens_per_second": 100.0} for line in step_lines(10) if "train/loss" in line]
    run = read_run("a", write_run(tmp_path, lines=[line for line in lines if line["step"] > 4 and line["step"] != 7]))
    assert run.seconds_at(np.array(10)) == pytest.approx(500 / 100)


def test_a_run_without_rates_has_no_time(tmp_path):
    run = read_run("a", write_run(tmp_path, lines=[{"step": 0, "train/loss": 5.0}]))
    assert positions(run)["time"] is None
    row = dict(zip(COLUMNS, headline([run], compare([run]))[0], strict=True))
    assert (row["tokens/s"].text, row["MFU"].text, row["last validation loss"].text) == ("–", "–", "–")


def test_units_suit_the_longest_run(tmp_path):
    runs = [read_run("a", write_run(tmp_path / "a")), read_run("b", write_run(tmp_path / "b", lines=step_lines(1)))]
    by_key = {axis.key: axis.unit(runs) for axis in AXES}
    assert by_key["tokens"] == (1, "training tokens") and by_key["steps"] == (1, "steps")
    assert by_key["time"] == (1, "training time (seconds)")
    slow = [read_run("c", write_run(tmp_path / "c", lines=step_lines(10, seconds=1500)))]
    assert AXES[3].unit(slow) == (3600, "training time (hours)")
    assert STEPS.unit(slow) == (1, "steps")


def with_losses(losses: list[float | None], **more: float | None) -> list[dict]:
    lines: list[dict] = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses)]
    return [*lines, {"step": len(losses) - 1, **more}] if more else lines


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (step_lines(10), "finished"),
        (step_lines(7), "at step 7, 0 s ago"),
        (with_losses([5.0] * 9 + [None]), "finished"),  # one step was skipped
        (with_losses([5.0, None, None, None]), "diverged, at step 4"),
        (with_losses([5.0] * 10, **{"validation/loss": None}), "diverged"),
        (with_losses([None]), "diverged, at step 1"),
        (with_losses([5.0] * 50 + [9.0] * 50), "diverged"),
    ],
)
def test_status(lines, expected, tmp_path):
    run = read_run("a", write_run(tmp_path, run_config(trainer={"max_skipped_steps": 3}), lines))
    assert status(run) == expected


def test_a_run_that_was_left_has_stopped(tmp_path):
    write_run(tmp_path, lines=step_lines(7))
    old = time.time() - 2 * 86_400
    os.utime(tmp_path / "metrics.jsonl", (old, old))
    assert status(read_run("a", tmp_path)) == "stopped at step 7"


def test_the_headline(tmp_path):
    other = run_config(optimizer=AdamWConfig(warmup_steps=0))
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


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (12_345, "12.3k"), (999_600, "1.00M"), (1.5577e9, "1.56B")],
)
def test_short_numbers(number, text):
    assert short(number) == text


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
    assert len(found.notes) == 1 and "losses per token cannot be compared" in found.notes[0]
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
    assert "not even their bits per byte compare exactly" in found.notes[0]
    assert not any(cell.best for row in headline(runs, found) for cell in row)


def test_a_tokenizer_of_one_name_may_have_changed(tmp_path):
    other = FACTS | {"validation": TEXT | {"tokenizer": "other'", "documents": 4}}
    found = compare([read_with_facts(tmp_path / "a"), read_with_facts(tmp_path / "b", other)])
    assert (found.same_tokenizer, found.same_text) == (False, False)


def test_other_windows_are_pointed_out(tmp_path):
    runs = [read_with_facts(tmp_path / "a"), read_with_facts(tmp_path / "b", trainer={"evaluation_windows": 7})]
    assert "different windows" in compare(runs).notes[0]


def test_facts_come_from_the_newest_checkpoint_that_can_be_read(tmp_path):
    write_run(tmp_path)
    write_manifest(tmp_path / "checkpoints", 5)
    write_manifest(tmp_path / "checkpoints", 8).write_text("{}")
    write_manifest(tmp_path / "checkpoints", 10, {"of": "another program"})
    run = read_run("a", tmp_path)
    assert run.checkpoint == "step 10 is no training run's; step 8 is damaged; step 5"
    assert any("damaged checkpoints" in note for note in compare([run]).notes)
    rows = dict(facts([run]))
    assert rows["device"] == ["1 × cpu, 2 threads"] and rows["jax"] == ["0.10.2"]
    assert rows["checkpoint that this is from"] == [run.checkpoint]
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
    ("place", "says"), [(None, "none yet"), ("s3://nobody/answers", "not looked at: s3://nobody/answers")]
)
def test_a_run_without_checkpoints_at_hand(place, says, tmp_path):
    run = read_run("a", write_run(tmp_path, run_config(trainer={"checkpoint_dir": place})))
    assert (run.checkpoint, dict(facts([run]))["jax"]) == (says, ["–"])


def test_checkpoints_elsewhere_are_read(tmp_path):
    write_manifest(tmp_path / "far", 10)
    run = read_run("a", write_run(tmp_path / "run", run_config(trainer={"checkpoint_dir": str(tmp_path / "far")})))
    assert run.checkpoint == "step 10"
    assert dict(facts([run]))["training text"] == ["/texts/train.txt"]


def test_a_tokenizer_that_has_gone(tmp_path):
    config = run_config(data={"tokenizer": str(tmp_path / "gone.tokenizer.json")})
    run = read_run("a", write_run(tmp_path, config))
    assert run.parameters is None and positions(run)["flops"] is None
    assert "its parameters and FLOPs are not known" in compare([run]).notes[0]
    write_manifest(tmp_path / "checkpoints", 10)
    assert read_run("a", tmp_path).vocab_size == 384


def test_configurations_differ_first_where_all_have_the_field(tmp_path):
    sophia = run_config(optimizer=SophiaGConfig(learning_rate=1e-3, warmup_steps=0), trainer={"run_dir": "/a"})
    adamw = run_config(optimizer=AdamWConfig(learning_rate=2e-3, warmup_steps=0), trainer={"run_dir": "/b"})
    runs = [read_run(n, write_run(tmp_path / n, c)) for n, c in (("s", sophia), ("a", adamw))]
    differing, same = configurations(runs)
    assert differing[:2] == [("optimizer.type", ["sophia_g", "adamw"]), ("optimizer.learning_rate", ["0.001", "0.002"])]
    assert ("optimizer.rho", ["0.05", "–"]) in differing and ("trainer.batch_size", ["5", "5"]) in same
    lacking = [name for name, values in differing if "–" in values]
    assert [name for name, _ in differing][-len(lacking) :] == lacking
    assert "trainer.run_dir" not in dict(differing) | dict(same)
