"""Manifests that were made by hand, digest and all: `list`, `verify`, `show` and restoring refuse them in one line."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from trees import one_line, put

from sophia_levanter.checkpoint import CheckpointError, damage, restore
from sophia_levanter.checkpoint.manifest import FORMAT, decode_manifest
from sophia_levanter.commands.checkpoints import main

MANIFEST = "step-00000001/manifest.json"


def forged(body: object) -> bytes:
    """The bytes of a manifest that says `body`, with the digest that they have."""
    rest = ("\n" + json.dumps(body, indent=1).removeprefix("{")).encode()
    return b'{"digest": "%s",' % hashlib.sha256(rest).hexdigest().encode() + rest


def nested(depth: int) -> Any:
    tree: Any = 0
    for _ in range(depth):
        tree = {"a": [tree]}
    return tree


# What is changed of a manifest, or of its first array; what becomes GONE is left out.
OF_MANIFEST: list[dict[str, Any]] = [
    {"run_id": 3},
    {"step": "1"},
    {"step": -1},
    {"step": True},
    {"step": 10**400},
    {"saved_at": "now"},
    {"saved_at": 1e300},
    {"saved_at": -5},
    {"metadata": []},
    {"metadata": nested(60)},
    {"folder": "/etc"},
    {"folder": ".."},
    {"folder": 7},
    {"arrays": None},
    {"run_id": "GONE"},
    {"arrays": [1]},
    {"more": 1},
]
OF_ARRAY: list[dict[str, Any]] = [
    {"path": 3},
    {"path": "b"},
    {"folder": "../../.."},
    {"shape": [-4]},
    {"shape": [True]},
    {"shape": 4},
    {"shape": [4, 4]},
    {"shape": [10**30], "chunk_shape": [10**30]},
    {"chunk_shape": [0]},
    {"chunk_shape": [3]},
    {"dtype": "float33"},
    {"dtype": "string"},
    {"header": 1},
    {"chunks": []},
    {"chunks": {"c.0": None}},
    {"more": 1},
]
# These pass for manifests, and not for those of what is there.
OF_OTHERS: list[dict[str, Any]] = [
    {"shape": [2**50], "chunk_shape": [1]},
    {"shape": [2**50], "chunk_shape": [2**50]},
    {"shape": [8], "chunk_shape": [8]},
    {"chunks": {}},
    {"chunks": {"c.0": "abc"}},
    {"header": ""},
    {"folder": "0009-gone"},
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A folder with one step, and its manifest."""
    folder = tmp_path_factory.mktemp("checkpoints")
    put(folder, 1, {"a": jnp.arange(4.0), "b": jnp.ones(3)})
    return folder, (folder / MANIFEST).read_bytes()


@pytest.fixture
def saved(checkpoints: tuple[Path, bytes]) -> Path:
    folder, manifest = checkpoints
    (folder / MANIFEST).write_bytes(manifest)
    return folder


def change(saved: Path, of_manifest: dict[str, Any], of_array: dict[str, Any]) -> None:
    manifest = dataclasses.asdict(decode_manifest("", (saved / MANIFEST).read_bytes()))
    manifest["arrays"][0] = without_gone(manifest["arrays"][0] | of_array)
    (saved / MANIFEST).write_bytes(forged(without_gone({"format": FORMAT} | manifest | of_manifest)))


def without_gone(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value != "GONE"}


def refused(saved: Path) -> str:
    """The line in which both looking for damage and restoring refuse it."""
    (line,) = damage(saved, 1)
    with pytest.raises(CheckpointError) as error:
        restore(saved, {"a": jnp.zeros(4), "b": jnp.zeros(3)}, report=print)
    for message in (line, one_line(error)):
        assert "step-00000001" in message and len(message) < 1000
    return line


@pytest.mark.parametrize(
    ("of_manifest", "of_array"), [(c, {}) for c in OF_MANIFEST] + [({}, c) for c in OF_ARRAY], ids=str
)
def test_values_that_cannot_be(saved: Path, of_manifest: dict[str, Any], of_array: dict[str, Any]) -> None:
    change(saved, of_manifest, of_array)
    assert "is not a checkpoint manifest: " in refused(saved)


@pytest.mark.parametrize("of_array", OF_OTHERS, ids=str)
def test_values_of_other_arrays(saved: Path, of_array: dict[str, Any]) -> None:
    change(saved, {}, of_array)
    found = damage(saved, 1)
    assert found and all("leaf a, " in line for line in found)


@pytest.mark.parametrize(
    "content",
    [
        lambda: forged({"format": FORMAT}),
        lambda: forged({"format": 99}).replace(b"99", b"98"),
        lambda: b"[" * 100_000,
        lambda: b"",
        lambda: b"\xff\xfe",
        lambda: b'{"digest": "%s",' % hashlib.sha256(b"\nnot JSON").hexdigest().encode() + b"\nnot JSON",
    ],
)
def test_bytes_that_are_no_manifest(
    saved: Path, capfd: pytest.CaptureFixture[str], content: Callable[[], bytes]
) -> None:
    (saved / MANIFEST).write_bytes(content())
    refused(saved)
    for verb, status in (("list", 0), ("verify", 1), ("show", 1)):
        capfd.readouterr()
        assert main([verb, str(saved)]) == status
        assert "Traceback" not in "".join(capfd.readouterr())
