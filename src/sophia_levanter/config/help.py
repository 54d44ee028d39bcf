"""The text of `--help`, made from the declarations of the settings."""

from __future__ import annotations

import dataclasses
import typing
from types import UnionType

from sophia_levanter.config.build import schema
from sophia_levanter.config.files import show_value
from sophia_levanter.config.run import TrainConfig
from sophia_levanter.config.settings import declaration

USAGE = """\
usage: python -m sophia_levanter.main --config FILE [--SECTION.FIELD VALUE ...] [--plugins MODULE]
       [--resume DIR|auto] [--print_config] [--quiet] [--help]

Trains a language model.

  --config FILE          YAML with any of the fields below; `defaults: [FILE, ...]` in it names files to start from
  --SECTION.FIELD VALUE  sets one field, on top of the file; quote a glob so that the shell leaves it alone
  --plugins MODULE       imports a module of your own first, which registers optimizers, models, schedules, ...
  --resume DIR           goes on with the run in DIR; needs no --config
  --resume auto          goes on with the run in trainer.run_dir if it holds one, and starts it otherwise
  --print_config         prints the resolved configuration and exits
  --quiet                prints warnings and, at the end, the result and the checkpoint; nothing while it trains
  --help                 prints this and exits"""

TYPE_NAMES = {"str": "TEXT", "int": "INT", "float": "NUMBER", "bool": "true|false"}
HELP_COLUMN = 60


def help_text() -> str:
    """Usage, and each field with its type, its default and its help, section by section."""
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
    # A dataclass without a docstring gets its signature for one.
    doc = cls.__doc__ or ""
    summary = cls.__name__ if not doc or doc.startswith(f"{cls.__name__}(") else doc.splitlines()[0]
    lines = [f"{title}: {summary}"]
    for field, annotation in fields_of(cls):
        left = f"  --{section}.{field.name} {_type_name(annotation)} ({show_value(field.default)})"
        lines.append(f"{left:<{HELP_COLUMN}}  {declaration(field).described}")
    return "\n".join(lines)


def fields_of(cls: type) -> list[tuple[dataclasses.Field, object]]:
    """The fields of a section, without the sections below it, with their types."""
    hints = typing.get_type_hints(cls)
    fields = [(field, hints[field.name]) for field in dataclasses.fields(cls)]
    return [(field, annotation) for field, annotation in fields if not dataclasses.is_dataclass(annotation)]


def _type_name(annotation: object) -> str:
    kinds = typing.get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    scalars = [kind for kind in kinds if typing.get_origin(kind) is None]
    return "|".join(TYPE_NAMES.get(kind.__name__, "null") for kind in scalars) or "LIST"
