"""Configuration files that are made to hang, to fill the memory or to mean something else."""

import json
from pathlib import Path

import pytest
from refusals import load_error

from sophia_levanter.config.command_line import dump_config, load_config
from sophia_levanter.main import main


def test_files_that_name_each_other_many_times(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.yaml").write_text(f"defaults: [{', '.join([f'{number + 1}.yaml'] * 10)}]")
    (tmp_path / "8.yaml").write_text("trainer: {seed: 1}")
    assert load_error(tmp_path / "0.yaml") == (
        f"{tmp_path}/0.yaml: defaults include more than 100 files; list each file once"
    )
    assert load_config(tmp_path / "7.yaml").trainer.seed == 1


def test_a_file_that_names_itself_by_another_name(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("defaults: [link.yaml]")
    (tmp_path / "link.yaml").symlink_to("run.yaml")
    assert "defaults form a cycle" in load_error(tmp_path / "run.yaml")


@pytest.mark.parametrize("character", ["\\0", "\\ud800", "\\udbff\\udc00", "\\udc7f"])
def test_characters_that_no_text_holds(character: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f'\ndata: {{cache_dir: "a{character}"}}')
    assert "run.yaml is not valid YAML at line 2: the character '\\" in load_error(tmp_path / "run.yaml")


@pytest.mark.parametrize(("name", "value"), [("data.cache_dir", "a\udcffb"), ("trainer.checkpoint_dir", "a\0b")])
def test_folders_that_tensorstore_cannot_name(
    name: str, value: str, config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config_file), f"--{name}", value, "--trainer.run_dir", str(tmp_path / "run")]) == 2
    error = f"error: {name} is {value!a}; it must be a valid UTF-8 path without NUL characters\n"
    assert capfd.readouterr().err == error and not (tmp_path / "run").exists()


def test_a_source_whose_name_is_not_utf8_goes_into_the_run_s_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps({"data": {"train": "a\udcff.txt"}}))
    config = load_config(tmp_path / "run.yaml")
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "YAML"),
        ("{a: " * 5_000, "YAML"),
        ("trainer:\n\tseed: 1", "line 2: "),
        (f"trainer: {{seed: {'9' * 400}}}", "trainer.seed is 999"),
        ("trainer: {seed: !!int 3}", "the tag tag:yaml.org,2002:int is not allowed"),
        ("trainer: {keep_best: on}", "trainer.keep_best is 'on'; it must be true or false"),
        ("trainer: {seed: 0x10}", "trainer.seed is '0x10'; it must be an integer"),
        ("trainer: {seed: 1_000}", "trainer.seed is '1_000'; it must be an integer"),
        ("optimizer: {rho: '1e-3'}", "optimizer.rho is '1e-3'; it must be a finite number or auto"),
    ],
)
def test_yaml_that_surprises(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    message = load_error(tmp_path / "run.yaml")
    assert says in message and len(message) < 1000


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.001", ".001", "+1e-3"])
def test_numbers_of_yaml_1_2(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"optimizer: {{rho: {text}}}")
    assert load_config(tmp_path / "run.yaml").optimizer.rho == 1e-3  # type: ignore[attr-defined]
    assert load_config(tmp_path / "run.yaml", [("optimizer.rho", text)]).optimizer.rho == 1e-3  # type: ignore[attr-defined]
