"""The console script: `sophia-levanter train ...` is `python -m sophia_levanter.main ...`."""

from __future__ import annotations

import sys
from importlib import import_module

VERBS = (
    "train",
    "prepare_data",
    "inspect_data",
    "train_tokenizer",
    "evaluate",
    "export",
    "sample",
    "report",
    "compare",
    "plan",
    "checkpoints",
    "launch",
    "tpu",
)


def main() -> int:
    """Run the verb that is the first argument on the others.

    Returns:
        The verb's exit status; 2 for no or an unknown verb.
    """
    verb, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if verb in ("-h", "--help"):
        print(f"usage: sophia-levanter {{{','.join(VERBS)}}} [--help] ...")
        return 0
    if verb not in VERBS:
        print(f"error: {verb!r} is not one of the verbs {', '.join(VERBS)}", file=sys.stderr)
        return 2
    if verb == "train":
        return int(import_module("sophia_levanter.main").process(arguments))
    return int(import_module(f"sophia_levanter.commands.{verb}").main(arguments))
