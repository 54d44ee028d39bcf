"""How a command line and configuration files become a TrainConfig. Imports nothing heavy, to answer at once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sophia_levanter.config.arguments import parse_arguments
from sophia_levanter.config.build import build, encode
from sophia_levanter.config.files import Layer, Setting, dump_yaml, flatten, read_layers
from sophia_levanter.config.help import help_text
from sophia_levanter.config.registries import with_plugins
from sophia_levanter.config.run import TrainConfig
from sophia_levanter.errors import InputError

OPTIONS = ("--config", "--resume")
FLAGS = ("--print_config", "--quiet", "--help")


@dataclass(frozen=True)
class Command:
    """What a command line asks for.

    Attributes:
        config: the resolved configuration; None only where `help` is given.
        config_name: the config file's name without its suffix; the run directory's name under `--resume DIR`.
        resume: a run directory to go on with; "auto" to go on with `config.trainer.run_dir` if it holds a run.
        print_config: whether to print the configuration in place of training.
        quiet: whether to print only warnings and the result.
        help: the text to print in place of anything else.
    """

    config: TrainConfig | None = None
    config_name: str = ""
    resume: Path | Literal["auto"] | None = None
    print_config: bool = False
    quiet: bool = False
    help: str | None = None


def parse_command_line(argv: Sequence[str]) -> Command:
    """Reads the command line that `--help` shows.

    A value follows its option as the next word or after `=`; of several values for one field the last counts.
    `--resume DIR` reads DIR/config.yaml in place of `--config`.

    Raises:
        InputError: if an argument, a file or a value is not what it must be.
    """
    if "--help" in argv or "-h" in argv:
        words = [part for word in argv for part in word.split("=", 1)]
        named = [after for word, after in itertools.pairwise(words) if word == "--plugins"]
        with_plugins([{"plugins": Setting(name)} for name in named])
        return Command(help=help_text())
    given = parse_arguments(argv, options=OPTIONS, flags=FLAGS, overrides=True)
    print_config, quiet = "--print_config" in given.flags, "--quiet" in given.flags
    resume = given.options.get("--resume")
    if resume is None or resume == "auto":
        hint = "config/gpt2_nano_sophia.yaml is a small one to start with"
        path = Path(given.needed("--config", "FILE", hint))
        config = load_config(path, given.overrides)
        return Command(config, path.stem, "auto" if resume else None, print_config, quiet)
    if "--config" in given.options:
        own = given.options["--config"]
        raise InputError(f"--config {own} does not go with --resume {resume}, which has its own config")
    if any(name == "trainer.run_dir" for name, _ in given.overrides):
        raise InputError(f"--trainer.run_dir does not go with --resume {resume}, which is the run directory")
    run_dir = existing_run(Path(resume))
    config = load_config(run_dir / "config.yaml", given.overrides)
    return Command(config, run_dir.resolve().name, run_dir, print_config, quiet)


def load_config(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> TrainConfig:
    """Reads a configuration file with the files under its `defaults:`, and puts `overrides` on top.

    Of files and overrides that set the same field, the last counts. One that sets `optimizer.type` to another type than
    those before it keeps the fields of every optimizer (`OptimizerConfig`: the learning rate, its schedule, weight
    decay) and drops those of the former type (b1, rho, ...).

    Args:
        path: a YAML file.
        overrides: dotted field paths and values as typed: `("optimizer.rho", "0.03")`. Values for string fields are
            taken as they are; `null` and `none` give None where the field may be None.

    Raises:
        InputError: if a file is missing or not YAML, a key is unknown, or a value is of the wrong type or out of range.
    """
    return build_config(read_layers(path), {key: Setting(value) for key, value in overrides})


def build_config(files: Sequence[Layer], overrides: Layer | None = None) -> TrainConfig:
    """The configuration that the settings of files give, later ones on top of earlier ones, with overrides over all.

    Raises:
        InputError: if a key is unknown, or a value is of the wrong type or out of range.
    """
    return build(TrainConfig, with_plugins([*files, overrides or {}]))


def config_in(tree: Mapping[str, Any], source: Path) -> TrainConfig:
    """The configuration that `encode` made a tree of.

    Args:
        tree: sections with their fields.
        source: where it comes from, for messages.

    Raises:
        InputError: if a key is unknown, or a value is of the wrong type or out of range.
    """
    return build_config([flatten(tree, source)])


def dump_config(config: TrainConfig) -> str:
    """YAML that `load_config` reads back to an equal config."""
    return dump_yaml(encode(config))


def existing_run(run_dir: Path) -> Path:
    if not run_dir.is_dir():
        raise InputError(f"--resume {run_dir}: the directory does not exist")
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise InputError(f"--resume {run_dir}: holds no config.yaml; a run directory does")
    if not config.stat().st_size:
        raise InputError(f"--resume {run_dir}: its config.yaml is empty; put the run's configuration there")
    return run_dir
