"""What the commands' command lines have in common. Imports nothing heavy, to answer at once."""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from sophia_levanter.errors import InputError
from sophia_levanter.exit_status import BAD_INPUT, DONE, FAILURE, INTERRUPTED
from sophia_levanter.printing import one_line


@dataclass
class Arguments:
    """A command line, taken apart.

    Attributes:
        options: values by the option's name, dashes included.
        flags: names of the options without a value that were given.
        overrides: dotted field paths and values as typed, of `--SECTION.FIELD VALUE`.
        words: what is no option.
        repeated: the values of each option that may be given several times, in their order.
    """

    options: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    overrides: list[tuple[str, str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    repeated: dict[str, list[str]] = field(default_factory=dict)

    def needed(self, name: str, placeholder: str, hint: str) -> str:
        """The value of an option that must be given.

        Raises:
            InputError: if it is not.
        """
        if name not in self.options:
            raise InputError(f"{name} {placeholder} is missing; {hint}")
        return self.options[name]


def whole_number(name: str, text: str) -> int:
    """The number that an option's value spells.

    Raises:
        InputError: if it is none from 0 to a billion.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        shown = text if len(text) < 20 else f"{text[:20]}…"
        raise InputError(f"{name} is {shown!r}; it must be a whole number, below a billion")
    return int(text)


def chosen(given: Sequence[str], verbs: Collection[str]) -> tuple[str, list[str]]:
    """The verb that a command line begins with, and what comes after it.

    Raises:
        InputError: if it begins with none of them; names the nearest.
    """
    names = ", ".join(verbs)
    if not given:
        raise InputError(f"say what to do: {names}; --help shows how")
    verb, *rest = given
    if verb not in verbs:
        near = difflib.get_close_matches(verb, verbs, n=1)
        raise InputError(f"{verb!r} is none of {names}" + (f"; did you mean {near[0]}?" if near else ""))
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
    """Takes a command line apart. A value follows its option as the next word or after `=`.

    Args:
        given: the command line.
        options: names of options with a value, dashes included; each may be given once.
        repeatable: names of options with a value that may be given several times.
        flags: names of options without one.
        overrides: whether there may be `--SECTION.FIELD VALUE`; of several for one field the last counts.
        words: whether there may be words that are no options.

    Raises:
        InputError: if an argument is not known, or has no value or one too many.
    """
    parsed = Arguments(repeated={name: [] for name in repeatable})
    rest = list(given)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in flags and not equals:
            parsed.flags.add(name)
            continue
        if words and not word:
            raise InputError("an argument is empty; --help shows what belongs there")
        if words and not word.startswith("-"):
            parsed.words.append(word)
            continue
        is_override = overrides and name.startswith("--") and "." in name
        if name not in options and name not in repeatable and not is_override:
            raise InputError(f"unexpected argument {name!r}; --help shows the options")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"{name} has no value; write {name} VALUE")
            value = rest.pop(0)
        if is_override:
            parsed.overrides.append((name.removeprefix("--"), value))
            continue
        if not value:
            raise InputError(f"{name} has an empty value")
        if name in repeatable:
            parsed.repeated[name].append(value)
            continue
        if name in parsed.options:
            raise InputError(f"{name} is given twice")
        parsed.options[name] = value
    return parsed


def run_command(
    given: Sequence[str] | None,
    run: Callable[[Sequence[str]], int],
    *,
    usage: str | None = None,
    interrupted: str = "interrupted; the same command goes on",
) -> int:
    """`run(command line)`, errors as one line each.

    Args:
        given: the command line; this process's if None.
        run: does what it says.
        usage: printed in place of that where --help is asked for; None leaves this to `run`.
        interrupted: what is said on Ctrl-C.

    Returns:
        The exit status: what `run` gives, 1 failure, 2 bad input, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What is printed may hold what the terminal's encoding lacks.
            stream.reconfigure(errors="replace")
    words = sys.argv[1:] if given is None else given
    try:
        if usage is not None and ("--help" in words or "-h" in words):
            print(usage)
            return DONE
        return run(words)
    except InputError as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:
        # Nobody reads on (`| head`); what Python would still flush must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except OSError as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
