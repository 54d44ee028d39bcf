"""Whether the losses of runs can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sophia_levanter.reporting.runs import Run


@dataclass(frozen=True)
class Comparability:
    """What the losses of some runs allow.

    Attributes:
        same_tokenizer: whether a token is the same thing in all of them.
        same_text: whether they are validated on the same text.
        notes: what a reader must know, a line each.
    """

    same_tokenizer: bool
    same_text: bool
    notes: list[str]


def compare(runs: Sequence[Run]) -> Comparability:
    """What the losses of runs allow; each is held against the first."""
    first, *others = runs
    same_tokenizer = all(_same_tokenizer(first, run) for run in others)
    same_text = all(_same_text(first, run) for run in others)
    return Comparability(same_tokenizer, same_text, list(_notes(runs, same_tokenizer, same_text)))


def _notes(runs: Sequence[Run], same_tokenizer: bool, same_text: bool) -> Iterator[str]:
    if not same_tokenizer:
        yield (
            "The runs have different tokenizers: losses per token cannot be compared, and validation is shown in bits "
            "per byte of text."
        )
    if not same_text:
        yield (
            "The runs are validated on different texts: not even their bits per byte compare exactly, and no value is "
            "marked as the best."
        )
    elif len({(run.config.trainer.evaluation_windows, run.config.model.seq_len) for run in runs}) > 1:
        yield (
            "The runs are validated on different windows of the text (trainer.evaluation_windows, model.seq_len): "
            "small differences between their losses may come from that."
        )
    for run in runs:
        if run.vocab_size is None:
            yield (
                f"{run.name}: its tokenizer {run.config.data.tokenizer} cannot be loaded and no checkpoint can be "
                "read, so its parameters and FLOPs are not known."
            )
        if "damaged" in run.checkpoint:
            yield f"{run.name}: damaged checkpoints: {run.checkpoint}."


def _same_tokenizer(a: Run, b: Run) -> bool:
    mine, other = (_facts(run).get("tokenizer") for run in (a, b))
    if mine is None or other is None:
        return a.config.data.tokenizer == b.config.data.tokenizer
    return mine == other


def _same_text(a: Run, b: Run) -> bool:
    mine, other = _facts(a), _facts(b)
    if mine and other and mine.get("tokenizer") == other.get("tokenizer"):
        return mine == other
    if mine and other and mine.get("documents") != other.get("documents"):
        return False
    return _source(a) == _source(b)


def _facts(run: Run) -> dict[str, Any]:
    return run.facts.get("validation", {})


def _source(run: Run) -> tuple[object, ...]:
    data = run.config.data
    return (data.validation,) if data.validation is not None else (data.train, data.validation_fraction)
