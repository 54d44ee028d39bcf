"""Tables of a run's settings, made from the dataclasses and the comments beside their fields, as `--help` is."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from types import UnionType
from typing import Any

from draccus.wrappers.docstring import get_attribute_docstring

from sophia_levanter.config import TrainConfig, sections
from sophia_levanter.config_file import show_value
from sophia_levanter.training.config import OptimizerConfig

MARK = re.compile(r"^<!-- fields of (\w+)(?: (\w+))? -->$", re.MULTILINE)
WORDS = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "NoneType": "null"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this with each page's text; a line `<!-- fields of SECTION [TYPE] -->` becomes that table."""
    return MARK.sub(lambda found: _table(found[1], found[2]), markdown)


def _table(section: str, optimizer: str | None) -> str:
    config = TrainConfig()
    cls = sections(type(config.optimizer))[section]
    common: dict[str, Any] = {}
    if optimizer is not None:
        cls = OptimizerConfig.get_known_choices()[optimizer]
        common = {field.name: field.default for field in dataclasses.fields(OptimizerConfig)}
    elif section == "optimizer":
        cls = OptimizerConfig
    lines = ["| field | value | default | |", "| --- | --- | --- | --- |"]
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in common or field.default != common[field.name]:
            comment = get_attribute_docstring(cls, field.name).comment_inline.replace("|", r"\|")
            default = show_value(field.default)
            lines.append(f"| `{section}.{field.name}` | {_kind(hints[field.name])} | {default} | {comment} |")
    return f"{inspect.getdoc(cls).splitlines()[0]}\n\n" + "\n".join(lines)


def _kind(annotation: object) -> str:
    kinds = typing.get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return " or ".join("list" if typing.get_origin(kind) else WORDS[kind.__name__] for kind in kinds)
