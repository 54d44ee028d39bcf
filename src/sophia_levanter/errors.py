"""The one exception that stands for a mistake in what the user gave us."""


class InputError(Exception):
    """Bad input: a config field, a file, a run directory.

    The message is one line that names the field or file, the value found and what would do. Commands print it without
    a traceback and exit with status 2.
    """
