"""Checkpoints at gs:// and s3://, by tensorstore's own clients and servers that answer as Google's and Amazon's do."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import bits, blank, make_state, silent

from fake_gcs import FakeGcs, serving
from sophia_levanter.checkpoint import CheckpointError, Retention, damage, remove_leftovers, restore, save, steps
from sophia_levanter.checkpoint.storage import BucketStorage
from sophia_levanter.errors import InputError
from sophia_levanter.kvstore import kvstore_spec


class Google:
    url = "gs://bucket/run/checkpoints"

    def __init__(self, server: FakeGcs) -> None:
        self.server = server

    def names(self) -> list[str]:
        return sorted(self.server.objects)

    def get(self, name: str) -> bytes:
        return self.server.objects[name][1]

    def put(self, name: str, content: bytes) -> None:
        self.server.objects[name] = (next(self.server.generations), content)

    def delete(self, name: str) -> None:
        del self.server.objects[name]


class Amazon:
    url = "s3://bucket/run/checkpoints"

    def __init__(self, client: Any) -> None:
        self.client = client

    def names(self) -> list[str]:
        return sorted(found["Key"] for found in self.client.list_objects_v2(Bucket="bucket").get("Contents", []))

    def get(self, name: str) -> bytes:
        return self.client.get_object(Bucket="bucket", Key=name)["Body"].read()

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=name, Body=content)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket="bucket", Key=name)


Bucket = Google | Amazon


@pytest.fixture(scope="module")
def google_server() -> Iterator[FakeGcs]:
    with serving(FakeGcs()) as server:
        yield server


@pytest.fixture(scope="module")
def amazon_client() -> Iterator[Any]:
    """Of a server on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    yield boto3.client("s3", endpoint_url=address, region_name="us-east-1", **KEYS)
    server.stop()


KEYS = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}


