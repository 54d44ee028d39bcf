"""Check whether the losses of runs are comparable, and list the runs' configurations, data and machines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sophia_levanter.config.build import flat
from sophia_levanter.studies.runs import Run

NOTHING = "–"
Row = tuple[str, list[str]]
# This field differs in every run, so it is listed in `facts` instead.
RUN_DIR = "trainer.run_dir"


@dataclass(frozen=True)
class Comparability:
    """The extent to which the losses of several runs are comparable.

    Attributes:
        same_tokenizer: whether all runs use the same tokenizer.
        same_text: whether all runs are validated on the same text.
        notes: notes for the reader of the report, one line each.
    """

    same_tokenizer: bool
    same_text: bool
    notes: list[str]


def compare(runs: Sequence[Run]) -> Comparability:
    """Determine the extent to which the losses of runs are comparable. Each run is compared with the first."""
    first, *others = runs
    same_tokenizer = all(_same_tokenizer(first, run) for run in others)
    same_text = all(_same_text(first, run) for run in others)
    return Comparability(same_tokenizer, same_text, list(_notes(runs, same_tokenizer, same_text)))


def _notes(runs: Sequence[Run], same_tokenizer: bool, same_text: bool) -> Iterator[str]:
    if not same_tokenizer:
        yield (
            "The runs use different tokenizers. Losses per token cannot be compared, so validation losses are shown in "
            "bits per byte of text."
        )
    if not same_text:
        yield (
            "The runs use different validation texts. Even bits per byte are not exactly comparable, so no value is "
            "marked as the best."
        )
    elif len({_sequences(run) for run in runs}) > 1:
        yield (
            "The runs are validated on different sequences from the text, or with different masks "
            "(trainer.evaluation_windows, model.seq_len, data.mask_documents). This can explain small differences "
            "between their losses."
        )
    for run in runs:
        if run.parameters is None:
            yield (
                f"{run.name}: tokenizer {run.config.data.tokenizer} cannot be loaded and no checkpoint can be "
                "read, so its parameter count and FLOPs are unknown."
            )
        if run.has_damaged_checkpoint:
            yield f"{run.name} has damaged checkpoints: {run.checkpoint}."


def _sequences(run: Run) -> tuple[object, ...]:
    """Return the settings that determine which tokens are evaluated, and with how much context."""
    return run.config.trainer.evaluation_windows, run.config.model.seq_len, run.config.data.mask_documents


def _same_tokenizer(a: Run, b: Run) -> bool:
    mine, other = (_facts(run).get("tokenizer") for run in (a, b))
    if mine is None or other is None:
        return a.config.data.tokenizer == b.config.data.tokenizer
    return mine == other


def _same_text(a: Run, b: Run) -> bool:
    mine, other = _facts(a), _facts(b)
    if mine and other and mine.get("tokenizer") == other.get("tokenizer"):
        return mine == other
    if mine and other and _documents(mine) != _documents(other):
        return False
    return _source(a) == _source(b)


def _documents(facts: dict[str, Any]) -> list[tuple[Any, Any]]:
    """List each validation set's name and document count. Neither depends on the tokenizer."""
    return [(part.get("name"), part.get("documents")) for part in facts.get("sets", [facts])]


def _facts(run: Run) -> dict[str, Any]:
    return run.facts.get("validation", {})


def _source(run: Run) -> tuple[object, ...]:
    data = run.config.data
    return (data.validation,) if data.validation is not None else (data.train, data.validation_fraction)


def configurations(runs: Sequence[Run]) -> tuple[list[Row], list[Row]]:
    """Return the fields that differ between runs, and the fields that are the same, with the values in each run.

    Among the differing fields, those that differ only because they are missing in some runs come last.
    """
    configs = [flat(run.config) for run in runs]
    names = [name for name in dict.fromkeys(name for fields in configs for name in fields) if name != RUN_DIR]
    rows = [(name, [_shown(fields[name]) if name in fields else NOTHING for fields in configs]) for name in names]
    differing = [row for row in rows if len(set(row[1])) > 1]
    differing.sort(key=lambda row: len({*row[1]} - {NOTHING}) == 1)
    return differing, [row for row in rows if row not in differing]


def facts(runs: Sequence[Run]) -> list[Row]:
    """List the directory, checkpoint, data, tokenizer and machine of each run."""
    return [
        ("run directory", [str(run.path) for run in runs]),
        ("checkpoint", [run.checkpoint for run in runs]),
        ("training text", [_shown(run.config.data.train) for run in runs]),
        ("training digest", [_digest(run.facts.get("data")) for run in runs]),
        ("training tokens", [_tokens(run.facts.get("data")) for run in runs]),
        ("validation text", [_validation(run) for run in runs]),
        ("validation digest", [_digest(run.facts.get("validation")) for run in runs]),
        ("validation tokens", [_tokens(run.facts.get("validation")) for run in runs]),
        ("tokenizer", [run.config.data.tokenizer for run in runs]),
        ("device", [_device(run.facts.get("environment", {})) for run in runs]),
        ("jax", [str(run.facts.get("environment", {}).get("jax", NOTHING)) for run in runs]),
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _validation(run: Run) -> str:
    data = run.config.data
    shown = ", ".join(f"{name}: {source}" if name else source for name, source in data.validation_sets.items())
    return shown or f"{100 * data.validation_fraction:.3g}% of the training documents"


def _digest(corpus: Mapping[str, Any] | None) -> str:
    if not corpus:
        return NOTHING
    parts = _parts(corpus)
    return str(corpus.get("digest")) if parts is None else ", ".join(map(_digest, parts))


def _parts(corpus: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """Return the parts of a mixture or of a group of validation sets, or None for a single corpus.

    Invalid values are tolerated, because checkpoints from other programs may contain anything here.
    """
    parts = corpus.get("mixture", corpus.get("sets"))
    if parts is None:
        return None
    return [part for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []


def _tokens(corpus: Mapping[str, Any] | None) -> str:
    if not corpus:
        return NOTHING
    parts = _parts(corpus)
    if parts is not None:
        return ", ".join(map(_tokens, parts))
    tokens = corpus.get("tokens")
    return f"{tokens:,}" if isinstance(tokens, int) else NOTHING


def _device(environment: Mapping[str, Any]) -> str:
    if "device" not in environment:
        return NOTHING
    threads = f", {environment.get('cpu_threads')} threads" if environment["device"] == "cpu" else ""
    return f"{environment.get('device_count')} × {environment['device']}{threads}"
