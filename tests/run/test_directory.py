"""Which directory a run uses, and what the configuration saved there says."""

import dataclasses
from pathlib import Path

import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdEMAMixConfig
from sophia_levanter.config.command_line import Command
from sophia_levanter.config.optimizer import SophiaGConfig
from sophia_levanter.config.settings import DECLARATION
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError
from sophia_levanter.run.directory import RunDirectory, changed_fields, choose_run_directory
from sophia_levanter.training.checkpoints import is_of_training


def config(run_dir: Path | None = None, **data: str) -> TrainConfig:
    default = TrainConfig()
    return dataclasses.replace(
        default,
        data=dataclasses.replace(default.data, **data),
        trainer=dataclasses.replace(default.trainer, run_dir=None if run_dir is None else str(run_dir)),
    )


def test_a_run_without_a_directory_gets_one_by_name_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, resolved = choose_run_directory(Command(config(), "gpt2_tiny"))
    assert run.path.parent == tmp_path / "runs"
    assert run.path.name.startswith("gpt2_tiny-2")
    assert resolved.trainer.run_dir == str(run.path)
    assert run.resume == "never"
    assert not run.path.exists()


def test_paths_hold_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, resolved = choose_run_directory(Command(config(Path("out"), train="a/*.txt", validation="~/b.txt"), "x"))
    assert resolved.data.train == str(tmp_path / "a" / "*.txt")
    assert resolved.data.validation == str(Path.home() / "b.txt")
    assert resolved.trainer.run_dir == str(tmp_path / "out")
    _, resolved = choose_run_directory(Command(config(), "x"))
    assert resolved.data.train == "python_stdlib"


def test_a_directory_with_files_is_not_used(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="already contains files"):
        choose_run_directory(Command(config(tmp_path), "x"))
    with pytest.raises(InputError, match="contains files but no run"):
        choose_run_directory(Command(config(tmp_path), "x", "auto"))
    with pytest.raises(InputError, match="is a file"):
        choose_run_directory(Command(config(tmp_path / "notes"), "x"))


def test_auto_goes_on_with_its_own_run_only(tmp_path):
    run, resolved = choose_run_directory(Command(config(tmp_path / "run"), "x", "auto"))
    assert run.resume == "never"
    run.lock()
    run.write_config(resolved)
    again, _ = choose_run_directory(Command(config(tmp_path / "run"), "x", "auto"))
    assert again == RunDirectory(tmp_path / "run", "if_saved")
    with pytest.raises(InputError, match=r"its data\.tokenizer is 'bytes', not 'gpt2'"):
        choose_run_directory(Command(config(tmp_path / "run", tokenizer="gpt2"), "x", "auto"))


def test_auto_takes_a_slow_warmup_in_steps_that_keeps_the_schedule(tmp_path):
    """As the message about a changed schedule advises; another one would be another run."""

    def command(steps, slow_warmup):
        trainer = TrainerConfig(num_train_steps=steps, run_dir=str(tmp_path / "run"))
        config = TrainConfig(optimizer=AdEMAMixConfig(slow_warmup=slow_warmup), trainer=trainer)
        return Command(config, "x", "auto")

    run, resolved = choose_run_directory(command(1000, None))
    run.path.mkdir()
    run.write_config(resolved)
    for same in (None, 1000, 0.5):
        assert choose_run_directory(command(2000, same))[0].resume == "if_saved"
    with pytest.raises(InputError) as raised:
        choose_run_directory(command(2000, 500))
    assert str(raised.value) == (
        f"trainer.run_dir {run.path} contains another run: its optimizer.slow_warmup is None, not 500; "
        f"choose another --trainer.run_dir, or continue that run with main --resume {run.path}"
    )


def test_steps_and_fractions_that_mean_the_same_have_not_changed():
    intervals = [field.name for field in dataclasses.fields(TrainerConfig) if field.metadata[DECLARATION].steps]
    assert len(intervals) == 6

    def config(steps, **optimizer):
        return TrainConfig(
            trainer=TrainerConfig(num_train_steps=1000, **dict.fromkeys(intervals, steps)),
            optimizer=SophiaGConfig(learning_rate=2e-3, **optimizer),
        )

    fractions = config(0.25, warmup=0.1, final_fraction=0.05)
    assert changed_fields(config(250, warmup=100, final_learning_rate=1e-4), fractions) == []
    longer = dataclasses.replace(fractions, trainer=dataclasses.replace(fractions.trainer, num_train_steps=2000))
    assert changed_fields(fractions, longer) == [("trainer.num_train_steps", 1000, 2000)]
    assert changed_fields(config(250, warmup=90, final_learning_rate=1e-4), fractions)[0] == (
        "optimizer.warmup",
        90,
        0.1,
    )


def test_the_id_of_a_run(tmp_path):
    run = RunDirectory(tmp_path, "never")
    assert run.run_id is None
    run.write_run_id("abc")
    assert run.run_id == "abc"
    # Another host's run directory may have the id of an attempt that saved nothing.
    elsewhere = RunDirectory(tmp_path / "host", "never", checkpoint_dir="gs://bucket/run")
    elsewhere.write_run_id("abc")
    assert elsewhere.run_id is None


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"config": 3},
        {"config": {"trainer": 1}},
        {"data": []},
        {"validation": {}},
        {"environment": ""},
    ],
    ids=str,
)
def test_metadata_of_another_program(change):
    metadata = {"config": {"model": {}}, "data": {}, "validation": {"tokenizer": "x"}, "environment": {}}
    assert is_of_training(metadata) and not is_of_training(metadata | change) and not is_of_training({})
