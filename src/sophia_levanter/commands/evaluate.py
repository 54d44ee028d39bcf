"""`python -m sophia_levanter.commands.evaluate MODEL`: measure the loss on text, or the score on a task."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sophia_levanter.commands.on_models import run_on_model, tell
from sophia_levanter.config.arguments import parse_arguments, whole_number
from sophia_levanter.config.trainer import TASKS
from sophia_levanter.errors import InputError, one_line
from sophia_levanter.status import DONE

if TYPE_CHECKING:
    from sophia_levanter.data.batches import ValidationBatches
    from sophia_levanter.data.token_store import Tokens
    from sophia_levanter.run.loading import LoadedModel
    from sophia_levanter.training.evaluation import Evaluation
    from sophia_levanter.training.tasks import Item

WINDOWS_PER_DEVICE = 8
REPORT_SECONDS = 5.0
OPTIONS = ("--step", "--windows", "--batch_size", "--task", "--file")
USAGE = f"""\
usage: python -m sophia_levanter.commands.evaluate MODEL [--step N] [--averaged] [--windows N] [--batch_size N]
       [--task NAME --file FILE] [--SECTION.FIELD VALUE ...] [--help]

Print the mean loss over all tokens in a text, each predicted once with equal weight. For a run with several validation
sets, print the loss on each set and their mean. With --task, print the score on a benchmark instead.

  MODEL                  a run directory, a folder saved by transformers, or nanoGPT's ckpt.pt
  --step N               load the run's checkpoint at step N (default: the newest)
  --averaged             use the averaged weights of a run with trainer.ema_decay or trainer.lawa_every
  --windows N            number of windows of text to score, spread evenly (default: all)
  --task NAME            benchmark to score, one of {", ".join(TASKS)}; requires --file
  --file FILE            benchmark questions, in the JSON Lines format that the benchmark's authors use
  --batch_size N         sequences per batch, rounded up to a multiple of the number of devices that share a batch
                         (default: {WINDOWS_PER_DEVICE} per device)
  --SECTION.FIELD VALUE  override a field of the run: --data.validation 'other/*.txt', --mesh.fsdp embed,
                         --trainer.compute_dtype bfloat16. A model without a run requires --data.validation
  --help                 show this help message and exit"""


@dataclass(frozen=True)
class Command:
    """The parsed command line."""

    model: str
    step: int | None
    averaged: bool
    sequences: int | None
    batch_size: int | None
    task: str | None
    file: Path | None
    overrides: Sequence[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 on failure or a corrupt checkpoint, 2 on bad input, or 130 on Ctrl-C."""
    return run_on_model(argv, parse, _run, usage=USAGE)


def parse(words: Sequence[str]) -> Command:
    """Parse the command line.

    Raises:
        InputError: if an argument is unknown or missing, or a value is missing or invalid.
    """
    arguments = parse_arguments(words, options=OPTIONS, flags=("--averaged",), overrides=True, words=True)
    if len(arguments.words) != 1:
        raise InputError(f"expected one MODEL, found {len(arguments.words)}; --help shows the options")
    options = dict(arguments.options)
    task, file = options.pop("--task", None), options.pop("--file", None)
    if task not in (None, *TASKS):
        raise InputError(f"--task is {task!r}; it must be one of {', '.join(TASKS)}")
    if (task is None) != (file is None):
        raise InputError("--task NAME and --file FILE must be given together; one of them is missing")
    if task is not None and {"--windows", "--batch_size"} & options.keys():
        raise InputError("--windows and --batch_size cannot be combined with --task, which scores the whole file")
    numbers = {name: whole_number(name, text) for name, text in options.items()}
    for name in ("--windows", "--batch_size"):
        if numbers.get(name) == 0:
            raise InputError(f"{name} is 0; it must be at least 1")
    return Command(
        arguments.words[0],
        step=numbers.get("--step"),
        averaged="--averaged" in arguments.flags,
        sequences=numbers.get("--windows"),
        batch_size=numbers.get("--batch_size"),
        task=task,
        file=None if file is None else Path(file),
        overrides=arguments.overrides,
    )


