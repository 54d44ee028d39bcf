"""Build configuration dataclasses from settings with dotted paths."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, TypeVar

import draccus
from draccus import ChoiceRegistry

from sophia_levanter.config.files import Layer, Setting, parse_value, show_value
from sophia_levanter.config.settings import declaration, kinds_of, words_of
from sophia_levanter.errors import InputError

EXPECTED = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}
MASK = "***"  # shown in place of a value that may be a secret

Root = TypeVar("Root")


@dataclass
class Schema:
    """The keys allowed in a configuration, given its selected section types.

    Attributes:
        fields: type annotations of fields, keyed by path, such as `optimizer.rho`.
        sections: dataclasses of sections, keyed by path. The path of the root is empty.
        choices: registries for sections with a selectable type, keyed by path.
        former: current paths of renamed fields, keyed by their paths in the previous release.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, type] = field(default_factory=dict)
    choices: dict[str, type[ChoiceRegistry]] = field(default_factory=dict)
    former: dict[str, str] = field(default_factory=dict)

    def suggestion(self, key: str, prefix: str = "", options: Collection[str] = ()) -> str:
        """Suggest a replacement for an unknown key.

        Args:
            key: the path of the unknown key.
            prefix: the prefix for field names, such as `--` on a command line.
            options: names of valid options that are not fields.
        """
        section, _, name = key.rpartition(".")
        of = key if key in self.sections else section if section in self.sections else ""
        siblings = [
            path.rpartition(".")[2] for path in (*self.fields, *self.sections) if path and path.rpartition(".")[0] == of
        ]
        if of and of == key:
            return f"{key} is a section; its fields are {', '.join(siblings)}"
        nearest = [_join(of, match) for match in difflib.get_close_matches(name, siblings, n=1)]
        last = {path: path.rpartition(".")[2] for path in self.fields}
        nearest += [path for path in last if path.startswith(f"{of}.") and _initials(last[path]) == name]
        nearest += [path for path in last if name in (last[path], _initials(last[path]))]
        others = [option.removeprefix("--") for option in options] or self._top_level
        if not of:
            nearest += difflib.get_close_matches(key, [*others, *self.fields], n=1)
        if nearest:
            return f"did you mean {prefix}{nearest[0]}?"
        if of or not self._top_level:
            return f"valid fields for {self._described(of)} are {', '.join(siblings)}"
        return f"valid sections are {', '.join(self._top_level)}"

    @property
    def _top_level(self) -> list[str]:
        return [path for path in self.sections if path and "." not in path]

    def _described(self, path: str) -> str:
        """Format a section's path and type, as in `optimizer (type adamw)`."""
        if path not in self.choices:
            return path
        registry = self.choices[path]
        name = registry.get_choice_name(self.sections[path])
        return f"{path} ({choice_key(registry)} {name})" if path else f"{choice_key(registry)} {name}"


def _initials(name: str) -> str:
    """Return the initials of a name, such as `lr` for `learning_rate`. A single word has no initials."""
    return "".join(word[:1] for word in name.split("_")) if "_" in name else ""


def choice_key(registry: type[ChoiceRegistry]) -> str:
    """Return the key that selects a section's type: the registry's `choice_key`, or `type` by default."""
    return getattr(registry, "choice_key", "type")


def schema(root: type, settings: Layer | None = None) -> Schema:
    """Return the keys allowed in a configuration.

    Args:
        root: the dataclass, or registry of dataclasses, for the whole configuration.
        settings: settings that may select section types. All other sections have their default types.

    Raises:
        InputError: if a selected type is not registered.
    """
    found = Schema()
    _add_section(found, root, "", settings or {}, dataclasses.MISSING)
    return found


def build(root: type[Root], layers: Sequence[Layer]) -> Root:
    """Build a configuration from layers of settings. Later layers override earlier ones.

    When a layer changes a section's type, the section keeps the fields that both types inherit from a class marked
    `is_family` or, without one, from the registry. Other fields set by earlier layers are dropped.

    Raises:
        InputError: if a key is unknown, or a value has the wrong type or is out of range.
    """
    settings: Layer = {}
    for layer in layers:
        settings = _put_on_top(root, settings, layer)
    found = schema(root, settings)
    for path, registry in found.choices.items():
        if found.sections[path] is registry:
            key = _join(path, choice_key(registry))
            raise InputError(f"{key} is missing; it must be one of {', '.join(registry.get_known_choices())}")
    values: dict[str, Any] = {}
    for key, setting in settings.items():
        _add_value(found, values, key, setting)
    return typing.cast(Root, _construct(found, "", values))


