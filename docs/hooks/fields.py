"""Generate tables of a run's settings from their declarations, as `--help` does."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping
from typing import Any

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.build import schema
from sophia_levanter.config.command_line import fields_of
from sophia_levanter.config.files import show_value
from sophia_levanter.config.settings import declaration, kinds_of, words_of

MARK = re.compile(r"^<!-- fields of ([\w.]+)(?: (\w+))? -->$", re.MULTILINE)
WORDS = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "NoneType": "null"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each line `<!-- fields of SECTION [TYPE] -->` with a table. mkdocs calls this with each page's text."""
    return MARK.sub(lambda found: _table(found[1], found[2]), markdown)


def _table(section: str, choice: str | None) -> str:
    found = schema(TrainConfig)
    cls: Any = found.choices.get(section, found.sections[section])
    common: dict[str, Any] = {}
    if choice is not None:
        common = {field.name: field.default for field, _ in fields_of(cls)}
        cls = cls.get_known_choices()[choice]
    lines = ["| field | value | default | |", "| --- | --- | --- | --- |"]
    for field, annotation in fields_of(cls):
        if field.name not in common or field.default != common[field.name]:
            described = declaration(field).described.replace("|", r"\|")
            default = show_value(field.default)
            lines.append(f"| `{section}.{field.name}` | {_kind(annotation)} | {default} | {described} |")
    summary = inspect.getdoc(cls).splitlines()[0]
    return summary if len(lines) == 2 else f"{summary}\n\n" + "\n".join(lines)


def _kind(annotation: object) -> str:
    sections = {tuple: "list", Mapping: "mapping"}
    kinds = [kind for kind in kinds_of(annotation) if typing.get_origin(kind) is not typing.Literal]
    named = [sections.get(typing.get_origin(kind)) or WORDS[kind.__name__] for kind in kinds]
    return " or ".join([*named, *words_of(annotation)])
