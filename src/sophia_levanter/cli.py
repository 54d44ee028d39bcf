"""The console script: `sophia-levanter train ...` is `python -m sophia_levanter.main ...`."""

from __future__ import annotations

import sys

from sophia_levanter import main as train
from sophia_levanter.commands import (
    checkpoints,
    compare,
    evaluate,
    export,
    inspect_data,
    launch,
    plan,
    prepare_data,
    report,
    sample,
    tpu,
    train_tokenizer,
)

VERBS = {
    "train": train.main,
    "prepare_data": prepare_data.main,
    "inspect_data": inspect_data.main,
    "train_tokenizer": train_tokenizer.main,
    "evaluate": evaluate.main,
    "export": export.main,
    "sample": sample.main,
    "report": report.main,
    "compare": compare.main,
    "plan": plan.main,
    "checkpoints": checkpoints.main,
    "launch": launch.main,
    "tpu": tpu.main,
}


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
    return VERBS[verb](arguments)
