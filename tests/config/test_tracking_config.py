"""The section `tracking`: its values, the packages it needs, and that it makes no other run."""

import dataclasses
from importlib.machinery import ModuleSpec

import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config import run as run_config
from sophia_levanter.config.run import TrackingConfig, check_installed
from sophia_levanter.errors import InputError
from sophia_levanter.main import main
from sophia_levanter.run.directory import check_same_run
from sophia_levanter.studies.records import flat_config

OTHER = TrackingConfig("offline", "project", "entity", "name", "group", True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wandb": "on"}, "tracking.wandb is 'on'; it must be one of online, offline, or null"),
        ({"wandb_name": " "}, "tracking.wandb_name is ' '; it must be 1 to 128 characters long"),
        ({"wandb_group": "x" * 129}, f"tracking.wandb_group is '{'x' * 129}'; it must be 1 to 128 characters long"),
        ({"wandb_project": "a/b"}, "tracking.wandb_project is 'a/b'; a project name cannot contain '/'"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(InputError) as error:
        TrackingConfig(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("spec", "option", "message"),
    [
        (
            None,
            ("--tracking.wandb", "online"),
            "tracking.wandb is 'online', but wandb is not installed; run pip install 'sophia-levanter[wandb]'",
        ),
        (
            ModuleSpec("a folder", None),
            ("--tracking.tensorboard", "true"),
            "tracking.tensorboard is true, but tensorboardX is not installed; "
            "run pip install 'sophia-levanter[tensorboard]'",
        ),
    ],
)
def test_a_package_that_is_not_there(spec, option, message, monkeypatch, config_file, tmp_path, capsys):
    monkeypatch.setattr(run_config, "find_spec", lambda name: spec)
    run_dir = tmp_path / "run"
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir), *option]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not run_dir.exists()


def test_what_is_installed_or_not_asked_for_is_no_error(monkeypatch):
    check_installed(OTHER)
    monkeypatch.setattr(run_config, "find_spec", lambda name: None)
    check_installed(TrackingConfig())


def test_it_makes_no_other_run():
    config = TrainConfig()
    other = dataclasses.replace(config, tracking=OTHER)
    assert all(before != after for before, after in zip(*map(_values, (config, other)), strict=True))
    check_same_run("run_dir", "/runs/a", config, other)
    assert flat_config(config) == flat_config(other)


def _values(config: TrainConfig) -> list:
    return [getattr(config.tracking, field.name) for field in dataclasses.fields(TrackingConfig)]
