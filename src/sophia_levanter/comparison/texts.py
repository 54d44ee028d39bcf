"""Which texts a study's runs are about."""

from __future__ import annotations

import json

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.prepare import prepare
from sophia_levanter.data.token_store import Tokens, TokenStore, digest_of
from sophia_levanter.printing import one_line


def digests(config: DataConfig) -> dict[str, str]:
    """Digests of the tokens that runs train on and validate with, by the name of the field; prepared if need be.

    Raises:
        InputError: if a text is not there or is empty.
    """
    data = prepare(config, lambda line: print(one_line(line), flush=True))
    return {"train": _digest(data.train), "validation": _digest(data.validation)}


def _digest(corpus: Tokens) -> str:
    if isinstance(corpus, TokenStore):
        return corpus.manifest.digest
    return digest_of(json.dumps(corpus.facts).encode())
