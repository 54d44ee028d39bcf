"""Token stores in a bucket, by tensorstore's own client and a server that answers as Google's does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fake_gcs import FakeGcs, serving
from sophia_levanter.data.token_store import TokenStore


@pytest.fixture
def bucket() -> Iterator[FakeGcs]:
    with serving(FakeGcs()) as server:
        yield server


def upload(folder: Path, bucket: FakeGcs) -> None:
    files = (path for path in folder.rglob("*") if path.is_file())
    bucket.objects |= {str(path.relative_to(folder.parent)): (1, path.read_bytes()) for path in files}


def inspect(bucket: FakeGcs, location: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sophia_levanter.commands.inspect_data", location, "--verify"]
    environment = os.environ | {"TENSORSTORE_GCS_HTTP_URL": bucket.address}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def last_line(text: str) -> str:
    """Above it tensorstore says that it looked for credentials."""
    return text.splitlines()[-1]


def test_a_store_in_a_bucket(make_store: Callable[..., TokenStore], bucket: FakeGcs) -> None:
    store = make_store(["first document", "second document"])
    upload(store.path, bucket)
    result = inspect(bucket, f"gs://bucket/{store.path.name}")
    assert result.returncode == 0, result.stderr
    assert "verified" in result.stdout
    assert "second document" in result.stdout

    shard = store.path / "tokens" / "c" / "0"
    content = bytearray(shard.read_bytes())
    content[9] ^= 4
    shard.write_bytes(content)
    upload(store.path, bucket)
    result = inspect(bucket, f"gs://bucket/{store.path.name}")
    assert result.returncode == 2
    assert f"error: gs://bucket/{store.path.name}: the token store is damaged" in last_line(result.stderr)


def test_no_store_in_a_bucket(bucket: FakeGcs) -> None:
    result = inspect(bucket, "gs://bucket/nothing")
    assert result.returncode == 2
    assert last_line(result.stderr) == "error: gs://bucket/nothing: no finished token store is there (no manifest.json)"
