"""The text of `--help`, made from the config dataclasses and the comments beside their fields."""

from __future__ import annotations

import dataclasses
import typing
from types import UnionType

from draccus.wrappers.docstring import get_attribute_docstring

from sophia_levanter.config import TrainConfig, sections
from sophia_levanter.config_file import show_value
from sophia_levanter.training.config import OptimizerConfig

USAGE = """\
usage: python -m sophia_levanter.main --config FILE [--SECTION.FIELD VALUE ...] [--resume DIR|auto]
       [--print_config] [--quiet] [--help]

Trains a GPT-2 model.

  --config FILE          YAML with any of the fields below; `defaults: [FILE, ...]` in it names files to start from
  --SECTION.FIELD VALUE  sets one field, on top of the file; quote a glob so that the shell leaves it alone
  --resume DIR           goes on with the run in DIR; needs no --config
  --resume auto          goes on with the run in trainer.run_dir if it holds one, and starts it otherwise
  --print_config         prints the resolved configuration and exits
  --quiet                prints warnings and, at the end, the result and the checkpoint; nothing while it trains
  --help                 prints this and exits"""

TYPE_NAMES = {"str": "TEXT", "int": "INT", "float": "NUMBER", "bool": "true|false"}
HELP_COLUMN = 60


def help_text() -> str:
    """Usage, and each field with its type, its default and its comment, section by section."""
    default = type(TrainConfig().optimizer)
    parts = [USAGE]
    for section, cls in sections(default).items():
        if section == "optimizer":
            parts += [_optimizer_help(name, kind, kind is default) for name, kind in _optimizers().items()]
        else:
            parts.append(_section_help(section, section, cls))
    return "\n\n".join(parts)


def _optimizers() -> dict[str, type]:
    return OptimizerConfig.get_known_choices()


def _optimizer_help(name: str, cls: type, is_default: bool) -> str:
    title = f"optimizer, with --optimizer.type {name}" + (" (the default)" if is_default else "")
    return _section_help(title, "optimizer", cls)


def _section_help(title: str, section: str, cls: type) -> str:
    summary = (cls.__doc__ or "").splitlines()[0]
    lines = [f"{title}: {summary}"]
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        left = f"  --{section}.{field.name} {_type_name(hints[field.name])} ({show_value(field.default)})"
        comment = get_attribute_docstring(cls, field.name).comment_inline
        lines.append(f"{left:<{HELP_COLUMN}}  {comment}")
    return "\n".join(lines)


def _type_name(annotation: object) -> str:
    kinds = typing.get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    scalars = [kind for kind in kinds if typing.get_origin(kind) is None]
    return "|".join(TYPE_NAMES.get(kind.__name__, "null") for kind in scalars) or "LIST"
