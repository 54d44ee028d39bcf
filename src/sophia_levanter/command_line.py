"""How a command line and configuration files become a TrainConfig. Imports nothing heavy, to answer at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

import draccus

from sophia_levanter.command_line_help import help_text
from sophia_levanter.config import TrainConfig, sections
from sophia_levanter.config_file import Layer, Setting, dump_yaml, flatten, parse_value, read_layers, show_value
from sophia_levanter.errors import InputError
from sophia_levanter.training.config import OptimizerConfig

OPTIMIZER_TYPE = "optimizer.type"
DEFAULT_OPTIMIZER = type(TrainConfig().optimizer)
FLAGS = ("--print_config", "--quiet", "--help")
OPTIONS = ("--config", "--resume", *FLAGS)
EXPECTED = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


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
    """Reads `--config FILE [--SECTION.FIELD VALUE ...] [--resume DIR|auto] [--print_config] [--quiet] [--help]`.

    A value follows its option as the next word or after `=`; of several values for one option the last counts.
    `--resume DIR` reads DIR/config.yaml in place of `--config`.

    Raises:
        InputError: if an argument, a file or a value is not what it must be.
    """
    if "--help" in argv or "-h" in argv:
        return Command(help=help_text())
    options, overrides, flags = _split(argv)
    print_config, quiet = "--print_config" in flags, "--quiet" in flags
    resume = options.get("--resume")
    if resume is None or resume == "auto":
        if "--config" not in options:
            raise InputError("--config FILE is missing; config/gpt2_nano_sophia.yaml is a small one to start with")
        path = Path(options["--config"])
        config = load_config(path, overrides)
        return Command(config, path.stem, "auto" if resume else None, print_config, quiet)
    if "--config" in options:
        raise InputError(f"--config {options['--config']} does not go with --resume {resume}, which has its own config")
    if any(name == "trainer.run_dir" for name, _ in overrides):
        raise InputError(f"--trainer.run_dir does not go with --resume {resume}, which is the run directory")
    run_dir = existing_run(Path(resume))
    return Command(
        load_config(run_dir / "config.yaml", overrides), run_dir.resolve().name, run_dir, print_config, quiet
    )


def load_config(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> TrainConfig:
    """Reads a configuration file with the files under its `defaults:`, and puts `overrides` on top.

    Of files and overrides that set the same field, the last counts. One that sets `optimizer.type` to another type than
    those before it keeps what every optimizer has (`OptimizerConfig`: the learning rate, its schedule, weight decay);
    the fields of the former type alone (b1, rho, ...) are dropped, and the new type's have their defaults.

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
    settings: Layer = {}
    for layer in files:
        settings = _put_on_top(settings, layer)
    settings.setdefault(OPTIMIZER_TYPE, Setting(OptimizerConfig.get_choice_name(DEFAULT_OPTIMIZER)))
    return _build(_put_on_top(settings, overrides or {}))


def config_in(tree: Mapping[str, Any], source: Path) -> TrainConfig:
    """The configuration that `draccus.encode` made a tree of.

    Args:
        tree: sections with their fields.
        source: where it comes from, for messages.

    Raises:
        InputError: if a key is unknown, or a value is of the wrong type or out of range.
    """
    return build_config([flatten(tree, source)])


def dump_config(config: TrainConfig) -> str:
    """YAML that `load_config` reads back to an equal config."""
    return dump_yaml(draccus.encode(config))


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, str]], set[str]]:
    """The options `--config` and `--resume`, the overrides, and the flags that are given."""
    options, overrides, flags = {}, [], set()
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise InputError(f"unexpected argument {word!r}; write --SECTION.FIELD VALUE, and quote a glob")
        name, equals, value = word.partition("=")
        if name in FLAGS:
            if equals:
                raise InputError(f"{name} takes no value, found {value!r}")
            flags.add(name)
            continue
        if "." not in name and name not in OPTIONS:
            raise _unknown_key(name.removeprefix("--"), Setting(value), DEFAULT_OPTIMIZER)
        if not equals:
            if not words or words[0].startswith("--"):
                raise InputError(f"{name} has no value; write {name} VALUE")
            value = words.pop(0)
        if name in OPTIONS:
            if not value:
                raise InputError(f"{name} has an empty value")
            options[name] = value
        else:
            overrides.append((name.removeprefix("--"), value))
    return options, overrides, flags


def existing_run(run_dir: Path) -> Path:
    if not run_dir.is_dir():
        raise InputError(f"--resume {run_dir}: there is no such directory")
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise InputError(f"--resume {run_dir}: holds no config.yaml; a run directory does")
    if not config.stat().st_size:
        raise InputError(f"--resume {run_dir}: its config.yaml is empty; put the run's configuration there")
    return run_dir


def _put_on_top(settings: Layer, layer: Layer) -> Layer:
    """The merged settings; fields of an optimizer that `layer` replaces with another type are dropped."""
    dropped: set[str] = set()
    types = OptimizerConfig.get_known_choices()
    if OPTIMIZER_TYPE in settings and OPTIMIZER_TYPE in layer:
        before, after = settings[OPTIMIZER_TYPE].value, layer[OPTIMIZER_TYPE].value
        if before != after and isinstance(before, str) and before in types:
            common = {field.name for field in dataclasses.fields(OptimizerConfig)}
            own = {field.name for field in dataclasses.fields(types[before])} - common
            dropped = {f"optimizer.{name}" for name in own}
    return {key: setting for key, setting in settings.items() if key not in dropped} | layer


