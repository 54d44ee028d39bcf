"""Token stores in a bucket, by tensorstore's own client and a server that answers as Google's does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from sophia_levanter.data.token_store import TokenStore


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """The address of a server whose one bucket has the files below `tmp_path`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = urlsplit(self.path).path.removeprefix("/storage/v1/b/bucket/o/")
            file = tmp_path / unquote(name)
            if not file.is_file():
                self._answer(404, b"")
                return
            content = file.read_bytes()
            wanted = self.headers.get("Range")
            if wanted is None:
                self._answer(200, content)
                return
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(content) - int(last)
            part = content[start : int(last) + 1] if first and last else content[start:]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
            self._end(part)

        def _answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self._end(content)

        def _end(self, content: bytes) -> None:
            self.send_header("Content-Length", str(len(content)))
            self.send_header("x-goog-generation", "1")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def inspect(bucket: str, location: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sophia_levanter.commands.inspect_data", location, "--verify"]
    environment = os.environ | {"TENSORSTORE_GCS_HTTP_URL": bucket}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def last_line(text: str) -> str:
    """Above it tensorstore says that it looked for credentials."""
    return text.splitlines()[-1]


def test_a_store_in_a_bucket(make_store: Callable[..., TokenStore], bucket: str) -> None:
    store = make_store(["first document", "second document"])
    result = inspect(bucket, f"gs://bucket/{store.path.name}")
    assert result.returncode == 0, result.stderr
    assert "verified" in result.stdout
    assert "second document" in result.stdout

    shard = store.path / "tokens" / "c" / "0"
    content = bytearray(shard.read_bytes())
    content[9] ^= 4
    shard.write_bytes(content)
    result = inspect(bucket, f"gs://bucket/{store.path.name}")
    assert result.returncode == 2
    assert f"error: gs://bucket/{store.path.name}: the token store is damaged" in last_line(result.stderr)


def test_no_store_in_a_bucket(bucket: str) -> None:
    result = inspect(bucket, "gs://bucket/nothing")
    assert result.returncode == 2
    assert last_line(result.stderr) == "error: gs://bucket/nothing: no finished token store is there (no manifest.json)"
