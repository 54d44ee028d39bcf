"""The exceptions that stand for a mistake in what the user gave us."""

from typing import ClassVar


class InputError(Exception):
    """Bad input: a config field, a file, a run directory.

    The message is one line that names the field or file, the value found and what would do. Commands print it without
    a traceback and exit with status 2.
    """

    reason: ClassVar[str] = "bad_input"  # for the program that started this one


class DirectoryInUse(InputError):
    """Another process holds the run directory or the one of its checkpoints; it may be gone in a moment."""

    reason = "directory_in_use"
