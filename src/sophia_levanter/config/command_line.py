"""Parse a training command line into a TrainConfig, and format its help text, without slow imports."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sophia_levanter.config.arguments import parse_arguments
from sophia_levanter.config.build import build, encode, schema
from sophia_levanter.config.files import Layer, Setting, dump_yaml, read_layers, show_value
from sophia_levanter.config.registries import with_plugins
from sophia_levanter.config.run import TrainConfig
from sophia_levanter.config.settings import declaration, kinds_of, words_of
from sophia_levanter.errors import InputError

USAGE = """\
usage: python -m sophia_levanter.main --config FILE [--SECTION.FIELD VALUE ...] [--plugins MODULE]
       [--resume DIR|auto] [--print_config] [--quiet] [--help]

Train a language model.

  --config FILE          YAML file that sets any of the fields below; `defaults: [FILE, ...]` in it includes other files
  --SECTION.FIELD VALUE  override a field in the file; quote globs to prevent shell expansion
  --plugins MODULE       import a module that registers your own optimizers, models, schedules, ...
  --resume DIR           resume the run in DIR; --config is not required
  --resume auto          resume the run in trainer.run_dir if it exists; otherwise start a new run
  --print_config         print the resolved configuration and exit
  --quiet                print only warnings, the final result and the checkpoint path
  --help                 show this help message and exit"""

TYPE_NAMES = {"str": "TEXT", "int": "INT", "float": "NUMBER", "bool": "true|false"}
HELP_COLUMN = 60


def help_text() -> str:
    """Return the usage, followed by the type, default and help text of each field, grouped by section."""
    found, parts = schema(TrainConfig), [USAGE]
    for path, cls in found.sections.items():
        if path and path not in found.choices:
            parts.append(_section_help(path, path, cls))
        elif path:
            for name, choice in found.choices[path].get_known_choices().items():
                default = " (the default)" if choice is cls else ""
                parts.append(_section_help(f"{path}, with --{path}.type {name}{default}", path, choice))
    return "\n\n".join(parts)


def _section_help(title: str, section: str, cls: type) -> str:
    # By default, the docstring of a dataclass is its signature.
    doc = cls.__doc__ or ""
    summary = cls.__name__ if not doc or doc.startswith(f"{cls.__name__}(") else doc.splitlines()[0]
    lines = [f"{title}: {summary}"]
    for setting, annotation in fields_of(cls):
        left = f"  --{section}.{setting.name} {_type_name(annotation)} ({show_value(setting.default)})"
        lines.append(f"{left:<{HELP_COLUMN}}  {declaration(setting).described}")
    return "\n".join(lines)


def fields_of(cls: type) -> list[tuple[dataclasses.Field, object]]:
    """Return the fields of a section and their types, excluding subsections."""
    hints = typing.get_type_hints(cls)
    fields = [(found, hints[found.name]) for found in dataclasses.fields(cls)]
    return [(found, annotation) for found, annotation in fields if not dataclasses.is_dataclass(annotation)]


def _type_name(annotation: object) -> str:
    scalars = [kind for kind in kinds_of(annotation) if typing.get_origin(kind) is None]
    return "|".join([*(TYPE_NAMES.get(kind.__name__, "null") for kind in scalars), *words_of(annotation)]) or "LIST"


OPTIONS = ("--config", "--resume")
FLAGS = ("--print_config", "--quiet", "--help")


@dataclass(frozen=True)
class Command:
    """The parsed command line.

    Attributes:
        config: the resolved configuration; None only if `help` is set.
        config_name: the config file's name without its suffix; with `--resume DIR`, the run directory's name.
        resume: the run directory to resume; "auto" to resume the run in `config.trainer.run_dir` if it exists.
        print_config: whether to print the configuration instead of training.
        quiet: whether to print only warnings and the result.
        help: the help text to print instead of training.
    """

    config: TrainConfig | None = None
    config_name: str = ""
    resume: Path | Literal["auto"] | None = None
    print_config: bool = False
    quiet: bool = False
    help: str | None = None


def parse_command_line(argv: Sequence[str]) -> Command:
    """Parse the command line described in `--help`.

    The value of an option is the next word or follows `=`. If a field is given more than once, the last value takes
    effect. With `--resume DIR`, the configuration is read from DIR/config.yaml instead of a `--config` file.

    Raises:
        InputError: if an argument, a file or a value is invalid.
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
        hint = "for example, --config config/gpt2_nano_sophia.yaml"
        path = Path(given.needed("--config", "FILE", hint))
        config = load_config(path, given.overrides)
        return Command(config, path.stem, "auto" if resume else None, print_config, quiet)
    if "--config" in given.options:
        own = given.options["--config"]
        raise InputError(
            f"--config {own} cannot be combined with --resume {resume}; the run directory has its own config"
        )
    if any(name == "trainer.run_dir" for name, _ in given.overrides):
        raise InputError(f"--trainer.run_dir cannot be combined with --resume {resume}, which already specifies it")
    run_dir = existing_run(Path(resume))
    config = load_config(run_dir / "config.yaml", given.overrides)
    return Command(config, run_dir.resolve().name, run_dir, print_config, quiet)


def load_config(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> TrainConfig:
    """Read a configuration file and the files listed under its `defaults:`, then apply `overrides`.

    If a field is set more than once, the last value takes effect. Changing `optimizer.type` keeps the fields shared by
    all optimizers (`OptimizerConfig`: the learning rate, its schedule, weight decay) and drops those specific to the
    previous type (b1, rho, ...).

    Args:
        path: a YAML file.
        overrides: dotted field paths and values as typed, such as `("optimizer.rho", "0.03")`. Values of string fields
            are taken literally, but `null` and `none` mean None if the field may be None.

    Raises:
        InputError: if a file is missing or not YAML, a key is unknown, or a value has the wrong type or is out of
            range.
    """
    return build_config(read_layers(path), {key: Setting(value) for key, value in overrides})


def build_config(files: Sequence[Layer], overrides: Layer | None = None) -> TrainConfig:
    """Build a configuration from the settings in files. Later files override earlier ones; `overrides` override all.

    Raises:
        InputError: if a key is unknown, or a value has the wrong type or is out of range.
    """
    return build(TrainConfig, with_plugins([*files, overrides or {}]))


def dump_config(config: TrainConfig) -> str:
    """Format a configuration as YAML. Reading it with `load_config` returns an equal configuration."""
    return dump_yaml(encode(config))


def existing_run(run_dir: Path) -> Path:
    if not run_dir.is_dir():
        raise InputError(f"--resume {run_dir}: the directory does not exist")
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise InputError(f"--resume {run_dir}: config.yaml not found; specify a run directory")
    if not config.stat().st_size:
        raise InputError(f"--resume {run_dir}: config.yaml is empty; restore the run's configuration")
    return run_dir