def _run(command: Command) -> int:
    # Import slow modules after the checks.
    from sophia_levanter.run.loading import load_model
    from sophia_levanter.training.tasks import read_items

    items = None if command.task is None or command.file is None else read_items(command.task, command.file)
    loaded = load_model(
        command.model, step=command.step, averaged=command.averaged, overrides=command.overrides, report=tell
    )
    if items is not None:
        for line in _score(loaded, f"{command.task}, {len(items):,} questions from {command.file}", items):
            print(one_line(line))
        return DONE
    sets, data = _sets(command, loaded), loaded.config.data
    started = time.monotonic()
    evaluation = _evaluate(loaded, sets)
    seconds = time.monotonic() - started
    print(one_line(f"model          {loaded.source}"))
    for name, own in (evaluation.sets or {"": evaluation}).items():
        text = data.validation_sets.get(name, f"the held-out part of {data.train}")
        shown = f"{name}: {text}" if name else text
        print(one_line(f"text           {shown}, tokenizer {os.path.basename(loaded.tokenizer.name)}"))
        for line in _lines(own):
            print(line)
    if evaluation.sets:
        print(f"mean           {evaluation.loss:.4f} nats per token, {evaluation.bits_per_byte:.4f} bits per byte")
    print(f"time           {seconds:.1f} s, including compilation")
    return DONE


def _sets(command: Command, loaded: LoadedModel) -> dict[str, ValidationBatches]:
    """Return the batches of each validation set, keyed by set name."""
    from sophia_levanter.config.data import validation_field
    from sophia_levanter.data.corpora import masked_end, prepare_validation

    data = loaded.config.data
    if data.validation is None and loaded.step is None:
        raise InputError(
            f"--data.validation TEXT is missing: {loaded.source} is not a run directory, so it has no validation text"
        )
    sets = prepare_validation(data, loaded.tokenizer, tell)
    for name, tokens in sets.items():  # raises an error for tokens without documents
        masked_end(data, loaded.tokenizer, validation_field(name), tokens)
    return {name: _batches(command, loaded, name, tokens) for name, tokens in sets.items()}


def _batches(command: Command, loaded: LoadedModel, name: str, tokens: Tokens) -> ValidationBatches:
    from sophia_levanter.data.batches import ValidationBatches

    shards = loaded.partition.row_shards
    # Do not make a batch larger than the text, to save memory.
    sequences = max(1, -(-(tokens.num_tokens - 1) // loaded.config.model.seq_len))
    wanted = min(command.batch_size or WINDOWS_PER_DEVICE * shards, command.sequences or sequences, sequences)
    return ValidationBatches(
        tokens,
        seq_len=loaded.config.model.seq_len,
        batch_size=-(-wanted // shards) * shards,
        max_sequences=command.sequences,
        name=name,
    )


def _score(loaded: LoadedModel, task: str, items: Sequence[Item]) -> Iterator[str]:
    from sophia_levanter.training.tasks import TaskScorer

    scorer = TaskScorer(loaded.tokenizer, loaded.partition, loaded.policy)
    result = scorer(items, loaded.model)
    yield f"model          {loaded.source}"
    yield f"task           {task}"
    for name, share in (("accuracy", result.accuracy), ("normalized", result.normalized_accuracy)):
        if share is not None:
            yield f"{name:<14} {share:.4f} ± {result.interval(share):.4f}"
    if result.perplexity is not None:
        yield f"perplexity     {result.perplexity:,.2f}"


def _evaluate(loaded: LoadedModel, sets: Mapping[str, ValidationBatches]) -> Evaluation:
    from sophia_levanter.data.tokenizer import token_byte_lengths
    from sophia_levanter.training.evaluation import Evaluator, evaluate_sets

    lengths, partition, policy = token_byte_lengths(loaded.tokenizer), loaded.partition, loaded.policy
    end = loaded.tokenizer.end_of_text if loaded.config.data.mask_documents else None
    evaluators = {name: Evaluator(batches, lengths, partition, policy, end) for name, batches in sets.items()}
    return evaluate_sets(evaluators, loaded.model, _progress(sum(map(len, sets.values()))))


def _progress(total: int) -> Callable[[], None]:
    """Return a function to call after each batch. It reports progress at most every `REPORT_SECONDS` seconds."""
    done, next_report = 0, time.monotonic() + REPORT_SECONDS

    def advance() -> None:
        nonlocal done, next_report
        done += 1
        if time.monotonic() >= next_report and done < total:
            print(f"{done:,} of {total:,} batches", file=sys.stderr, flush=True)
            next_report = time.monotonic() + REPORT_SECONDS

    return advance


def _lines(evaluation: Evaluation) -> Iterator[str]:
    import numpy as np

    yield f"loss           {evaluation.loss:.4f} nats per token"
    with np.errstate(over="ignore"):
        yield f"perplexity     {np.exp(evaluation.loss):,.2f}"
    yield f"bits per byte  {evaluation.bits_per_byte:.4f}"
    yield f"tokens         {evaluation.tokens:,} for {evaluation.text_bytes:,} bytes of text"


if __name__ == "__main__":
    sys.exit(main())
