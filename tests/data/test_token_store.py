from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fake_gcs import FakeGcs, serving
from sophia_levanter.commands import inspect_data
from sophia_levanter.data import store_writer, token_store
from sophia_levanter.data.encoding import EncodedDocuments
from sophia_levanter.data.store_writer import TokenStoreWriter
from sophia_levanter.data.token_store import TokenStore, remembered
from sophia_levanter.data.tokenizer import ByteTokenizer, Tokenizer
from sophia_levanter.errors import InputError

MakeStore = Callable[..., TokenStore]

TEXTS = ["first", "secönd " * 30, "x"]
TOKENS = np.concatenate([[*text.encode(), 256] for text in TEXTS])


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "SHARD_TOKENS", 64)
    monkeypatch.setattr(store_writer, "CHUNK_TOKENS", 16)


@pytest.fixture(params=["in memory", "from disk"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "from disk":
        monkeypatch.setattr(token_store, "IN_MEMORY_BYTES", 0)


def test_what_is_written_is_read(make_store: MakeStore, small_shards: None, where: None) -> None:
    store = make_store(TEXTS)
    assert store.num_tokens == len(TOKENS)
    assert store.num_documents == 3
    assert store.manifest.num_bytes == len("".join(TEXTS).encode())
    assert store.manifest.tokenizer_fingerprint == ByteTokenizer().fingerprint
    for start, stop in [(0, len(TOKENS)), (60, 70), (5, 5), (len(TOKENS) - 1, len(TOKENS))]:
        tokens = store.read(start, stop)
        assert tokens.dtype == np.uint16
        np.testing.assert_array_equal(tokens, TOKENS[start:stop])
    windows = store.read_sequences(np.array([100, 0, 57]), 20)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows, [TOKENS[start : start + 20] for start in (100, 0, 57)])


def test_what_is_read_cannot_be_written(make_store: MakeStore, where: None) -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_store(TEXTS).read(0, 3)[0] = 1


def test_ranges_outside_are_refused(make_store: MakeStore, where: None) -> None:
    store = make_store(["abc"])
    for start, stop in [(-1, 2), (0, 5), (3, 2)]:
        with pytest.raises(IndexError):
            store.read(start, stop)
    for start in (-1, 2):
        with pytest.raises(IndexError):
            store.read_sequences(np.array([0, start]), 3)


def test_a_store_that_ends_with_a_whole_shard(make_store: MakeStore, small_shards: None) -> None:
    store = make_store(["a" * 63, "b" * 63])
    assert store.read(0, 128).tolist() == [97] * 63 + [256] + [98] * 63 + [256]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 1 << 17
    writer = TokenStoreWriter(tmp_path / "store", tokenizer, "test")
    writer.append(EncodedDocuments(np.array([100_000, 5, 256], np.uint32), np.array([3]), 2))
    writer.finish()
    tokens = TokenStore.open(tmp_path / "store").read(0, 3)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [100_000, 5, 256]


def test_zeros_are_data(make_store: MakeStore, small_shards: None) -> None:
    assert not make_store(["\0" * 200]).read(0, 200).any()


def test_an_unfinished_store_is_none(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path / "store", ByteTokenizer(), "test")
    writer.append(EncodedDocuments(np.array([1, 2, 256], np.uint16), np.array([3]), 2))
    with pytest.raises(InputError, match="no finished token store"):
        TokenStore.open(tmp_path / "store")


def test_another_tokenizer(make_store: MakeStore, tiny_bpe: Tokenizer) -> None:
    store = make_store(TEXTS)
    with pytest.raises(InputError) as info:
        TokenStore.open(store.path, tiny_bpe)
    for part in ("bytes", ByteTokenizer().fingerprint, "tiny", tiny_bpe.fingerprint):
        assert part in str(info.value)


def flip_a_bit(path: Path, byte: int = 20) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink])
def test_damage_is_found_by_reading(make_store: MakeStore, small_shards: None, where: None, damage) -> None:
    store = make_store(TEXTS)
    damage(store.path / "tokens" / "c" / "1")
    reopened = TokenStore.open(store.path)
    with pytest.raises(InputError, match="damaged") as info:
        reopened.read(60, 130)
    assert str(store.path) in str(info.value)


