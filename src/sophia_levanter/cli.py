"""The console script. `sophia-levanter train ...` is equivalent to `python -m sophia_levanter.main ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from sophia_levanter.config.arguments import chosen
from sophia_levanter.status import BAD_INPUT, DONE, run_command

VERBS = {
    "train": "train a model",
    "prepare_data": "tokenize text in advance",
    "inspect_data": "show the contents of a token store",
    "train_tokenizer": "train a tokenizer on text",
    "evaluate": "measure a model's loss on text, or its score on a task",
    "export": "export a model for transformers",
    "sample": "generate text with a model",
    "report": "write an HTML report on training runs",
    "compare": "train the runs in a study and report the results",
    "plan": "estimate the memory and time that a run needs",
    "checkpoints": "list, verify, show, compare and prune checkpoints",
    "launch": "start a run on many hosts",
    "tpu": "create, list, connect to and delete TPU slices",
}
USAGE = "\n".join(
    [
        f"usage: sophia-levanter {{{','.join(VERBS)}}} [--help] ...",
        "",
        *(f"  {verb:<16} {what}" for verb, what in VERBS.items()),
    ]
)


def main() -> int:
    """Run the command named by the first argument with the remaining arguments.

    Returns:
        The exit status of the command, or 2 if the command is missing or unknown.
    """
    return run_command(None, _run)


def _run(words: Sequence[str]) -> int:
    if not words:
        print(USAGE, file=sys.stderr)
        return BAD_INPUT
    if words[0] in ("-h", "--help"):
        print(USAGE)
        return DONE
    verb, arguments = chosen(words, VERBS)
    if verb == "train":
        return int(import_module("sophia_levanter.main").process(arguments))
    return int(import_module(f"sophia_levanter.commands.{verb}").main(arguments))
