"""How sources of text are named. Free of heavy imports."""

from __future__ import annotations

import os

PYTHON_STDLIB = "python_stdlib"
HUB = "hub:"
SAVED = "datasets:"
NANOGPT = "nanogpt:"
STORE = "store:"
TRAINED_TOKENIZER = ".tiktoken"  # how a saved BPE is called


def absolute_tokenizer(name: str) -> str:
    """The same tokenizer, named so that it is found from any working directory."""
    return os.path.abspath(os.path.expanduser(name)) if name.endswith(TRAINED_TOKENIZER) else name
