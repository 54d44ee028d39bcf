"""Command-line parsing for all commands. This module avoids slow imports, so that mistakes are reported immediately."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from sophia_levanter.errors import InputError

PLUGINS = "--plugins"  # the option for the only field outside a section


@dataclass
class Arguments:
    """A parsed command line.

    Attributes:
        options: option values, keyed by option name, including the dashes.
        flags: names of the flags (options without a value) that were given.
        overrides: dotted field paths and values, as typed in `--SECTION.FIELD VALUE`.
        words: the positional arguments.
        repeated: values of repeatable options in the order given, keyed by option name.
    """

    options: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    overrides: list[tuple[str, str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    repeated: dict[str, list[str]] = field(default_factory=dict)

    def needed(self, name: str, placeholder: str, hint: str) -> str:
        """Return the value of a required option.

        Raises:
            InputError: if the option is missing.
        """
        if name not in self.options:
            raise InputError(f"{name} {placeholder} is missing; {hint}")
        return self.options[name]


def whole_number(name: str, text: str) -> int:
    """Parse an option's value as an integer.

    Raises:
        InputError: if the value is not an integer from 0 to 999,999,999.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        shown = text if len(text) < 20 else f"{text[:20]}…"
        raise InputError(f"{name} is {shown!r}; it must be an integer from 0 to 999,999,999")
    return int(text)


def chosen(given: Sequence[str], verbs: Collection[str]) -> tuple[str, list[str]]:
    """Split a command line into a verb, such as `train`, and the arguments that follow it.

    Raises:
        InputError: if the verb is missing or unknown; the message suggests the nearest verb.
    """
    names = ", ".join(verbs)
    if not given:
        raise InputError(f"no command given; choose from {names}, or see --help")
    verb, *rest = given
    if verb not in verbs:
        near = difflib.get_close_matches(verb, verbs, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"unknown command {verb!r}; choose from {names}{hint}")
    return verb, rest


def parse_arguments(
    given: Sequence[str],
    *,
    options: Collection[str] = (),
    repeatable: Collection[str] = (),
    flags: Collection[str] = (),
    overrides: bool = False,
    words: bool = False,
) -> Arguments:
    """Parse a command line. The value of an option is the next word or follows `=`.

    Args:
        given: the command line.
        options: names of options that take a value, including the dashes; each may be given once.
        repeatable: names of options that take a value and may be given several times.
        flags: names of options that take no value.
        overrides: whether to accept `--SECTION.FIELD VALUE` and `--plugins MODULE`. The last value for a field takes
            effect; plug-ins accumulate.
        words: whether to accept positional arguments.

    Raises:
        InputError: if an argument is unknown, lacks a value, has an unexpected value or is given twice.
    """
    parsed = Arguments(repeated={name: [] for name in repeatable})
    rest = list(given)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        is_override = overrides and name.startswith("--") and ("." in name or name == PLUGINS)
        if name in flags:
            if equals:
                raise InputError(f"{name} takes no value, but got {value!r}")
            parsed.flags.add(name)
            continue
        if words and not word:
            raise InputError("empty argument; --help shows the options")
        if words and not word.startswith("-"):
            parsed.words.append(word)
            continue
        if name not in options and name not in repeatable and not is_override:
            raise _unexpected(word, (*options, *repeatable, *flags), overrides)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"{name} requires a value; use {name} VALUE")
            value = rest.pop(0)
        if is_override:
            plugins = dict(parsed.overrides).get("plugins") if name == PLUGINS else None
            value = value if plugins is None else f"{plugins},{value}"
            parsed.overrides.append((name.removeprefix("--"), value))
            continue
        if not value:
            raise InputError(f"the value of {name} is empty")
        if name in repeatable:
            parsed.repeated[name].append(value)
            continue
        if name in parsed.options:
            raise InputError(f"{name} is given twice")
        parsed.options[name] = value
    return parsed


def _unexpected(word: str, options: Collection[str], overrides: bool) -> InputError:
    name = word.partition("=")[0]
    if not name.startswith("--") or name == "--":
        hint = "use --SECTION.FIELD VALUE, and quote globs" if overrides else "--help shows the options"
        return InputError(f"unexpected argument {word!r}; {hint}")
    if overrides:
        from sophia_levanter.config.build import schema
        from sophia_levanter.config.run import TrainConfig

        hint = schema(TrainConfig).suggestion(name.removeprefix("--"), "--", (*options, PLUGINS))
    else:
        near = difflib.get_close_matches(name, options, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help shows the options"
    return InputError(f"unknown option {name!r}; {hint}")
