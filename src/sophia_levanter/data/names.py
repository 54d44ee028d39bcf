"""How sources of text are named. Free of heavy imports."""

from __future__ import annotations

import os

PYTHON_STDLIB = "python_stdlib"
HUB = "hub:"
SAVED = "datasets:"
NANOGPT = "nanogpt:"
STORE = "store:"
TRAINED_TOKENIZER = ".tiktoken"  # how a saved BPE is called


def absolute_source(name: str) -> str:
    """The same source, named so that it is found from any working directory."""
    if name == PYTHON_STDLIB:
        return name
    if name.startswith(HUB):
        path, mark, options = name.removeprefix(HUB).partition("?")
        # `datasets` takes a folder of that name before it asks the hub.
        return HUB + os.path.abspath(path) + mark + options if os.path.isdir(path) else name
    kind = next((kind for kind in (SAVED, NANOGPT, STORE) if name.startswith(kind)), "")
    path = name.removeprefix(kind)
    return name if "://" in path else kind + os.path.abspath(os.path.expanduser(path))


def absolute_tokenizer(name: str) -> str:
    """The same tokenizer, named so that it is found from any working directory."""
    return os.path.abspath(os.path.expanduser(name)) if name.endswith(TRAINED_TOKENIZER) else name
