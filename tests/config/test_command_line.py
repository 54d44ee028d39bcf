"""Overrides on top of files, and the command line."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import TYPES, load_error, one_line

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig, LionConfig
from sophia_levanter.config.command_line import dump_config, load_config, parse_command_line
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.model import ModelConfig
from sophia_levanter.config.optimizer import OptimizerConfig, SophiaHConfig
from sophia_levanter.config.schedule import LinearSchedule
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError


def parse_error(*argv) -> str:
    with pytest.raises(InputError) as error:
        parse_command_line([str(arg) for arg in argv])
    return one_line(error)


# --- overrides


@pytest.mark.parametrize(
    ("argv", "section", "name", "value"),
    [
        (["--optimizer.rho", "0.03"], "optimizer", "rho", 0.03),
        (["--optimizer.rho", "3"], "optimizer", "rho", 3.0),
        (["--optimizer.rho", "auto"], "optimizer", "rho", "auto"),
        (["--optimizer.rho", "1", "--optimizer.rho=2"], "optimizer", "rho", 2.0),
        (["--trainer.seed", "+7"], "trainer", "seed", 7),
        (["--model.use_bias", "true"], "model", "use_bias", True),
        (["--trainer.microbatch_size", "none"], "trainer", "microbatch_size", None),
        (["--trainer.max_grad_norm", "null"], "trainer", "max_grad_norm", None),
        (["--data.train", "null"], "data", "train", "null"),
        (["--data.train", "-x.txt"], "data", "train", "-x.txt"),
        (["--data.train=--x=y"], "data", "train", "--x=y"),
        (["--data.validation", "null"], "data", "validation", None),
        (["--data.validation", "None"], "data", "validation", None),
        (["--data.validation", "12"], "data", "validation", "12"),
    ],
)
def test_override(write, argv, section, name, value):
    path = write("optimizer: {rho: 0.5}\ntrainer: {microbatch_size: 48}\ndata: {validation: v.txt}\n")
    config = parse_command_line([*argv, "--config", str(path)]).config
    found = getattr(getattr(config, section), name)
    assert found == value
    assert type(found) is type(value)


def test_negative_numbers_are_values(write):
    error = parse_error("--config", write(""), "--optimizer.rho", "-1e-3")
    assert error == "optimizer.rho is -0.001; it must be above 0"


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("trainer.num_train_steps", "abc", "trainer.num_train_steps is 'abc'; it must be an integer"),
        ("trainer.num_train_steps", "", "trainer.num_train_steps is ''; it must be an integer"),
        ("trainer.num_train_steps", "none", "trainer.num_train_steps is 'none'; it must be an integer"),
        ("trainer.microbatch_size", "", "trainer.microbatch_size is ''; it must be an integer or null"),
        ("optimizer.rho", "nan", "optimizer.rho is 'nan'; it must be a finite number or auto"),
        ("optimizer.rho", "[1, 2]", "optimizer.rho is a list; it must be a finite number or auto"),
        ("optimizer.type", "sgd", f"optimizer.type is 'sgd'; {TYPES}"),
        ("optimizer.lr", "1", "unknown option '--optimizer.lr'; did you mean --optimizer.learning_rate?"),
        ("optimiser.rho", "1", "unknown option '--optimiser.rho'; did you mean --optimizer.rho?"),
        ("trainer.seed.x", "1", "unknown option '--trainer.seed.x'; did you mean --trainer.seed?"),
    ],
)
def test_override_errors(write, key, value, problem):
    assert load_error(write(""), (key, value)) == problem


def test_another_optimizer_keeps_what_every_optimizer_has(write):
    text = "optimizer: {learning_rate: 5e-4, warmup: 7, schedule: linear, rho: 0.5, b1: 0.9, interval: 3}"
    path = write(text)
    assert load_config(path, [("optimizer.type", "adamw"), ("optimizer.b2", "0.98")]).optimizer == AdamWConfig(
        learning_rate=5e-4, warmup=7, schedule=LinearSchedule(), b2=0.98
    )
    # b1 and interval are the former optimizer's, even where the new one has fields of that name.
    assert load_config(path, [("optimizer.type", "sophia_h")]).optimizer == SophiaHConfig(
        learning_rate=5e-4, warmup=7, schedule=LinearSchedule()
    )


def test_order_of_overrides_does_not_matter_to_the_type(write):
    overrides = [("optimizer.b1", "0.7"), ("optimizer.type", "adamw")]
    assert load_config(write("optimizer: {type: lion, b1: 0.8}"), overrides).optimizer.b1 == 0.7


def test_a_misspelt_key_is_found_although_the_optimizer_is_replaced(write):
    path = write("optimizer: {type: sophia_g, roh: 0.5}")
    assert load_error(path, ("optimizer.type", "adamw")).startswith(f"{path}: unknown key 'optimizer.roh'")


# --- the command line


def test_command_of_a_config(write):
    command = parse_command_line(["--config", str(write("trainer: {seed: 3}", "gpt2_nano.yaml"))])
    assert command.config == TrainConfig(trainer=TrainerConfig(seed=3))
    assert (command.config_name, command.resume, command.print_config, command.help) == ("gpt2_nano", None, False, None)


def test_resume_auto_needs_a_config(write):
    command = parse_command_line(["--resume", "auto", "--config", str(write(""))])
    assert (command.resume, command.config, command.config_name) == ("auto", TrainConfig(), "run")
    assert parse_error("--resume", "auto").startswith("--config FILE is missing")


def test_resume_reads_the_run_directory(write):
    config = TrainConfig(trainer=TrainerConfig(seed=3), optimizer=LionConfig())
    run_dir = write(dump_config(config), "runs/nano/config.yaml").parent
    command = parse_command_line(["--resume", str(run_dir), "--trainer.num_train_steps", "2500"])
    assert command.config == TrainConfig(trainer=TrainerConfig(seed=3, num_train_steps=2500), optimizer=LionConfig())
    assert (command.resume, command.config_name) == (Path(run_dir), "nano")
    assert "cannot be combined with" in parse_error("--resume", run_dir, "--config", run_dir / "config.yaml")


def test_resume_errors(tmp_path):
    assert parse_error("--resume", tmp_path / "no") == f"--resume {tmp_path}/no: the directory does not exist"
    assert parse_error("--resume", tmp_path) == f"--resume {tmp_path}: config.yaml not found; specify a run directory"
    (tmp_path / "config.yaml").touch()
    assert ": config.yaml is empty; restore the run's configuration" in parse_error("--resume", tmp_path)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "--config FILE is missing"),
        (["run.yaml"], "unexpected argument 'run.yaml'"),
        (["--data.train", "a.txt", "b.txt"], "unexpected argument 'b.txt'; use --SECTION.FIELD VALUE, and quote"),
        (["--"], "unexpected argument '--'"),
        (["--print-config"], "unknown option '--print-config'; did you mean --print_config?"),
        (["--seq_len", "8"], "unknown option '--seq_len'; did you mean --model.seq_len?"),
        (["--optimizer", "lion"], "unknown option '--optimizer'; optimizer is a section; its fields are type, "),
    ],
)
def test_command_line_errors(argv, problem):
    assert parse_error(*argv).startswith(problem)


def test_help_names_every_field_with_its_default_and_comment():
    command = parse_command_line(["--no.such", "--help"])
    assert command.config is None
    lines = [" ".join(line.split()) for line in command.help.splitlines()]
    assert lines[0].startswith("usage: python -m sophia_levanter.main --config FILE")
    assert "--trainer.microbatch_size INT|null (null) sequences per microbatch in gradient accumulation; " in " ".join(
        lines
    )
    assert "--optimizer.interval INT (10) steps between curvature refreshes" in lines
    assert "--model.use_bias true|false (false) use biases in linear layers and layer norms" in lines
    fields = [line for line in lines if line.startswith("--") and "." in line.split()[0] and "FIELD" not in line]
    assert all(line.partition(") ")[2] for line in fields), "a field has no comment"
    for section, cls in {"data": DataConfig, "trainer": TrainerConfig}.items():
        for name in (field.name for field in dataclasses.fields(cls)):
            assert sum(line.startswith(f"--{section}.{name} ") for line in fields) == 1
    for section, registry in (("model", ModelConfig), ("optimizer", OptimizerConfig)):
        for kind, cls in registry.get_known_choices().items():
            start = next(
                i for i, line in enumerate(lines) if line.startswith(f"{section}, with --{section}.type {kind}")
            )
            names = [field.name for field in dataclasses.fields(cls) if field.name != "schedule"]
            found = [line.split()[0] for line in lines[start + 1 : start + 1 + len(names)]]
            assert found == [f"--{section}.{name}" for name in names]


def test_nothing_heavy_is_imported(write):
    script = """
import sys
from sophia_levanter.config.command_line import dump_config, parse_command_line
from sophia_levanter.errors import InputError
assert parse_command_line(["--help"]).help
assert dump_config(parse_command_line(["--config", sys.argv[1], "--print_config"]).config)
try:
    parse_command_line(["--config", sys.argv[1], "--model.num_heads", "7"])
except InputError:
    pass
print(*sorted({"jax", "jaxlib", "numpy", "haliax", "equinox", "tensorstore"} & set(sys.modules)))
"""
    # The type is registered too, although nothing imports its class by name.
    path = write("model: {num_layers: 2}\noptimizer: {type: ademamix}")
    command = [sys.executable, "-c", script, str(path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ""


def test_resume_is_the_run_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--trainer\.run_dir cannot be combined with --resume"):
        parse_command_line(["--resume", str(tmp_path), "--trainer.run_dir", "other"])
