"""Read and write configuration files: strict YAML with an optional `defaults:` list of files to include.

Only mappings, lists and YAML 1.2 scalars are accepted. `6e-4` is a number; `yes`, `0123` and `12:30` are strings.
Duplicate keys, anchors, aliases and tags are rejected, so a file can never construct arbitrary Python objects.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sophia_levanter.errors import InputError, shortened
from sophia_levanter.files import read_regular

DEFAULTS_KEY = "defaults"
MOST_BYTES = 1 << 20  # per file
MOST_SHOWN = 200  # maximum number of characters shown for a value in an error message
MOST_FILES = 100  # per configuration; a file listed twice counts twice


@dataclass(frozen=True)
class Setting:
    """The value of a field and the file that sets it. The file is None for values from the command line."""

    value: object
    file: Path | None = None

    @property
    def prefix(self) -> str:
        """The prefix of error messages about this setting."""
        return "" if self.file is None else f"{self.file}: "


# NUL and lone surrogates, except for the surrogates that represent invalid UTF-8 bytes in file names.
_NOT_TEXT = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")

# The settings from one source, keyed by dotted path: {"optimizer.rho": Setting(0.03, file)}.
Layer = dict[str, Setting]


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            problem = (
                f"anchors and aliases are not allowed; quote strings that start with * or &, or use {DEFAULTS_KEY}"
            )
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        if getattr(event, "tag", None) is not None:
            problem = f"the tag {event.tag} is not allowed; quote strings that start with !"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if found := _NOT_TEXT.search(node.value):
            problem = f"the character {found[0]!a} is not allowed in text or file names"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add(key.value)
        return node


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    # Use the loader's resolvers, so that a string is quoted only if the loader would otherwise read another type.
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Format a tree as YAML, preserving the order of keys. Reading it with `read_layers` returns the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_value(text: str) -> object:
    """Parse a command-line value as YAML. Return the text itself if it is not valid YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def show_value(value: object) -> str:
    """Format a value for an error message, as it would be written in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return shortened(repr(value), MOST_SHOWN)


def read_layers(path: Path) -> list[Layer]:
    """Read the files listed under `defaults:` in `path`, depth first, then `path` itself. Later layers take precedence.

    Raises:
        InputError: if a file is missing, is not strict YAML or includes itself, or if there are too many files.
    """
    return _read_layers(path, (), itertools.count(1))


def _read_layers(path: Path, including: tuple[Path, ...], count: Iterator[int]) -> list[Layer]:
    try:
        resolved = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a cyclic link or an invalid file name
        resolved = path
    if next(count) > MOST_FILES:
        raise InputError(f"{including[0]}: {DEFAULTS_KEY} include more than {MOST_FILES} files; list each file once")
    if resolved in including:
        cycle = " -> ".join(file.name for file in (*including[including.index(resolved) :], resolved))
        raise InputError(f"{including[-1]}: {DEFAULTS_KEY} form a cycle: {cycle}")
    tree = _read_tree(path, including[-1] if including else None)
    defaults = tree.pop(DEFAULTS_KEY, None) or []
    if not isinstance(defaults, list) or not all(isinstance(name, str) and name for name in defaults):
        shown = shortened(repr(defaults), MOST_SHOWN)
        raise InputError(f"{path}: {DEFAULTS_KEY} is {shown}; it must be a list of file names")
    layers = [layer for name in defaults for layer in _read_layers(path.parent / name, (*including, resolved), count)]
    return [*layers, flatten(tree, path)]


def _read_tree(path: Path, included_from: Path | None) -> dict[Any, Any]:
    reader = "" if included_from is None else f"; it is listed under {DEFAULTS_KEY} in {included_from}"
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: file not found{reader}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}{reader}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not valid UTF-8{reader}") from None
    try:
        tree = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{path} is not valid YAML{line}: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(
            f"{path} contains a {type(tree).__name__}; it must contain a mapping of sections such as `optimizer:`"
        )
    return tree


def flatten(tree: Mapping[Any, Any], file: Path, prefix: str = "") -> Layer:
    """Flatten a tree of sections into settings keyed by dotted path.

    Args:
        tree: the sections, as read from YAML.
        file: the file to name in error messages.
        prefix: the prefix to add to each path.

    Raises:
        InputError: if a key contains a dot.
    """
    layer: Layer = {}
    for key, value in tree.items():
        if "." in str(key):
            raise InputError(f"{file}: key {prefix + str(key)!r} contains a dot; nest the field under its section")
        if isinstance(value, Mapping) and value:
            layer |= flatten(value, file, f"{prefix}{key}.")
        else:
            layer[f"{prefix}{key}"] = Setting(value, file)
    return layer
