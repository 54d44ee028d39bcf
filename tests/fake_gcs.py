"""A server that answers as Google's object storage does to tensorstore's client, preconditions included."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 50  # names in an answer to a listing; Google's has 1,000


@dataclass
class FakeGcs:
    """One bucket.

    Attributes:
        objects: generation and content by name.
        refused: names of objects that contain this cannot be written, as when a quota is used up.
    """

    objects: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    refused: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    generations: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    address: str = ""


@contextmanager
def serving(bucket: FakeGcs) -> Iterator[FakeGcs]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name, query = self._asked()
            with bucket.lock:
                if name is None:
                    self._list(query)
                    return
                generation, content = bucket.objects.get(name, (0, b""))
            if not generation:
                self._answer(404)
            elif query.get("ifGenerationNotMatch") == str(generation):
                self._answer(304)
            elif self.headers.get("Range") is None:
                self._answer(200, content, generation)
            else:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                start = int(first) if first else len(content) - int(last)
                part = content[start : int(last) + 1] if first and last else content[start:]
                self._answer(206, part, generation, f"bytes {start}-{start + len(part) - 1}/{len(content)}")

        def do_POST(self) -> None:
            _, query = self._asked()
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            name = query["name"]
            with bucket.lock:
                there = bucket.objects.get(name, (0, b""))[0]
                if bucket.refused is not None and bucket.refused in name:
                    self._answer(403, b"the quota is used up")
                elif query.get("ifGenerationMatch", str(there)) != str(there):
                    self._answer(412)
                else:
                    bucket.objects[name] = (next(bucket.generations), content)
                    self._answer(200, json.dumps({"name": name, "generation": str(bucket.objects[name][0])}).encode())

        def do_DELETE(self) -> None:
            name, query = self._asked()
            with bucket.lock:
                there = bucket.objects.get(name or "", (0, b""))[0]
                if query.get("ifGenerationMatch", str(there)) != str(there):
                    self._answer(412)
                else:
                    self._answer(204 if bucket.objects.pop(name or "", None) else 404)

        def _list(self, query: dict[str, str]) -> None:
            names = sorted(name for name in bucket.objects if name.startswith(query.get("prefix", "")))
            start = max(query.get("startOffset", ""), query.get("pageToken", ""))
            names = [
                name for name in names if name >= start and not ("endOffset" in query and name >= query["endOffset"])
            ]
            answer: dict[str, object] = {"items": [{"name": name, "size": "0"} for name in names[:PAGE]]}
            if len(names) > PAGE:
                answer["nextPageToken"] = names[PAGE]
            self._answer(200, json.dumps(answer).encode())

        def _asked(self) -> tuple[str | None, dict[str, str]]:
            parts = urlsplit(self.path)
            name = unquote(parts.path.removeprefix("/storage/v1/b/bucket/o")).removeprefix("/")
            return name or None, {key: values[0] for key, values in parse_qs(parts.query).items()}

        def _answer(self, status: int, content: bytes = b"", generation: int = 0, part: str | None = None) -> None:
            self.send_response(status)
            if part is not None:
                self.send_header("Content-Range", part)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("x-goog-generation", str(generation))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        bucket.address = f"http://127.0.0.1:{server.server_port}"
        yield bucket
        server.shutdown()