def test_large_stores_are_read_in_parts(
    make_store: MakeStore, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_store, "IN_MEMORY_BYTES", 0)
    store = make_store(TEXTS)
    (store.path / "tokens" / "c" / "1").unlink()
    np.testing.assert_array_equal(store.read(0, 10), TOKENS[:10])


def test_a_token_array_that_is_not_the_manifests(make_store: MakeStore) -> None:
    path = make_store(TEXTS).path
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"num_tokens": 10**9}))
    with pytest.raises(InputError, match="damaged"):
        TokenStore.open(path)
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "tokens" / "zarr.json").unlink()
    with pytest.raises(InputError, match="damaged"):
        TokenStore.open(path)


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        ("{", "damaged"),
        ("[]", "format None"),
        ('{"format_version": 99}', "format 99"),
        ('{"format_version": 3}', "damaged"),
    ],
)
def test_a_manifest_that_cannot_be_read(make_store: MakeStore, manifest: str, expected: str) -> None:
    path = make_store(TEXTS).path
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=expected) as info:
        TokenStore.open(path)
    assert "\n" not in str(info.value)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"^data\.cache_dir: cannot write"):
        TokenStoreWriter(tmp_path / "file" / "store", ByteTokenizer(), "test")


def test_any_flipped_byte_is_found(make_store: MakeStore, small_shards: None) -> None:
    """In whatever file of the store: on opening, or on reading everything."""
    store = make_store(TEXTS)
    store.verify()
    rng = np.random.default_rng(0)
    for path in [path for path in store.path.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for place in rng.choice(len(whole), min(len(whole), 12), replace=False).tolist():
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            with pytest.raises(InputError) as info:
                TokenStore.open(store.path).verify()
            assert str(store.path) in str(info.value)
            assert "\n" not in str(info.value)
        path.write_bytes(whole)
    TokenStore.open(store.path).verify()


def test_documents_by_number(make_store: MakeStore, small_shards: None, where: None, monkeypatch) -> None:
    monkeypatch.setattr(store_writer, "SHARD_DOCUMENTS", 4)
    monkeypatch.setattr(store_writer, "CHUNK_DOCUMENTS", 2)
    texts = [f"document {i} " * (i % 5) for i in range(11)]
    store = make_store(texts)
    assert [bytes(store.document(i).tolist()).decode() for i in range(11)] == texts
    for number in (-1, 11):
        with pytest.raises(IndexError):
            store.document(number)


# A shard of another text, as long and with sound checksums of its own.


def replace_shard(store: TokenStore, other: TokenStore) -> None:
    shutil.copyfile(other.path / "tokens" / "c" / "1", store.path / "tokens" / "c" / "1")


@pytest.fixture
def alike(make_store: MakeStore, small_shards: None) -> tuple[TokenStore, TokenStore]:
    return (
        make_store(["a text", "and another " * 10, "a third"]),
        make_store(["a text", "AND ANOTHER " * 10, "a third"]),
    )


@pytest.fixture
def large(alike: tuple[TokenStore, TokenStore], monkeypatch: pytest.MonkeyPatch) -> tuple[TokenStore, TokenStore]:
    """The same, too large for memory."""
    monkeypatch.setattr(token_store, "IN_MEMORY_BYTES", 0)
    return alike


def test_another_shard_is_found_when_a_store_is_read(alike: tuple[TokenStore, TokenStore]) -> None:
    store, other = alike
    replace_shard(store, other)
    with pytest.raises(InputError, match=r"the tokens have changed since they were written.*delete it"):
        store.read(0, 1)
    with pytest.raises(InputError, match="the tokens have changed since they were written"):
        TokenStore.open(store.path).read_sequences(np.array([0]), 3)


def test_another_shard_is_found_in_a_large_store(
    large: tuple[TokenStore, TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = large
    store.check_whole(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(token_store, "tokens_digest", None)  # what was compared is not read again
        TokenStore.open(store.path).check_whole(tmp_path / "cache")
    store.check_unchanged()
    replace_shard(store, other)
    for _ in range(2):
        with pytest.raises(InputError, match="the tokens have changed since they were written"):
            store.check_unchanged()
    store.read(0, 1)
    for _ in range(2):
        with pytest.raises(InputError, match="the tokens have changed since they were written"):
            TokenStore.open(store.path).check_whole(tmp_path / "cache")


def touch(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))


def copy_back(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


@pytest.mark.parametrize("act", [touch, copy_back])
def test_files_that_are_touched_are_read_again_once(
    large: tuple[TokenStore, TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], None]
) -> None:
    store, other = large
    store.check_whole(tmp_path / "cache")
    time.sleep(0.01)  # the system's clock for files is a coarse one
    act(store.path)
    store.check_unchanged()
    with monkeypatch.context() as patch:
        patch.setattr(token_store, "tokens_digest", None)
        store.check_unchanged()
    time.sleep(0.01)
    replace_shard(store, other)
    with pytest.raises(InputError, match="the tokens have changed since they were written"):
        store.check_unchanged()


def test_files_that_are_touched_without_end(
    large: tuple[TokenStore, TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = large
    store.check_whole(tmp_path / "cache")
    numbers = itertools.count()
    monkeypatch.setattr(TokenStore, "_files", lambda self: {name: [next(numbers)] for name in self._status})
    with pytest.raises(InputError, match="its files keep changing"):
        store.check_unchanged()


def test_a_shard_that_is_gone_is_missed_when_it_is_read(
    large: tuple[TokenStore, TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = large
    store.check_whole(tmp_path / "cache")
    (store.path / "tokens" / "c" / "1").unlink()
    store.check_unchanged()
    with pytest.raises(InputError, match="damaged"):
        store.read(0, store.num_tokens)


def test_results_of_reading_much_are_kept(tmp_path: Path) -> None:
    computed: list[int] = []

    def compute() -> dict[str, int]:
        computed.append(1)
        return {"number": len(computed)}

    assert [remembered(tmp_path / "new", ["a", 1], compute) for _ in range(2)] == [{"number": 1}] * 2
    assert remembered(tmp_path / "new", ["a", 2], compute) == {"number": 2}
    for path in (tmp_path / "new").rglob("*"):
        if path.is_file():
            path.write_text("{half")
    assert remembered(tmp_path / "new", ["a", 1], compute) == {"number": 3}
    (tmp_path / "file").touch()
    for number, place in enumerate([None, tmp_path / "file", None, tmp_path / "file"], start=4):
        assert remembered(place, ["a", 1], compute) == {"number": number}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    with serving(FakeGcs()) as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.address)
        yield server


def upload(folder: Path, bucket: FakeGcs) -> None:
    files = (path for path in folder.rglob("*") if path.is_file())
    bucket.objects |= {str(path.relative_to(folder.parent)): (1, path.read_bytes()) for path in files}


def test_a_store_in_a_bucket(make_store: MakeStore, bucket: FakeGcs, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(["first document", "second document"])
    upload(store.path, bucket)
    command = [f"gs://bucket/{store.path.name}", "--verify"]
    assert inspect_data.main(command) == 0
    shown = capsys.readouterr().out
    assert "verified" in shown and "second document" in shown

    flip_a_bit(store.path / "tokens" / "c" / "0", byte=9)
    upload(store.path, bucket)
    assert inspect_data.main(command) == 2
    assert f"error: {command[0]}: the token store is damaged" in capsys.readouterr().err


def test_both_stores_of_a_folder_in_a_bucket(
    make_store: MakeStore, bucket: FakeGcs, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_store(["first document", "second document"]).path
    objects = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for side in ("train", "validation"):
        bucket.objects |= {f"owt/{side}/{name}": (1, content) for name, content in objects.items()}
    assert inspect_data.main(["gs://bucket/owt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "://" in line] == ["gs://bucket/owt/train", "gs://bucket/owt/validation"]


def test_no_store_in_a_bucket(bucket: FakeGcs, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_data.main(["gs://bucket/nothing", "--verify"]) == 2
    error = capsys.readouterr().err
    assert error == "error: gs://bucket/nothing contains no finished token store (no manifest.json)\n"
