"""`study.json`: the results of the runs in a study. Results accumulate, and recorded runs are not trained again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.build import flat, schema
from sophia_levanter.config.command_line import build_config
from sophia_levanter.config.files import Setting
from sophia_levanter.errors import InputError
from sophia_levanter.files import read_regular, write_atomically
from sophia_levanter.run.directory import MAY_DIFFER

# Fields that do not affect the result of a run. Digests identify the texts, and the optimizer's type its plug-in.
_NO_MATTER = {*MAY_DIFFER, "data.train", "data.validation", "trainer.evaluate_every", "trainer.sample_tokens"}
_NO_MATTER -= {"trainer.num_train_steps"}
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """The result of one run.

    Attributes:
        config: the configuration, keyed by dotted field name, without fields that do not affect the result.
        status: "done", or "diverged" if the run was stopped because its loss rose or was not finite.
        loss: validation loss at the end of the schedule, in nats per token; None if the run diverged.
        bits_per_byte: the same loss in bits per byte of text; None if the run diverged.
        validation: entries [steps done, validation loss].
        training: entries [steps done, mean training loss over the steps since the previous entry].
        win_rate: entries [steps done, fraction of unclipped coordinates, or None]; empty without curvature.
        seconds: median duration of a step without a refresh and of a step with a refresh (None without curvature).
        parameters: number of parameters, including vocabulary padding; 0 in older records of runs that diverged before
            their first checkpoint.
        flops_per_token: FLOPs per token for the forward and backward pass.
        facts: metadata about the data and environment from the run's checkpoints, if it has any, and the version of the
            package. `shared_steps` is the number of steps reused from a shorter run, if any.
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
    """Return the fields that affect the result of a run, and the plug-ins, keyed by dotted name."""
    fields = flat(config)
    return _that_matter(fields) | {"plugins": fields["plugins"]}


def _that_matter(fields: dict[str, Any]) -> dict[str, Any]:
    named_sets = "data.validation."
    return {name: x for name, x in fields.items() if name not in _NO_MATTER and not name.startswith(named_sets)}


def config_of(record: Record) -> TrainConfig:
    """Return the configuration of a record. Fields that do not affect the result have their default values."""
    return build_config([{name: Setting(value, Path("study.json")) for name, value in record.config.items()}])


def find(records: Iterable[Record], config: TrainConfig) -> Record | None:
    """Return the record for a configuration, or None if no record matches.

    Fields that did not exist in the version that wrote a record are assumed to have their default values. A record with
    a field that does not exist in this version does not match any configuration.
    """
    wanted = _that_matter(flat(config))
    defaults = flat_config(TrainConfig(model=type(config.model)(), optimizer=type(config.optimizer)()))
    missing = {name: defaults.get(name) for name in wanted}
    former = schema(TrainConfig).former
    present = ((record, _that_matter({former.get(k, k): v for k, v in record.config.items()})) for record in records)
    return next((record for record, config in present if missing | config == wanted), None)


def read_records(path: Path) -> list[Record]:
    """Read the records in a study file. Return an empty list if the file does not exist.

    Raises:
        InputError: if the file was not written by `write_records`.
    """
    try:
        tree = json.loads(read_regular(path))
        if tree["format"] != FORMAT:
            raise InputError(f"{path} has format {tree['format']}, but this version reads format {FORMAT}")
        records = [Record(**fields) for fields in tree["runs"]]
        if not all(isinstance(record.config, dict) for record in records):
            raise TypeError("a run's config is not a mapping")
        return records
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a valid study record: {error}; move it elsewhere to start over") from None


def write_records(path: Path, name: str, records: Iterable[Record]) -> None:
    """Write the records to a study file, replacing it atomically."""
    runs = ",\n".join(json.dumps(dataclasses.asdict(record)) for record in records)
    text = f'{{"format": {FORMAT}, "study": {json.dumps(name)}, "runs": [\n{runs}\n]}}\n'
    write_atomically(path, text.encode())
