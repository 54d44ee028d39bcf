"""What refuses a configuration, in one line."""

from pathlib import Path

import pytest

from sophia_levanter.config.command_line import load_config
from sophia_levanter.errors import InputError

TYPES = "it must be one of sophia_g, sophia_h, adamw, lion, muon, soap, ademamix"


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def load_error(path: Path, *overrides: tuple[str, str]) -> str:
    with pytest.raises(InputError) as error:
        load_config(path, overrides)
    return one_line(error)
