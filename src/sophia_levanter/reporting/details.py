"""What the runs are: their configurations beside each other, and their text and machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sophia_levanter.config.build import flat
from sophia_levanter.reporting.headline import NOTHING
from sophia_levanter.reporting.runs import Run

Row = tuple[str, list[str]]
# Every run has its own, and it stands among the facts.
RUN_DIR = "trainer.run_dir"


def configurations(runs: Sequence[Run]) -> tuple[list[Row], list[Row]]:
    """The fields in which runs differ, those that some of them lack last, and the others; with their values in each."""
    configs = [flat(run.config) for run in runs]
    names = [name for name in dict.fromkeys(name for fields in configs for name in fields) if name != RUN_DIR]
    rows = [(name, [_shown(fields[name]) if name in fields else NOTHING for fields in configs]) for name in names]
    differing = [row for row in rows if len(set(row[1])) > 1]
    differing.sort(key=lambda row: len({*row[1]} - {NOTHING}) == 1)
    return differing, [row for row in rows if row not in differing]


def facts(runs: Sequence[Run]) -> list[Row]:
    """Where the runs lie, their text and their machines."""
    rows: dict[str, list[str]] = {
        "run directory": [str(run.path) for run in runs],
        "checkpoint that this is from": [run.checkpoint for run in runs],
        "training text": [_shown(run.config.data.train) for run in runs],
        "its digest": [_digest(run.facts.get("data")) for run in runs],
        "its tokens": [_tokens(run.facts.get("data")) for run in runs],
        "validation text": [_validation(run) for run in runs],
        "its digest ": [_digest(run.facts.get("validation")) for run in runs],
        "its tokens ": [_tokens(run.facts.get("validation")) for run in runs],
        "tokenizer": [run.config.data.tokenizer for run in runs],
        "device": [_device(run.facts.get("environment", {})) for run in runs],
        "jax": [str(run.facts.get("environment", {}).get("jax", NOTHING)) for run in runs],
    }
    return [(name.strip(), values) for name, values in rows.items()]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _validation(run: Run) -> str:
    data = run.config.data
    return data.validation or f"{data.validation_fraction:.3g} of the training text's documents"


def _digest(corpus: Mapping[str, Any] | None) -> str:
    if not corpus:
        return NOTHING
    return ", ".join(_digest(part) for part in _parts(corpus)) if "mixture" in corpus else str(corpus.get("digest"))


def _parts(corpus: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The texts of a mixture, as far as another program's checkpoint may have some."""
    parts = corpus["mixture"]
    return [part for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []


def _tokens(corpus: Mapping[str, Any] | None) -> str:
    if not corpus:
        return NOTHING
    if "mixture" in corpus:
        return ", ".join(_tokens(part) for part in _parts(corpus))
    tokens = corpus.get("tokens")
    return f"{tokens:,}" if isinstance(tokens, int) else NOTHING


def _device(environment: Mapping[str, Any]) -> str:
    if "device" not in environment:
        return NOTHING
    threads = f", {environment.get('cpu_threads')} threads" if environment["device"] == "cpu" else ""
    return f"{environment.get('device_count')} × {environment['device']}{threads}"
