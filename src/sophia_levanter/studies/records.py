"""`study.json`: what the runs of a study gave. The file accumulates; a run that is in it is not done again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.build import flat, schema
from sophia_levanter.config.command_line import build_config
from sophia_levanter.config.files import Setting
from sophia_levanter.config.run import TrackingConfig
from sophia_levanter.errors import InputError
from sophia_levanter.files import read_regular

# Where a run's files lie, and how often it says or saves something, makes it no other run.
_NO_MATTER = (
    "data.train",
    "data.validation",
    "data.cache_dir",
    "data.num_workers",
    "trainer.run_dir",
    "trainer.checkpoint_every",
    "trainer.checkpoint_minutes",
    "trainer.checkpoint_dir",
    "trainer.keep_checkpoints",
    "trainer.keep_every",
    "trainer.keep_best",
    "trainer.best_by",
    "trainer.tasks",
    "trainer.tasks_every",
    "trainer.cast_checkpoint",
    "trainer.step_timeout",
    "trainer.log_every",
    "trainer.profile_steps",
    "trainer.sample_tokens",
    "trainer.evaluate_every",
    *(f"tracking.{field.name}" for field in dataclasses.fields(TrackingConfig)),
)
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """One run that was started.

    Attributes:
        config: its configuration by dotted field names, without those that make no difference.
        status: "done"; or "diverged", if it was stopped for a loss that went up or was not finite.
        loss: validation loss at the end of the schedule, in nats per token; None if it diverged.
        bits_per_byte: the same in bits per byte of text; None if it diverged.
        validation: [steps done, validation loss].
        training: [steps done, mean training loss over the steps since the last entry].
        win_rate: [steps done, share of coordinates with an unclipped step, or None]; empty without curvature.
        seconds: median time of a step without a refresh and of one with it (None without curvature).
        parameters: of the model, the padding of the vocabulary included; 0 in older records of runs that diverged
            before their first checkpoint.
        flops_per_token: of forward and backward.
        facts: data and environment, as in the run's checkpoints if it has any, and the package's version; with
            `shared_steps`, how many steps of a shorter run it began with, where it did.
    """

    config: dict[str, Any]
    status: str
    loss: float | None
    bits_per_byte: float | None
    validation: list[list[float | None]]
    training: list[list[float | None]]
    win_rate: list[list[float | None]]
    seconds: list[float | None]
    parameters: int
    flops_per_token: float
    facts: dict[str, Any]


def flat_config(config: TrainConfig) -> dict[str, Any]:
    """The fields that make a run what it is, by dotted names."""
    matter = {name: value for name, value in flat(config).items() if name not in _NO_MATTER}
    return {name: value for name, value in matter.items() if not name.startswith("data.validation.")}  # named sets


def config_of(record: Record) -> TrainConfig:
    """The configuration of a record; what makes no difference to a run has its default."""
    return build_config([{name: Setting(value, Path("study.json")) for name, value in record.config.items()}])


def find(records: Iterable[Record], config: TrainConfig) -> Record | None:
    """The record of this configuration, if there is one.

    A field that the record's version did not have is at its default. A record with a field that this version does not
    have is of no configuration.
    """
    wanted = flat_config(config)
    defaults = flat_config(TrainConfig(model=type(config.model)(), optimizer=type(config.optimizer)()))
    missing = {name: defaults.get(name) for name in wanted}
    former = schema(TrainConfig).former
    present = ((record, {former.get(k, k): v for k, v in record.config.items()}) for record in records)
    return next((record for record, config in present if missing | config == wanted), None)


def read_records(path: Path) -> list[Record]:
    """The records of a study file; none if it is not there.

    Raises:
        InputError: if the file is not one that `write_records` wrote.
    """
    try:
        tree = json.loads(read_regular(path))
        if tree["format"] != FORMAT:
            raise InputError(f"{path}: its format is {tree['format']}, and this version reads {FORMAT}")
        records = [Record(**fields) for fields in tree["runs"]]
        if not all(isinstance(record.config, dict) for record in records):
            raise TypeError("a run's config is no mapping")
        return records
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: is no record of a study: {error}; move it away to start anew") from None


def write_records(path: Path, name: str, records: Iterable[Record]) -> None:
    """Replaces the file at once, so that a kill leaves the old or the new one."""
    runs = ",\n".join(json.dumps(dataclasses.asdict(record)) for record in records)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(
        f'{{"format": {FORMAT}, "study": {json.dumps(name)}, "runs": [\n{runs}\n]}}\n', encoding="utf-8"
    )
    os.replace(temporary, path)
