"""Exceptions for invalid input, and functions that format messages as one line."""

from __future__ import annotations

import re
from typing import ClassVar


class InputError(Exception):
    """Raised for invalid input, such as a bad setting, file or run directory.

    The message is a single line that names the field or file, the value and the remedy. Commands print it without a
    traceback and exit with status 2.
    """

    reason: ClassVar[str] = "bad_input"  # reported to the program that started this one


class DirectoryInUse(InputError):
    """Another process has locked the run directory or its checkpoint directory. A later attempt may succeed."""

    reason = "directory_in_use"


class Problems:
    """Collects input errors so that they can be reported together.

    Examples:
        >>> problems = Problems()
        >>> for name in ("a", "b"):
        ...     with problems:
        ...         raise InputError(f"{name} is missing")
        >>> problems.report()
        Traceback (most recent call last):
        sophia_levanter.errors.InputError: a is missing; and b is missing
    """

    def __init__(self) -> None:
        self._messages: list[str] = []

    def __enter__(self) -> Problems:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, InputError):
            self._messages.append(str(error))
        return isinstance(error, InputError)

    def report(self) -> None:
        """Raise the collected errors, if any, as a single error.

        Raises:
            InputError: if any errors were collected. The message contains all of their messages.
        """
        if self._messages:
            raise InputError("; and ".join(dict.fromkeys(self._messages)))


# Matches control characters, line separators, bidirectional formatting characters and lone surrogates.
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_WORD = 300


def one_line(text: object) -> str:
    """Format text as one line. Control characters are replaced by Python escapes, and very long words are shortened."""
    line = CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))
    return re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda found: shortened(found[0], LONGEST_WORD), line)


def shortened(name: str, most: int) -> str:
    """Replace the middle of a name with "…" if the name has more than `most` characters."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[most // 2 + 1 - most :]}"


def counted(number: int, what: str) -> str:
    """Format a count with its noun in the singular or plural: `1 layer`, `12,000 steps`, `0 processes`."""
    plural = f"{what}es" if what.endswith(("s", "ch")) else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"
