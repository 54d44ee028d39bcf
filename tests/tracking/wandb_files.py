"""Reads what wandb writes for `wandb sync`: LevelDB's log of records in blocks, after a header of 7 bytes."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, struct.Struct("<IHB")
FULL, LAST = 1, 4  # kinds of a piece that ends a record


def runs(run_dir: Path) -> list[dict[str, Any]]:
    """What the files in a run directory hold, in their order: run_id, config, x axis, history and exit code."""
    return [_run(file) for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]


def _run(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"config": {}, "history": []}
    for record in _records(file.read_bytes()):
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                found |= {"id": run.run_id, "name": run.display_name, "project": run.project, "group": run.run_group}
            case "config":
                found["config"] |= {item.key: json.loads(item.value_json) for item in record.config.update}
            case "metric":
                found["axis"] = (record.metric.glob_name, record.metric.step_metric)
            case "history":
                found["history"].append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
            case "exit":
                found["exit"] = record.exit.exit_code
    return found


def _records(data: bytes) -> Iterator[Record]:
    position, content = 7, b""
    while position + HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        _, length, kind = HEADER.unpack_from(data, position)
        position += HEADER.size
        content += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(content)
            content = b""
            yield record