def encode(config: Any) -> Any:
    """Convert a configuration or section to plain values. A section with only a `type` becomes the type's name."""
    return _shorten(draccus.encode(config))


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten the output of `encode` to a dict keyed by dotted path."""
    tree = encode(config) if not prefix else config
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return values


def _shorten(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return tree["type"] if list(tree) == ["type"] else {name: _shorten(value) for name, value in tree.items()}


def _add_section(found: Schema, kind: Any, path: str, settings: Layer, default: Any) -> None:
    if issubclass(kind, ChoiceRegistry):
        key = _join(path, choice_key(kind))
        found.choices[path] = kind
        found.fields[key] = str
        kind = _chosen(kind, key, settings, default)
    found.sections[path] = kind
    hints = typing.get_type_hints(kind)
    for declared in dataclasses.fields(kind):
        hint, below = hints[declared.name], _join(path, declared.name)
        if dataclasses.is_dataclass(hint):
            _add_section(found, hint, below, settings, declared.default_factory)
        elif _is_setting(hint):
            found.fields[below] = hint
            if former := declaration(declared).former:
                found.former[_join(path, former)] = below
        else:
            known = "a bool, int, float or str, one of these or None, a tuple of these, or a dataclass"
            raise InputError(f"{below} in {kind.__qualname__} has type {hint}; a setting must be {known}")


def _is_setting(hint: Any) -> bool:
    """Return whether `convert_value` supports a type."""
    others = (tuple, Mapping, Literal)
    return all(kind in EXPECTED or kind is NoneType or typing.get_origin(kind) in others for kind in kinds_of(hint))


def _takes_mapping(hint: Any) -> bool:
    """Return whether a type accepts a mapping from names to strings."""
    return any(typing.get_origin(kind) is Mapping for kind in kinds_of(hint))


def _chosen(registry: type[ChoiceRegistry], key: str, settings: Layer, default: Any) -> type:
    """Return the selected or default type of a section, or the registry itself if there is neither."""
    if key not in settings:
        return registry if default is dataclasses.MISSING else type(default())
    types, setting = registry.get_known_choices(), settings[key]
    if not isinstance(setting.value, str) or setting.value not in types:
        shown = show_value(setting.value)
        raise InputError(f"{setting.prefix}{key} is {shown}; it must be one of {', '.join(types)}")
    return types[setting.value]


def _put_on_top(root: type, settings: Layer, layer: Layer) -> Layer:
    """Merge a layer into settings. If a section's type changes, drop the fields specific to the old type."""
    before = schema(root, settings)
    layer = _with_present_names(before.former, layer)
    settings = _without_other_kind(before.fields, settings, layer)
    for path, registry in before.choices.items():
        key = _join(path, choice_key(registry))
        if path in layer and isinstance(layer[path].value, str):  # the type alone, as in `schedule: linear`
            layer = {key if name == path else name: setting for name, setting in layer.items()}
        old = before.sections[path]
        if key in layer and (new := _chosen(registry, key, layer, dataclasses.MISSING)) is not old:
            families = [base for base in new.__mro__ if base in old.__mro__ and base.__dict__.get("is_family")]
            shared: Any = families[0] if families else registry
            kept = {_join(path, common.name) for common in dataclasses.fields(shared)}
            own = {name for name in before.fields if name.startswith(f"{path}.")}
            dropped = {name for name in own if not any(f"{name}.".startswith(f"{common}.") for common in kept)}
            settings = {name: setting for name, setting in settings.items() if name not in dropped}
    return settings | layer


def _without_other_kind(fields: Mapping[str, Any], settings: Layer, layer: Layer) -> Layer:
    """Drop the settings of each field that `layer` changes from a single value to a mapping, or vice versa.

    Raises:
        InputError: if `layer` sets a field both to a single value and to a mapping.
    """
    for name in [name for name, kind in fields.items() if len(kinds_of(kind)) > 1 and _takes_mapping(kind)]:
        below = [key for key in layer if key.startswith(f"{name}.")]
        if name in layer and below:
            raise InputError(f"{layer[name].prefix}{name} and {below[0]} cannot be combined; specify only one")
        if name in layer:
            settings = {key: setting for key, setting in settings.items() if not key.startswith(f"{name}.")}
        elif below:
            settings = {key: setting for key, setting in settings.items() if key != name}
    return settings


def _with_present_names(former: Mapping[str, str], layer: Layer) -> Layer:
    """Replace former setting names with current ones.

    Raises:
        InputError: if a setting is given under both names.
    """
    for name in former.keys() & layer.keys():
        setting, present = layer[name], former[name]
        if present in layer:
            raise InputError(f"{setting.prefix}{name} and {present} are the same setting; specify only {present}")
        if name not in _warned and (setting.file is None or setting.file.suffix in (".yaml", ".yml")):
            _warned.add(name)
            print(f"WARNING: {setting.prefix}{name} is deprecated; use {present} instead", file=sys.stderr)
    return {former.get(name, name): setting for name, setting in layer.items()}


_warned: set[str] = set()  # former names already reported by this process