@pytest.fixture
def google(google_server: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> Google:
    """An empty bucket, and so the other one."""
    google_server.objects.clear()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", google_server.address)
    return Google(google_server)


@pytest.fixture
def amazon(amazon_client: Any, monkeypatch: pytest.MonkeyPatch) -> Amazon:
    address = amazon_client.meta.endpoint_url
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST"))
    amazon_client.create_bucket(Bucket="bucket")
    variables = {name.upper(): value for name, value in KEYS.items()}
    for name, value in (variables | {"AWS_ENDPOINT_URL": address, "AWS_EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(name, value)
    return Amazon(amazon_client)


@pytest.fixture(params=["google", "amazon"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    return request.getfixturevalue(request.param)


def small(step: int) -> dict[str, jax.Array]:
    return {"scale": jnp.full(4, step, jnp.bfloat16), "bias": step * jnp.arange(6.0).reshape(2, 3)}


def put(bucket: Bucket, step: int, tree: Any = None, *, keep: int = 9) -> str:
    tree = small(step) if tree is None else tree
    return save(bucket.url, step, tree, run_id="run", metadata={"seed": step}, retention=Retention(keep))


def test_what_is_saved_comes_back_and_old_steps_go(bucket: Bucket) -> None:
    assert steps(bucket.url) == []
    for step in (1, 2):
        put(bucket, step, keep=2)
    assert put(bucket, 3, make_state(), keep=2) == f"{bucket.url}/step-00000003"
    assert steps(bucket.url) == [2, 3]
    assert not [name for name in bucket.names() if "step-00000001" in name]
    restored = restore(bucket.url, blank(make_state()), report=silent)
    assert bits(restored.tree) == bits(make_state())
    assert (restored.step, restored.run_id, restored.metadata) == (3, "run", {"seed": 3})
    with pytest.raises(FileExistsError, match="step-00000003 already contains a checkpoint"):
        put(bucket, 3)


def test_a_flipped_bit_and_a_lost_object_are_found(google: Google) -> None:
    put(google, 1)
    rng = random.Random(0)
    names = google.names()
    assert len(names) == 5  # two of each array, and the manifest
    for name in names:
        content = google.get(name)
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        for change in (bytes(flipped), b"", None):
            if change is None:
                google.delete(name)
            else:
                google.put(name, change)
            if not (change is None and name.endswith("manifest.json")):  # then there is no such step
                (line,) = damage(google.url, 1)
                assert name.removeprefix("run/") in line
                with pytest.raises(CheckpointError):
                    restore(google.url, small(0), report=silent)
        google.put(name, content)
    assert damage(google.url, 1) == []


def test_a_damaged_step_is_passed_over_and_can_be_saved_again(bucket: Bucket) -> None:
    put(bucket, 1)
    put(bucket, 2)
    lost = next(name for name in bucket.names() if "step-00000002/arrays-" in name)
    bucket.delete(lost)
    lines: list[str] = []
    assert restore(bucket.url, small(0), report=lines.append).step == 1
    assert len(lines) == 1 and lost.removeprefix("run/") in lines[0]
    put(bucket, 2)
    assert bits(restore(bucket.url, small(0), report=silent).tree) == bits(small(2))
    assert not [name for name in bucket.names() if lost.split("/")[3] in name], "the damaged one's arrays are gone"
    remove_leftovers(bucket.url)
    assert damage(bucket.url, 2) == []


def test_old_arrays_that_cannot_be_deleted_do_not_undo_a_commit(
    google: Google, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(google, 1)
    lost = next(name for name in google.names() if "/arrays-" in name)
    google.delete(lost)
    with monkeypatch.context() as patch:
        patch.setattr(BucketStorage, "_delete_all", refuse)
        put(google, 1)
    assert damage(google.url, 1) == []
    remove_leftovers(google.url)
    assert not [name for name in google.names() if lost.split("/")[3] in name]


def test_a_commit_whose_answer_is_lost_keeps_its_arrays(google: Google, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = BucketStorage.commit

    def commit_and_fail(*arguments: Any) -> None:
        commit(*arguments)
        refuse()

    monkeypatch.setattr(BucketStorage, "commit", commit_and_fail)
    with pytest.raises(CheckpointError, match="step-00000001 could not be written: no answer"):
        put(google, 1)
    assert damage(google.url, 1) == []
    monkeypatch.setattr(BucketStorage, "commit", refuse)
    with pytest.raises(CheckpointError):
        put(google, 2)
    assert steps(google.url) == [1] and not [name for name in google.names() if "step-00000002" in name]


def refuse(*arguments: Any) -> None:
    raise CheckpointError("no answer")


def test_a_folder_copied_from_a_bucket_is_a_checkpoint(google: Google, tmp_path: Path) -> None:
    put(google, 5)
    for name in google.names():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(google.get(name))
    restored = restore(tmp_path / "run" / "checkpoints", small(0), report=silent)
    assert bits(restored.tree) == bits(small(5))


RACE = """
import sys, time
import numpy as np
from sophia_levanter.checkpoint import Retention, save, saving
url, writer = sys.argv[1], int(sys.argv[2])
write = saving.write_arrays
def waiting(*arguments, **options):
    digests = write(*arguments, **options)
    print("written", flush=True)
    sys.stdin.readline()
    return digests
saving.write_arrays = waiting
try:
    tree = {str(i): np.full(50, writer) for i in range(4)}
    save(url, 7, tree, run_id=str(writer), metadata={}, retention=Retention(9))
except FileExistsError:
    print("too late")
else:
    print("committed")
"""


def start(program: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


@pytest.mark.slow
def test_of_writers_that_race_for_a_step_one_commits(bucket: Bucket) -> None:
    """On the same footing: all have written their arrays, and are let go at once."""
    writers = [start(RACE, bucket.url, number) for number in range(3)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "written\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    said = [writer.communicate(timeout=60)[0].strip() for writer in writers]
    assert sorted(said) == ["committed", "too late", "too late"]
    restored = restore(bucket.url, {str(i): np.zeros(50, int) for i in range(4)}, report=silent)
    assert restored.run_id == str(said.index("committed"))
    assert all((leaf == said.index("committed")).all() for leaf in restored.tree.values())
    remove_leftovers(bucket.url)
    assert damage(bucket.url, 7) == []
    assert len({name.split("/")[3] for name in bucket.names() if "arrays-" in name}) == 1, "the losers' arrays are gone"


SAVE_FOR_EVER = """
import sys
import numpy as np
from sophia_levanter.checkpoint import Retention, save, steps
url = sys.argv[1]
step = max(steps(url), default=0)
while True:
    step += 1
    save(url, step, {str(i): np.full(100, step) for i in range(8)}, run_id="r", metadata={}, retention=Retention(2))
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_in_the_midst_of_saves_to_a_bucket(bucket: Bucket) -> None:
    like = {str(i): np.zeros(100, int) for i in range(8)}
    rng = random.Random(0)
    leftovers = 0
    for _ in range(8):
        process = start(SAVE_FOR_EVER, bucket.url)
        assert process.stdout is not None
        committed = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        committed = max([committed, *map(int, process.stdout.read().split())])
        process.wait()
        before = len(bucket.names())
        remove_leftovers(bucket.url)
        leftovers += before - len(bucket.names())
        assert all(damage(bucket.url, step) == [] for step in steps(bucket.url))
        restored = restore(bucket.url, like, report=silent)
        assert restored.step in (committed, committed + 1)
        assert all((leaf == restored.step).all() for leaf in restored.tree.values())
        # Of the first step alone; of 2; or of 3, where the kill came before the oldest went.
        assert len(steps(bucket.url)) in ((1, 2, 3) if restored.step == 1 else (2, 3))
        assert len(bucket.names()) == 17 * len(steps(bucket.url))  # 8 arrays of 2 objects, and the manifest
    assert leftovers > 0


def test_a_bucket_that_takes_no_more(google: Google, monkeypatch: pytest.MonkeyPatch) -> None:
    put(google, 1)
    with monkeypatch.context() as patch:
        patch.setattr(google.server, "refused", "scale/c")
        with pytest.raises(CheckpointError, match=r"could not be written: leaf scale, gs://.*quota"):
            put(google, 2)
    assert steps(google.url) == [1]
    assert not [name for name in google.names() if "step-00000002" in name]
    put(google, 2)
    assert steps(google.url) == [1, 2]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://host/folder", "has an unsupported scheme; use a path, gs:// or s3://"),
        ("memory://x", "has an unsupported scheme; use a path, gs:// or s3://"),
        ("gs://", "gs:// does not specify a bucket; use gs://BUCKET/FOLDER"),
        ("s3:///folder", "does not specify a bucket"),
        ("s3://b/folder", "s3://b/folder: .*bucket name"),
    ],
)
def test_what_is_no_bucket(location: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        steps(location)


def test_keys_stay_out_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
    monkeypatch.setattr("sophia_levanter.kvstore._RETRIES", {"max_retries": 1})
    with pytest.raises(CheckpointError) as error:
        steps("s3://bucket/run")
    assert "\n" not in str(error.value)
    assert "key" not in str(error.value) and os.environ["AWS_SECRET_ACCESS_KEY"] not in str(error.value)


def test_amazons_variables_name_a_server_and_its_region(monkeypatch):
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert kvstore_spec("s3://bucket/a/b") == "s3://bucket/a/b/"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://any")
    at_any = {"driver": "s3", "bucket": "bucket", "path": "a/b/", "endpoint": "http://any", "aws_region": "us-east-1"}
    assert kvstore_spec("s3://bucket/a/b") == at_any
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    assert kvstore_spec("s3://bucket/a/b") == at_any | {"aws_region": "eu-central-1"}
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3")
    assert kvstore_spec("s3://bucket/a/b") == at_any | {"endpoint": "http://s3", "aws_region": "eu-west-3"}
    assert kvstore_spec("gs://bucket/a") == "gs://bucket/a/"
