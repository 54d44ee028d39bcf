"""`python -m sophia_levanter.commands.export MODEL OUT_DIR`: export a trained model as a folder for transformers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sophia_levanter.commands.on_models import run_on_model
from sophia_levanter.config.arguments import parse_arguments, whole_number
from sophia_levanter.errors import InputError, counted
from sophia_levanter.status import DONE

DTYPES = ("float32", "bfloat16", "float16")
USAGE = """\
usage: python -m sophia_levanter.commands.export MODEL OUT_DIR [--step N] [--averaged] [--dtype TYPE]
       [--SECTION.FIELD VALUE ...] [--help]

Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer can load. --trainer.initial_weights accepts it
too.

  MODEL                  a run directory, a folder saved by transformers, or nanoGPT's ckpt.pt
  OUT_DIR                a new or empty folder
  --step N               load the run's checkpoint at step N (default: the newest)
  --averaged             use the averaged weights of a run with trainer.ema_decay or trainer.lawa_every
  --dtype TYPE           float32, bfloat16 or float16 (default: the model's own)
  --SECTION.FIELD VALUE  override a field of the run, such as --data.tokenizer cl100k_base for a ckpt.pt
  --help                 show this help message and exit"""


@dataclass(frozen=True)
class Command:
    """The parsed command line."""

    model: str
    folder: Path
    step: int | None
    averaged: bool
    dtype: str | None
    overrides: Sequence[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 on failure or a corrupt checkpoint, 2 on bad input, or 130 on Ctrl-C."""
    return run_on_model(argv, parse, _export, usage=USAGE, interrupted="interrupted; nothing was written")


def parse(words: Sequence[str]) -> Command:
    """Parse the command line.

    Raises:
        InputError: if an argument is unknown or missing, or a value is missing or invalid.
    """
    arguments = parse_arguments(words, options=("--step", "--dtype"), flags=("--averaged",), overrides=True, words=True)
    if len(arguments.words) != 2:
        found = counted(len(arguments.words), "argument")
        raise InputError(f"expected MODEL and OUT_DIR, found {found}; --help shows the options")
    dtype = arguments.options.get("--dtype")
    if dtype not in (None, *DTYPES):
        raise InputError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    step = arguments.options.get("--step")
    model, folder = arguments.words
    return Command(
        model,
        Path(os.path.realpath(os.path.expanduser(folder))),
        None if step is None else whole_number("--step", step),
        "--averaged" in arguments.flags,
        dtype,
        arguments.overrides,
    )


def _export(command: Command) -> int:
    # Import slow modules after the checks.
    from sophia_levanter.interop.exporting import check_new_folder, export_model
    from sophia_levanter.run.loading import load_model

    check_new_folder(command.folder)
    loaded = load_model(
        command.model, step=command.step, averaged=command.averaged, overrides=command.overrides, report=print
    )
    export_model(loaded, command.folder, command.dtype)
    print(
        f"exported {loaded.source} to {command.folder}: {command.dtype or loaded.model.head_weights().dtype.name}, "
        f"{(command.folder / 'model.safetensors').stat().st_size:,} bytes, "
        f"tokenizer {os.path.basename(loaded.tokenizer.name)}"
    )
    return DONE


if __name__ == "__main__":
    sys.exit(main())
