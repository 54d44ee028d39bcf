"""As much of wandb's server as a run needs to be online, and what wandb writes for `wandb sync` where it is not."""

import gzip
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

PROJECT = {"id": "1", "name": "a project", "entity": {"id": "2", "name": "somebody"}}
BLOCK, HEADER = 32768, struct.Struct("<IHB")
FULL, LAST = 1, 4  # kinds of a piece that ends a record


class FakeWandb(ThreadingHTTPServer):
    """Takes one run; what is uploaded of its history is in `losses`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.losses: dict[int, float] = {}
        self.run_ids: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        name, variables = query["operationName"], query["variables"]
        if name == "RunResumeStatus":
            return {"model": {**PROJECT, "bucket": None}}
        if name == "UpsertBucket":
            run = {"id": "3", "name": variables["name"], "displayName": variables["displayName"], "project": PROJECT}
            self.run_ids.add(variables["name"])
            return {"upsertBucket": {"bucket": run, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": files}}
        return {}

    def take(self, stream: dict[str, Any]) -> None:
        for line in stream.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            row = json.loads(line)
            self.losses[row["step"]] = row["train/loss"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that are cut at the end are no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeWandb

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = json.loads(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
        answer: dict[str, Any] = {}
        if "graphql" in self.path:
            answer = {"data": self.server.answer(content)}
        else:
            self.server.take(content)
        self._say(answer)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._say({})

    def _say(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def fake_wandb() -> Iterator[FakeWandb]:
    """One that answers at its `url` until the end of the block, or until it is shut down."""
    with FakeWandb() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def offline_runs(run_dir: Path) -> list[dict[str, Any]]:
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
    """Those of LevelDB's log, in blocks after a header of 7 bytes."""
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
