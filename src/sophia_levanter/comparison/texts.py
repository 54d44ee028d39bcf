"""Which texts a study's runs are about."""

from __future__ import annotations

from sophia_levanter.data.config import DataConfig
from sophia_levanter.data.prepare import prepare


def digests(config: DataConfig) -> dict[str, str]:
    """Digests of the tokens that runs train on and validate with, by the name of the field; prepared if need be.

    Raises:
        InputError: if a text is not there or is empty.
    """
    data = prepare(config, lambda line: print(line, flush=True))
    return {"train": data.train.manifest.digest, "validation": data.validation.manifest.digest}
