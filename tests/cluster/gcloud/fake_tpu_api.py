"""A server that answers gcloud as Google's TPU API does, as far as queued resources and their nodes go."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

PROJECT, ZONE = "test-project", "us-central2-b"
STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    429: "RESOURCE_EXHAUSTED",
}


@dataclass
class FakeTpuApi:
    """One zone.

    Attributes:
        hosts: of each node.
        states: of a queued resource after its creation, one for each time it is described; the last one stays.
        queued: those that there are: their JSON, as it was sent, by name.
        scripts: states that they still go through.
        nodes: state, and health, of nodes that are not READY and HEALTHY.
        refusals: what the next creations are answered: a status and a message.
        created_anyway: whether a creation that is refused with 409 has taken place, its first answer having been lost.
        requests: method, path and body of all that was asked.
        deletions: describing says DELETING that many times before it is gone.
        metadata: of all nodes.
    """

    hosts: int = 4
    states: list[str] = field(default_factory=lambda: ["ACTIVE"])
    queued: dict[str, dict[str, Any]] = field(default_factory=dict)
    scripts: dict[str, list[str]] = field(default_factory=dict)
    nodes: dict[str, tuple[str, str]] = field(default_factory=dict)
    refusals: list[tuple[int, str]] = field(default_factory=list)
    created_anyway: bool = False
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    deletions: int = 1
    metadata: dict[str, str] = field(default_factory=dict)
    address: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, body: dict[str, Any], states: list[str]) -> None:
        """A queued resource that is there."""
        self.queued[name] = body
        self.scripts[name] = list(states)

    def bodies(self, method: str, what: str) -> list[Any]:
        """Of the requests of a method whose path contains some text."""
        return [body for asked, path, body in self.requests if asked == method and what in path]

    def environment(self, folder: Path) -> dict[str, str]:
        """That makes gcloud talk to this server and leave no trace outside of a folder."""
        return {
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CORE_PROJECT": PROJECT,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{self.address}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{self.address}/compute/v1/",
            "CLOUDSDK_CONFIG": str(folder / "gcloud"),
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
            "CLOUDSDK_PYTHON_SITEPACKAGES": "0",
            "HOME": str(folder),
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        """What is answered to a request: a status and JSON."""
        words = path.strip("/").split("/")
        if words[0] == "compute":
            return 200, {"name": PROJECT, "commonInstanceMetadata": {"items": []}}
        collection, name = words[5], words[6].partition(":")[0] if len(words) > 6 else query.get("queuedResourceId", "")
        if collection == "operations":
            return 200, {
                "name": name,
                "done": True,
                "response": {"name": f"projects/{PROJECT}/locations/{ZONE}/nodes/{name}"},
            }
        if collection == "nodes":
            return self._node(method, name, path, body)
        if method == "POST":
            return self._create(name, body)
        if method == "DELETE":
            return self._delete(name)
        if name:
            return self._describe(name)
        return 200, {"queuedResources": [self._shown(name, self.scripts[name][0]) for name in self.queued]}

    def _create(self, name: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.refusals:
            status, message = self.refusals.pop(0)
            if status == 409 and self.created_anyway:
                self.add(name, body, self.states)
            return _error(status, message)
        if name in self.queued:
            return _error(409, f"Resource '{name}' already exists")
        self.add(name, body, self.states)
        return 200, _operation("create")

    def _delete(self, name: str) -> tuple[int, Any]:
        if name not in self.queued:
            return _error(404, f"Resource '{name}' was not found")
        self.scripts[name] = ["DELETING"] * self.deletions + ["GONE"]
        return 200, _operation("delete")

    def _describe(self, name: str) -> tuple[int, Any]:
        if name in self.queued:
            script = self.scripts[name]
            state = script.pop(0) if len(script) > 1 else script[0]
            if state != "GONE":
                return 200, self._shown(name, state)
            del self.queued[name], self.scripts[name]
            self.nodes.clear()
        return _error(404, f"Resource 'projects/{PROJECT}/locations/{ZONE}/queuedResources/{name}' was not found")

    def _shown(self, name: str, state: str) -> dict[str, Any]:
        there = {"name": f"projects/{PROJECT}/locations/{ZONE}/queuedResources/{name}", "state": {"state": state}}
        return self.queued[name] | there

    def _node(self, method: str, name: str, path: str, body: Any) -> tuple[int, Any]:
        if path.endswith(":getGuestAttributes"):
            names = [{"queryValue": {"items": [{"key": "hostname", "value": f"host-{i}"}]}} for i in range(self.hosts)]
            return 200, {"guestAttributes": names}
        if method == "PATCH":  # gcloud's ssh key
            self.metadata |= body["metadata"]
            return 200, _operation(name)
        state, health = self.nodes.get(name, ("READY", "HEALTHY"))
        if state == "GONE":
            return _error(404, f"Resource '{name}' was not found")
        slice_id = int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdecimal() else 0
        endpoints = [
            {"ipAddress": f"10.0.{slice_id}.{i}", "accessConfig": {"externalIp": f"192.0.2.{16 * slice_id + i}"}}
            for i in range(self.hosts)
        ]
        return 200, {
            "name": f"projects/{PROJECT}/locations/{ZONE}/nodes/{name}",
            "apiVersion": "V2",
            "id": "1",
            "state": state,
            "health": health,
            "metadata": self.metadata,
            "networkEndpoints": endpoints,
        }


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"code": status, "message": message, "status": STATUSES[status]}}


def _operation(what: str) -> dict[str, Any]:
    return {"name": f"projects/{PROJECT}/locations/{ZONE}/operations/{what}", "done": False}


@contextmanager
def serving(api: FakeTpuApi) -> Iterator[FakeTpuApi]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(text) if text else None
            parts = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            with api.lock:
                api.requests.append((self.command, self.path, body))
                status, answer = api.answer(self.command, parts.path, query, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = do_PATCH = _serve

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        api.address = f"http://127.0.0.1:{server.server_port}"
        yield api
        server.shutdown()


def hosts_of_this_machine(folder: Path) -> None:
    """Puts an `ssh` and a `scp` first on the PATH of `environment`: each address is a home folder on this machine."""
    (folder / "bin").mkdir(parents=True)
    ssh = 'while [ "$1" != -- ]; do host="${1#*@}"; shift; done; shift; mkdir -p "$HOSTS/$host"; cd "$HOSTS/$host"\n'
    ssh += 'echo "$*" >> "$HOSTS/ssh.log"; HOME="$PWD" exec bash -c "$*"\n'
    scp = 'to="${@: -1}"; host="${to%%:*}"; host="$HOSTS/${host#*@}"; mkdir -p "$host"\n'
    scp += 'while [ $# -gt 1 ]; do case "$1" in -[oiFP]) shift 2;; -*) shift;; *) files+=("$1"); shift;; esac; done\n'
    scp += 'cp "${files[@]}" "$host/${to#*:}"\n'
    for name, script in (("ssh", ssh), ("scp", scp)):
        file = folder / "bin" / name
        file.write_text(f"#!/bin/bash\nHOSTS={folder / 'hosts'}\n{script}")
        file.chmod(0o755)
