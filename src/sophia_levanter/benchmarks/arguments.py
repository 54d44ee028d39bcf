"""Command lines of measurements: their own options, and any field of the configuration as `--SECTION.FIELD VALUE`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import parse_command_line
from sophia_levanter.errors import InputError


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, TrainConfig]:
    """What the command line says, and the configuration that `--config` and the overrides give.

    Args:
        parser: of all options but the overrides; it has `--config`, and allows no abbreviations.
        argv: the words; those of the process if None.

    Raises:
        InputError: if a word is neither an option nor an override, or the configuration is not sound.
    """
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        name = word.partition("=")[0]
        if name.startswith("--") and "." not in name:
            raise InputError(f"unknown option {name!r}; --help shows the options, and --SECTION.FIELD sets a field")
    config = parse_command_line(["--config", str(arguments.config), *rest]).config
    assert config is not None
    return arguments, config