def _build(settings: Layer) -> TrainConfig:
    optimizer = _optimizer_class(settings[OPTIMIZER_TYPE])
    fields = _field_types(optimizer)
    tree: dict[str, dict[str, Any]] = {"optimizer": {"type": settings[OPTIMIZER_TYPE].value}}
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        field = ".".join(key.split(".")[:2])
        if key in fields:
            tree.setdefault(section, {})[name] = convert_value(key, setting, fields[key])
        elif field in fields and setting.file is not None:
            convert_value(field, Setting({}, setting.file), fields[field])  # raises: the file has a mapping there
        elif key not in sections(optimizer):
            raise _unknown_key(key, setting, optimizer)
        elif setting.value is not None and setting.value != {}:
            raise InputError(f"{setting.prefix}{key} is {show_value(setting.value)}; it must be a section of fields")
    return _decode(tree)


def _optimizer_class(setting: Setting) -> type[OptimizerConfig]:
    types = OptimizerConfig.get_known_choices()
    if not isinstance(setting.value, str) or setting.value not in types:
        shown = show_value(setting.value)
        raise InputError(f"{setting.prefix}{OPTIMIZER_TYPE} is {shown}; it must be one of {', '.join(types)}")
    return types[setting.value]


def _field_types(optimizer: type[OptimizerConfig]) -> dict[str, Any]:
    """The type of every field, by dotted path."""
    types: dict[str, Any] = {OPTIMIZER_TYPE: str}
    for section, cls in sections(optimizer).items():
        hints = typing.get_type_hints(cls)
        types |= {f"{section}.{field.name}": hints[field.name] for field in dataclasses.fields(cls)}
    return types


def convert_value(key: str, setting: Setting, annotation: Any) -> Any:
    """The setting's value as the field's type, `annotation`: a scalar, one that may be None, or a list in its place."""
    kinds = typing.get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    parts = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple]
    scalars = [kind for kind in kinds if kind is not NoneType and typing.get_origin(kind) is None]
    value = setting.value
    if not scalars and setting.file is None and isinstance(value, str):
        value = parse_value(value)
    if parts and isinstance(value, list):
        return [_convert_part(f"{key}[{i}]", Setting(part, setting.file), parts[0]) for i, part in enumerate(value)]
    if not scalars:
        raise InputError(f"{setting.prefix}{key} is {show_value(value)}; it must be a list, such as [{{...}}, {{...}}]")
    kind = scalars[0]
    if setting.file is None and isinstance(value, str):
        if NoneType in kinds and value.lower() in ("null", "none"):
            return None
        if kind is not str and value.strip():
            value = parse_value(value)
    if value is None and NoneType in kinds:
        return None
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) is kind and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    expected = EXPECTED[kind] + (" or null" if NoneType in kinds else "")
    hint = "; quote it" if kind is str and not isinstance(value, dict | list | NoneType) else ""
    raise InputError(f"{setting.prefix}{key} is {show_value(value)}; it must be {expected}{hint}")


def _convert_part(key: str, setting: Setting, cls: type) -> dict[str, Any]:
    """An item of a list, a mapping, with its values as the types of the fields of `cls`."""
    if not isinstance(setting.value, dict):
        raise InputError(f"{setting.prefix}{key} is {show_value(setting.value)}; it must be a mapping of fields")
    hints = typing.get_type_hints(cls)
    needed = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    for name in [name for name in setting.value if name not in hints] + sorted(needed - set(setting.value)):
        problem = "missing" if name in needed else "unknown"
        raise InputError(f"{setting.prefix}{key}.{name} is {problem}; the fields are {', '.join(hints)}")
    values = {
        name: convert_value(f"{key}.{name}", Setting(value, setting.file), hints[name])
        for name, value in setting.value.items()
    }
    cls(**values)  # whose complaints draccus would take for a sign that another type is meant
    return values


def _decode(tree: Mapping[str, Any]) -> TrainConfig:
    try:
        return draccus.decode(TrainConfig, tree)
    except draccus.ParsingError as error:
        # draccus wraps what a section's __post_init__ raises.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__
        raise


def _unknown_key(key: str, setting: Setting, optimizer: type[OptimizerConfig]) -> InputError:
    what, dashes = ("unknown option", "--") if setting.file is None else ("unknown key", "")
    return InputError(f"{setting.prefix}{what} {dashes + key!r}; {_suggestion(key, optimizer, dashes)}")


def _suggestion(key: str, optimizer: type[OptimizerConfig], dashes: str) -> str:
    """What to write in place of the unknown `key`; option names start with `dashes`."""
    fields = list(_field_types(optimizer))
    section, _, name = key.rpartition(".")
    siblings = [field.rpartition(".")[2] for field in fields if field.startswith(f"{section or key}.")]
    if siblings and not section:
        return f"{key} is a section, with the fields {', '.join(siblings)}"
    nearest = [f"{section}.{match}" for match in difflib.get_close_matches(name, siblings, n=1)]
    nearest += [field for field in fields if field.rpartition(".")[2] == name]
    if not siblings:
        others = [option.removeprefix("--") for option in OPTIONS] if dashes else list(sections(optimizer))
        nearest += difflib.get_close_matches(key, [*others, *fields], n=1)
    if nearest:
        return f"did you mean {dashes}{nearest[0]}?"
    if siblings:
        of = f"{section} of type {OptimizerConfig.get_choice_name(optimizer)}" if section == "optimizer" else section
        return f"the fields of {of} are {', '.join(siblings)}"
    return f"the sections are {', '.join(sections(optimizer))}"
