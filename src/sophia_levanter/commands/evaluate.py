"""`python -m sophia_levanter.commands.evaluate MODEL`: the loss of a trained model on a text."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sophia_levanter.commands.on_models import run_on_model
from sophia_levanter.config.arguments import parse_arguments, whole_number
from sophia_levanter.errors import InputError, one_line
from sophia_levanter.status import DONE

if TYPE_CHECKING:
    from sophia_levanter.data.batches import ValidationBatches
    from sophia_levanter.run.loading import LoadedModel
    from sophia_levanter.training.evaluation import Evaluation

WINDOWS_PER_DEVICE = 8
REPORT_SECONDS = 5.0
OPTIONS = ("--step", "--windows", "--batch_size")
USAGE = f"""\
usage: python -m sophia_levanter.commands.evaluate MODEL [--step N] [--averaged] [--windows N] [--batch_size N]
       [--SECTION.FIELD VALUE ...] [--help]

Prints the mean loss over all tokens of a text, each predicted once and weighted the same.

  MODEL                  a run directory, a folder saved by transformers, or nanoGPT's ckpt.pt
  --step N               of the run's checkpoints; the newest if not given
  --averaged             the average of the weights that a run with trainer.ema_decay keeps
  --windows N            of the text, spread evenly; all if not given
  --batch_size N         sequences at one time, rounded up to a multiple of the devices that share them;
                         {WINDOWS_PER_DEVICE} for each of these if not given
  --SECTION.FIELD VALUE  sets one field, on top of the run's: --data.validation 'other/*.txt', --mesh.fsdp embed,
                         --trainer.compute_dtype bfloat16. A model that is no run's needs --data.validation
  --help                 prints this and exits"""


@dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    model: str
    step: int | None
    averaged: bool
    sequences: int | None
    batch_size: int | None
    overrides: Sequence[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says.

    Returns:
        The exit status: 0 done, 1 damage or failure, 2 bad input, 130 interrupted.
    """
    return run_on_model(argv, parse, _run, usage=USAGE)


def parse(words: Sequence[str]) -> Command:
    """Reads the command line.

    Raises:
        InputError: if an argument is not known, is missing, or has no value or a wrong one.
    """
    arguments = parse_arguments(words, options=OPTIONS, flags=("--averaged",), overrides=True, words=True)
    if len(arguments.words) != 1:
        raise InputError(f"{len(arguments.words)} models are given; write one MODEL; --help shows the options")
    numbers = {name: whole_number(name, text) for name, text in arguments.options.items()}
    for name in ("--windows", "--batch_size"):
        if numbers.get(name) == 0:
            raise InputError(f"{name} is 0; it must be at least 1")
    return Command(
        arguments.words[0],
        step=numbers.get("--step"),
        averaged="--averaged" in arguments.flags,
        sequences=numbers.get("--windows"),
        batch_size=numbers.get("--batch_size"),
        overrides=arguments.overrides,
    )


def _run(command: Command) -> int:
    # Only now what takes long to import.
    from sophia_levanter.run.loading import load_model

    loaded = load_model(
        command.model, step=command.step, averaged=command.averaged, overrides=command.overrides, report=_tell
    )
    batches, text = _batches(command, loaded)
    started = time.monotonic()
    evaluation = _evaluate(loaded, batches)
    print(one_line(f"model          {loaded.source}"))
    print(one_line(f"text           {text}, tokenizer {os.path.basename(loaded.tokenizer.name)}"))
    for line in _lines(evaluation, time.monotonic() - started):
        print(line)
    return DONE


def _tell(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


def _batches(command: Command, loaded: LoadedModel) -> tuple[ValidationBatches, str]:
    """The sequences to evaluate, and what text they are of."""
    from sophia_levanter.data.batches import ValidationBatches
    from sophia_levanter.data.corpora import prepare_validation

    data = loaded.config.data
    if data.validation is None and loaded.step is None:
        raise InputError(f"--data.validation TEXT is missing: {loaded.source} is no run, which has a text of its own")
    tokens = prepare_validation(data, loaded.tokenizer, _tell)
    shards = loaded.partition.row_shards
    # No more than there are, which memory may not hold.
    sequences = max(1, -(-(tokens.num_tokens - 1) // loaded.config.model.seq_len))
    wanted = min(command.batch_size or WINDOWS_PER_DEVICE * shards, command.sequences or sequences, sequences)
    batches = ValidationBatches(
        tokens,
        seq_len=loaded.config.model.seq_len,
        batch_size=-(-wanted // shards) * shards,
        max_sequences=command.sequences,
    )
    return batches, data.validation or f"what is held out of {data.train}"


def _evaluate(loaded: LoadedModel, batches: ValidationBatches) -> Evaluation:
    import jmp

    from sophia_levanter.data.tokenizer import token_byte_lengths
    from sophia_levanter.training.evaluation import Evaluator

    trainer = loaded.config.trainer
    policy = jmp.get_policy(f"params={trainer.parameter_dtype},compute={trainer.compute_dtype},output=float32")
    evaluator = Evaluator(batches, token_byte_lengths(loaded.tokenizer), loaded.partition, policy)
    return evaluator(loaded.model, _progress(len(batches)))


def _progress(total: int) -> Callable[[], None]:
    """Called after each batch, tells from time to time how many are done."""
    done, next_report = 0, time.monotonic() + REPORT_SECONDS

    def advance() -> None:
        nonlocal done, next_report
        done += 1
        if time.monotonic() >= next_report and done < total:
            print(f"{done:,} of {total:,} batches", file=sys.stderr, flush=True)
            next_report = time.monotonic() + REPORT_SECONDS

    return advance


def _lines(evaluation: Evaluation, seconds: float) -> Iterator[str]:
    import numpy as np

    yield f"loss           {evaluation.loss:.4f} nats per token"
    with np.errstate(over="ignore"):
        yield f"perplexity     {np.exp(evaluation.loss):,.2f}"
    yield f"bits per byte  {evaluation.bits_per_byte:.4f}"
    yield f"tokens         {evaluation.tokens:,}, which stand for {evaluation.text_bytes:,} bytes"
    yield f"time           {seconds:.1f} s, with compiling"


if __name__ == "__main__":
    sys.exit(main())