def _add_value(found: Schema, values: dict[str, Any], key: str, setting: Setting) -> None:
    parent, _, name = key.rpartition(".")
    field = next((path for path in found.fields if key.startswith(f"{path}.")), None)
    if key in found.fields:
        values[key] = convert_value(key, setting, found.fields[key])
    elif _takes_mapping(found.fields.get(parent)):
        if not isinstance(setting.value, str):
            kind = show_value(setting.value) if isinstance(setting.value, dict | list | NoneType) else _masked(setting)
            raise InputError(f"{setting.prefix}{key} is {kind}; it must be a quoted string")
        values.setdefault(parent, {})[name] = setting.value
    elif field is not None and setting.file is not None:
        if _takes_mapping(found.fields[field]):
            raise InputError(f"{setting.prefix}{parent} is a mapping; it must be a quoted string")
        convert_value(field, Setting({}, setting.file), found.fields[field])  # raises, because the value is a mapping
    elif key not in found.sections:
        what, dashes = ("unknown option", "--") if setting.file is None else ("unknown key", "")
        options = ("--config", "--resume") if dashes else ()
        suggestion = found.suggestion(key, dashes, options)
        raise InputError(f"{setting.prefix}{what} {dashes + key!r}; {suggestion}")
    elif setting.value is not None and setting.value != {}:
        raise InputError(f"{setting.prefix}{key} is {show_value(setting.value)}; it must be a mapping of fields")


def _masked(setting: Setting) -> str:
    return f"{MASK} ({type(setting.value).__name__})"


def convert_value(key: str, setting: Setting, annotation: Any) -> Any:
    """Convert a setting's value to the field's type: a scalar, an optional scalar, a list or a mapping."""
    kinds, words = kinds_of(annotation), words_of(annotation)
    items = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple]
    scalars = [kind for kind in kinds if kind is not NoneType and typing.get_origin(kind) is None]
    value = setting.value
    if value in words:
        return value
    if typing.get_origin(annotation) is Mapping:
        if value:
            raise InputError(f"{setting.prefix}{key} is {_masked(setting)}; it must be a mapping of NAME: VALUE pairs")
        return {}
    if _takes_mapping(annotation) and isinstance(value, dict):
        return {name: convert_value(f"{key}.{name}", Setting(x, setting.file), str) for name, x in value.items()}
    if not scalars and setting.file is None and isinstance(value, str):
        value = value.split(",") if items == [str] and value not in ("", "[]") else parse_value(value or "[]")
    if items and isinstance(value, list):
        return tuple(
            _convert_item(f"{key}[{i}]", Setting(item, setting.file), items[0]) for i, item in enumerate(value)
        )
    if not scalars:
        such = ", such as [{...}, {...}]" if dataclasses.is_dataclass(items[0]) else " of strings"
        raise InputError(f"{setting.prefix}{key} is {show_value(value)}; it must be a list{such}")
    kind = scalars[0]
    if setting.file is None and isinstance(value, str):
        if NoneType in kinds and value.lower() in ("null", "none"):
            return None
        if kind is not str and value.strip():
            value = parse_value(value)
    if value is None and NoneType in kinds:
        return None
    if kind is float and type(value) is int and int not in scalars:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) in scalars and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    expected = " or ".join([EXPECTED[kind], *words, *(["null"] if NoneType in kinds else [])])
    hint = "; quote it" if kind is str and not isinstance(value, dict | list | NoneType) else ""
    raise InputError(f"{setting.prefix}{key} is {show_value(value)}; it must be {expected}{hint}")


def _convert_item(key: str, setting: Setting, kind: Any) -> Any:
    """Convert a list item, which is a scalar or a mapping with the fields of a dataclass."""
    if not dataclasses.is_dataclass(kind):
        return convert_value(key, setting, kind)
    if not isinstance(setting.value, dict):
        raise InputError(f"{setting.prefix}{key} is {show_value(setting.value)}; it must be a mapping of fields")
    hints = {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    for name in [name for name in setting.value if name not in hints] + sorted(needed - set(setting.value)):
        problem = "missing" if name in needed else "unknown"
        raise InputError(f"{setting.prefix}{key}.{name} is {problem}; valid fields are {', '.join(hints)}")
    values = {
        name: convert_value(f"{key}.{name}", Setting(value, setting.file), hints[name])
        for name, value in setting.value.items()
    }
    make: Any = kind
    return make(**values)


def _construct(found: Schema, path: str, values: Mapping[str, Any]) -> Any:
    """Construct a section from the values of its own fields and its subsections."""
    arguments = {}
    cls = found.sections[path]
    for declared in dataclasses.fields(cls):
        below = _join(path, declared.name)
        if below in found.sections:
            arguments[declared.name] = _construct(found, below, values)
        elif below in values:
            arguments[declared.name] = values[below]
    return cls(**arguments)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
