"""The file of records, and which record is of which configuration."""

import dataclasses
import json
import os

import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.optimizer import SophiaGConfig, SophiaHConfig
from sophia_levanter.config.trainer import TaskConfig, TrainerConfig
from sophia_levanter.errors import InputError
from sophia_levanter.studies.records import config_of, find, flat_config, read_records, write_records


def test_records_are_read_back_as_they_were(make_record, tmp_path):
    config = TrainConfig(optimizer=SophiaHConfig(rho=0.3), trainer=TrainerConfig(microbatch_size=None, seed=3))
    records = [
        make_record(config),
        make_record(loss=None, bits_per_byte=None, seconds=[0.1, 0.25], win_rate=[[1, None]]),
    ]
    write_records(tmp_path / "study.json", "näme", records)
    assert read_records(tmp_path / "study.json") == records
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]
    write_records(tmp_path / "study.json", "none", [])
    assert read_records(tmp_path / "study.json") == []


def test_no_file_is_no_records(tmp_path):
    assert read_records(tmp_path / "study.json") == []


def test_a_writer_that_dies_leaves_the_old_file(make_record, tmp_path, monkeypatch):
    file = tmp_path / "study.json"
    write_records(file, "study", [make_record()])

    def die(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_records(file, "study", [make_record(), make_record()])
    assert len(read_records(file)) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"format": 1, "runs": [', "[]", "5", '{"runs": []}', '{"format": 1}', '{"format": 1, "runs": [5]}',
     '{"format": 1, "runs": [{"loss": 2.0}]}', '{"format": 1, "runs": [{"other": 2.0}]}', "\x00", "\xff\xfe\x80"],
)  # fmt: skip
def test_a_damaged_file_is_one_line(text, tmp_path):
    file = tmp_path / "study.json"
    file.write_bytes(text.encode("latin1"))
    with pytest.raises(InputError) as caught:
        read_records(file)
    message = str(caught.value)
    assert message.startswith(f"{file} is not a valid study record: ") and "\n" not in message
    assert message.endswith("; move it elsewhere to start over")


def test_a_run_without_a_configuration_is_one_line(make_record, tmp_path):
    file = tmp_path / "study.json"
    write_records(file, "study", [dataclasses.replace(make_record(), config=3)])
    with pytest.raises(
        InputError, match=r"is not a valid study record: a run's config is not a mapping; move it elsewhere"
    ):
        read_records(file)


def test_a_file_of_another_format_is_not_read(tmp_path):
    (tmp_path / "study.json").write_text('{"format": 2, "runs": []}')
    with pytest.raises(InputError, match="has format 2, but this version reads format 1"):
        read_records(tmp_path / "study.json")


def test_where_files_lie_and_what_is_said_make_no_other_run(make_record):
    record = make_record(TrainConfig())
    data = DataConfig(train="a.txt", validation="b.txt", cache_dir="c")
    trainer = TrainerConfig(
        run_dir="d", checkpoint_every=7, keep_checkpoints=5, log_every=3, sample_tokens=9, evaluate_every=11
    )
    assert find([record], TrainConfig(data=data, trainer=trainer)) is record
    other = TrainConfig(
        plugins=("mine",),
        data=DataConfig(on_leak="error"),
        mesh=MeshConfig(start_timeout=9, heartbeat_timeout=9),
    )
    assert find([record], other) is record
    older = dataclasses.replace(record, config=record.config | {"mesh.start_timeout": 300})
    assert find([older], other) is older


@pytest.mark.parametrize(
    "other",
    [
        TrainConfig(optimizer=SophiaGConfig(rho=0.06)),
        TrainConfig(optimizer=AdamWConfig()),
        TrainConfig(trainer=TrainerConfig(seed=1)),
        TrainConfig(trainer=TrainerConfig(num_train_steps=100_001)),
        TrainConfig(trainer=TrainerConfig(evaluation_windows=None)),
        TrainConfig(data=DataConfig(validation_fraction=0.1)),
    ],
)
def test_what_changes_the_numbers_makes_another_run(other, make_record):
    records = [make_record(TrainConfig()), make_record(other)]
    assert find(records, other) is records[1]
    assert find(records[:1], other) is None


def without(record, name):
    return dataclasses.replace(record, config={k: v for k, v in record.config.items() if k != name})


def test_a_field_that_an_older_version_did_not_have_is_at_its_default(make_record):
    """Each optimizer has defaults of its own."""
    for optimizer, other in [(SophiaGConfig(), SophiaGConfig(rho=0.3)), (SophiaHConfig(), SophiaHConfig(rho=0.3))]:
        older = without(make_record(TrainConfig(optimizer=optimizer)), "optimizer.rho")
        assert find([older], TrainConfig(optimizer=optimizer)) is older
        assert find([older], TrainConfig(optimizer=other)) is None
    older = without(make_record(TrainConfig()), "model.dropout")
    assert find([older], TrainConfig()) is older


@pytest.mark.parametrize("value", [0.5, None])
@pytest.mark.parametrize("name", ["optimizer.of_tomorrow", "section_of_tomorrow.field", "model.dropout.inner"])
def test_a_record_of_a_later_version_is_of_no_configuration(name, value, make_record, tmp_path):
    config = TrainConfig()
    later = make_record(config, config=flat_config(config) | {name: value})
    write_records(tmp_path / "study.json", "study", [later, make_record(config)])
    records = read_records(tmp_path / "study.json")
    assert find(records, config) is records[1]
    assert find(records[:1], config) is None


def test_the_configuration_of_a_record(make_record):
    config = TrainConfig(
        optimizer=SophiaHConfig(rho=0.3, curvature_microbatch_size=4, target_win_rate=None),
        trainer=TrainerConfig(batch_size=16, max_grad_norm=None),
        data=DataConfig(tokenizer="gpt2"),
    )
    record = make_record(config)
    assert config_of(record) == config
    assert find([record], config_of(record)) is record


def test_the_file_is_a_line_a_run(make_record, tmp_path):
    """So that one run can be taken out by an editor, and a diff shows what came."""
    write_records(tmp_path / "study.json", "study", [make_record(), make_record()])
    lines = (tmp_path / "study.json").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[1].rstrip(",")) == json.loads(lines[2])


def test_a_record_under_a_former_name(make_record):
    """Of before `optimizer.warmup_steps` was called `optimizer.warmup`, and rates were fractions of the peak."""
    config = TrainConfig(
        optimizer=AdamWConfig(warmup=7, final_learning_rate=1e-5), trainer=TrainerConfig(num_train_steps=70)
    )
    record = make_record(config)
    former = {name: value for name, value in record.config.items() if name != "optimizer.final_fraction"}
    former["optimizer.warmup_steps"] = former.pop("optimizer.warmup")
    record = dataclasses.replace(record, config=former)
    assert find([record], config) is record
    assert config_of(record).optimizer == config.optimizer


def test_named_validation_sets_and_tasks_make_no_other_run(make_record):
    config = TrainConfig()
    tasks = (TaskConfig(task="piqa", file="piqa.jsonl"),)
    named = TrainConfig(
        data=DataConfig(validation={"books": "books.txt"}),
        trainer=TrainerConfig(best_by="books", tasks=tasks, tasks_every=7),
    )
    assert flat_config(named) == flat_config(config)
    record = make_record(named)
    assert find([record], config) is record and config_of(record) == config
