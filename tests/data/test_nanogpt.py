from __future__ import annotations

import base64
import itertools
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reading import refused

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data import nanogpt as nanogpt_module
from sophia_levanter.data.batches import TrainBatches, ValidationBatches
from sophia_levanter.data.corpora import prepare
from sophia_levanter.data.nanogpt import NanogptTokens
from sophia_levanter.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from sophia_levanter.errors import InputError

TOKENS = np.random.default_rng(0).integers(0, 257, 2000).astype(np.uint16)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    TOKENS.tofile(tmp_path / "train.bin")
    TOKENS[:100].tofile(tmp_path / "val.bin")
    return tmp_path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of 65,793 ids."""
    tokens = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    path = tmp_path_factory.mktemp("large") / "large.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return load_tokenizer(str(path))


def opened(path: Path, options: str = "", tokenizer: Tokenizer | None = None) -> NanogptTokens:
    return NanogptTokens(f"nanogpt:{path}{options}", tokenizer or ByteTokenizer(), field="data.train")


def header(magic: int, version: int, count: int) -> bytes:
    numbers = np.zeros(256, "<i4")
    numbers[:3] = magic, version, count
    return numbers.tobytes()


def test_files_are_used_where_they_are(files: Path) -> None:
    data = prepare(
        DataConfig(
            train=f"nanogpt:{files}/train.bin", validation=f"nanogpt:{files}/val.bin", cache_dir=str(files / "cache")
        ),
        print,
    )
    assert not (files / "cache").exists()
    np.testing.assert_array_equal(data.train.read(0, 2000), TOKENS)
    np.testing.assert_array_equal(data.train.read_sequences(np.array([5, 1990]), 10), [TOKENS[5:15], TOKENS[1990:]])
    assert TrainBatches(data.train, seq_len=16, batch_size=4, seed=0)[3].shape == (4, 17)
    assert sum(weights.sum() for _, weights in ValidationBatches(data.validation, seq_len=16, batch_size=4)) == 99


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        (b"", "0 bytes of tokens"),
        (b"abc", "3 bytes of tokens, but uint16 ids require a positive multiple of 2"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(InputError, match=rf"^data\.train: .*a\.bin.*{expected}"):
        opened(tmp_path / "a.bin")


@pytest.mark.parametrize("at", [7, 1999])
def test_ids_of_another_tokenizer_anywhere_in_the_file(files: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(nanogpt_module, "READ_TOKENS", 8)
    tokens = TOKENS.copy()
    tokens[at] = 50256
    tokens.tofile(files / "train.bin")
    config = DataConfig(train=f"nanogpt:{files}/train.bin", validation=f"nanogpt:{files}/val.bin")
    assert "token id 50256, but data.tokenizer bytes has 257 ids" in refused(lambda: prepare(config, print))


def test_ids_that_change_after_the_check(files: Path) -> None:
    tokens = opened(files / "train.bin")
    tokens.check(print)
    np.memmap(files / "train.bin", np.uint16, "r+")[7] = 50256
    assert "token id 50256" in refused(lambda: tokens.read(7, 8))
    assert "token id 50256" in refused(lambda: tokens.read_sequences(np.array([5]), 4))
    assert tokens.read(0, 7).tolist() == TOKENS[:7].tolist()


def test_the_beginning_is_shown(files: Path) -> None:
    np.array([*b"First Citizen:\n\x1b", *b"Before we"], np.uint16).tofile(files / "train.bin")
    said: list[str] = []
    config = DataConfig(train=f"nanogpt:{files}/train.bin", validation=f"nanogpt:{files}/val.bin")
    prepare(config, said.append)
    line = (
        f"data.train: {files}/train.bin: 25 uint16 tokens, beginning with 'First Citizen:\\n\N{REPLACEMENT CHARACTER}'"
    )
    assert said[0] == line
    assert said[1].startswith(f"data.validation: {files}/val.bin: 100 uint16 tokens")


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "uint16"), (20240801, 7, "uint32")])
@pytest.mark.parametrize("named", [False, True])
def test_shards_of_llm_c(tmp_path: Path, magic: int, version: int, dtype: str, named: bool) -> None:
    (tmp_path / "a.bin").write_bytes(header(magic, version, 2000) + TOKENS.astype(dtype).tobytes())
    tokens = opened(tmp_path / "a.bin", f"?dtype={dtype}" if named else "")
    tokens.check(print)
    np.testing.assert_array_equal(tokens.read(0, tokens.num_tokens), TOKENS)
    np.testing.assert_array_equal(tokens.read_sequences(np.array([5]), 10), TOKENS[None, 5:15])
    assert tokens.facts["tokens"] == 2000


@pytest.mark.parametrize(
    ("begin", "options", "expected"),
    [
        (header(20240520, 2, 2000), "", "has an llm.c header (20240520) with version 2; only version 1 is supported"),
        (header(20240520, 1, 1999), "", "has 2000 tokens, but its header specifies 1999"),
        (header(20240520, 1, 2001), "", "has 2000 tokens, but its header specifies 2001"),
        (header(20240801, 7, 2000), "", "has 1000 tokens, but its header specifies 2000"),
        (header(20240520, 1, 2000), "?dtype=uint32", "the header specifies dtype uint16, not uint32; remove ?dtype="),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, begin: bytes, options: str, expected: str) -> None:
    (tmp_path / "a.bin").write_bytes(begin + TOKENS.tobytes())
    assert expected in refused(lambda: opened(tmp_path / "a.bin", options))


@pytest.mark.parametrize("dtype", ["int64", ">u2", "uint8"])
def test_arrays_of_numpy(tmp_path: Path, dtype: str) -> None:
    expected = (TOKENS % 256).astype(dtype)
    np.save(tmp_path / "a.npy", expected)
    tokens = opened(tmp_path / "a.npy")
    tokens.check(print)
    np.testing.assert_array_equal(tokens.read(0, 2000), expected)
    assert tokens.read_sequences(np.array([5]), 10).dtype == np.int32
    assert len(tokens.facts["digest_of_samples"]) == 32


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (TOKENS.reshape(2, 1000), "shape (2, 1000)"),
        (TOKENS.astype(np.float32), "array with dtype float32"),
        (TOKENS[:0], "shape (0,)"),
        (np.array([print, len]), "Python objects in dtype"),
        (np.array([1, -1, 2]), "token id -1"),
    ],
)
def test_arrays_that_are_refused(tmp_path: Path, array: np.ndarray, expected: str) -> None:
    np.save(tmp_path / "a.npy", array)
    assert expected in refused(lambda: opened(tmp_path / "a.npy").check(print))


def test_four_bytes_where_they_are_named(tmp_path: Path, large: Tokenizer) -> None:
    ids = (np.arange(5000) * 13 % large.vocab_size).astype(np.uint32)
    ids.tofile(tmp_path / "a.bin")
    tokens = opened(tmp_path / "a.bin", "?dtype=uint32", large)
    tokens.check(print)
    np.testing.assert_array_equal(tokens.read(0, 5000), ids)
    assert "use nanogpt:a.bin?dtype=uint32" in refused(lambda: opened(tmp_path / "a.bin", "", large))
    assert "two-byte ids" in refused(lambda: opened(tmp_path / "a.bin", "?dtype=uint16", large))
    np.save(tmp_path / "a.npy", ids.astype(np.uint16))
    assert "two-byte ids" in refused(lambda: opened(tmp_path / "a.npy", "", large))


@pytest.mark.parametrize("count", [2, 2000])
def test_what_looks_like_four_bytes_is_refused_unless_named(tmp_path: Path, count: int) -> None:
    TOKENS[:count].astype(np.uint32).tofile(tmp_path / "a.bin")
    assert "every second uint16 value is 0" in refused(lambda: opened(tmp_path / "a.bin"))
    assert opened(tmp_path / "a.bin", "?dtype=uint32").num_tokens == count
    assert opened(tmp_path / "a.bin", "?dtype=uint16").num_tokens == 2 * count


@pytest.mark.parametrize("options", ["", "?dtype=uint32"])
def test_ids_of_eight_bytes_are_refused(tmp_path: Path, options: str) -> None:
    TOKENS[:100].astype(np.int64).tofile(tmp_path / "a.bin")
    assert "contains eight-byte ids" in refused(lambda: opened(tmp_path / "a.bin", options))


@pytest.mark.parametrize("options", ["?dtype=int8", "?dtype=", "?type=uint16"])
def test_options_that_are_refused(files: Path, options: str) -> None:
    assert "use ?dtype=uint16 or ?dtype=uint32" in refused(lambda: opened(files / "train.bin", options))


class Command:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("made_by_a_pickle",)


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"vocab_size": 65, "stoi": {"a": 0}, "itos": {0: "a"}}, "its ids encode characters"),
        ({"vocab_size": 65}, "there are 65 ids, but data.tokenizer bytes has 257"),
        ({"vocab_size": "257"}, "there are '257' ids"),
        ({"vocab_size": np.int64(257)}, "not a nanoGPT meta.pkl"),
        ({"vocab_size": Command()}, "it refers to posix.mkdir"),
        ([257], "contains a list"),
        (b"not a pickle", "not a nanoGPT meta.pkl"),
    ],
)
def test_the_vocabulary_beside_the_file(
    files: Path, monkeypatch: pytest.MonkeyPatch, meta: object, expected: str
) -> None:
    monkeypatch.chdir(files)
    (files / "meta.pkl").write_bytes(meta if isinstance(meta, bytes) else pickle.dumps(meta))
    message = refused(lambda: opened(files / "train.bin"))
    assert "meta.pkl" in message
    assert expected in message
    assert not (files / "made_by_a_pickle").exists()


@pytest.mark.parametrize("meta", [{"vocab_size": 257}, {}, {"itos": [1, "a"]}])
def test_a_vocabulary_that_agrees(files: Path, meta: dict) -> None:
    (files / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert opened(files / "train.bin").num_tokens == 2000


def test_a_part_cannot_be_held_out(files: Path) -> None:
    with pytest.raises(InputError, match=r"set data\.validation, for example to nanogpt:val\.bin"):
        prepare(DataConfig(train=f"nanogpt:{files}/train.bin"), print)


def test_all_tokens_tell_files_apart(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those between the pieces that alone were compared before."""
    monkeypatch.setattr(nanogpt_module, "DIGEST_PIECE_BYTES", 4)
    monkeypatch.setattr(nanogpt_module, "READ_TOKENS", 64)
    before = opened(files / "train.bin").facts
    changed = TOKENS.copy()
    changed[7] = (changed[7] + 1) % 257
    changed.tofile(files / "train.bin")
    after = opened(files / "train.bin").facts
    assert after["digest_of_samples"] == before["digest_of_samples"]
    assert after["digest"] != before["digest"]


@pytest.mark.parametrize("mtime", ["kept", "new"])
def test_a_large_file_is_read_once(files: Path, monkeypatch: pytest.MonkeyPatch, mtime: str) -> None:
    monkeypatch.setattr(nanogpt_module, "REMEMBERED_TOKENS", 1000)

    def large() -> NanogptTokens:
        return NanogptTokens(
            f"nanogpt:{files}/train.bin", ByteTokenizer(), field="data.train", cache_dir=files / "cache"
        )

    first = large()
    first.check(print)
    with monkeypatch.context() as patch:
        patch.setattr(NanogptTokens, "_read_all", None)
        again = large()
        again.check(print)
        assert again.facts == first.facts
    status = (files / "train.bin").stat()
    changed = TOKENS.copy()
    changed[7] = 60000
    changed.tofile(files / "new.bin")
    if mtime == "kept":
        os.utime(files / "new.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    (files / "new.bin").replace(files / "train.bin")
    assert "token id 60000" in refused(lambda: large().check(print))


@pytest.mark.parametrize("name", ["train.bin", "a.npy"])
def test_a_file_that_is_cut_short_is_an_error_and_does_not_kill_the_process(files: Path, name: str) -> None:
    np.save(files / "a.npy", TOKENS)
    tokens = opened(files / name)
    os.truncate(files / name, 3999)
    assert "was truncated after it was opened" in refused(lambda: tokens.read(0, 2000))
    assert "was truncated after it was opened" in refused(lambda: tokens.read_sequences(np.array([1990]), 10))
    assert "changed after it was opened" in refused(tokens.check_unchanged)


def test_a_file_that_is_overwritten_is_noticed_and_one_that_is_removed_stays_readable(files: Path) -> None:
    tokens = opened(files / "train.bin")
    (files / "train.bin").unlink()
    tokens.check_unchanged()
    assert tokens.read(0, 2000).tolist() == TOKENS.tolist()
    tokens = opened(files / "val.bin")
    time.sleep(0.01)  # the system's clock for files is a coarse one
    TOKENS[100:200].tofile(files / "val.bin")
    assert "changed after it was opened" in refused(tokens.check_unchanged)


@pytest.mark.parametrize(
    "act",
    [
        lambda path: os.utime(path, (1, 1)),
        lambda path: shutil.copyfile(shutil.copy(path, path.with_name("copy")), path),
    ],
    ids=["touched", "copied back"],
)
def test_a_file_that_is_touched_is_read_again_once(
    files: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], object]
) -> None:
    tokens = opened(files / "train.bin")
    tokens.check(print)
    time.sleep(0.01)  # the system's clock for files is a coarse one
    act(files / "train.bin")
    tokens.check_unchanged()
    with monkeypatch.context() as patch:
        patch.setattr(NanogptTokens, "_read_all", None)
        tokens.check_unchanged()
    time.sleep(0.01)
    (files / "train.bin").write_bytes(TOKENS[::-1].tobytes())
    for _ in range(2):
        assert "changed after it was opened" in refused(tokens.check_unchanged)


def test_a_file_that_is_touched_without_end(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = opened(files / "train.bin")
    numbers = itertools.count()
    monkeypatch.setattr(nanogpt_module._TokenFile, "status", property(lambda self: [next(numbers)]))
    assert "keeps changing" in refused(lambda: tokens.check(print))


def test_a_meta_file_that_would_take_for_ever_to_show(tmp_path: Path) -> None:
    size: list = []
    for _ in range(60):
        size = [size, size]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": size}))
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(InputError, match="there are 'list' ids"):
        NanogptTokens(f"nanogpt:{tmp_path / 'a.bin'}", ByteTokenizer(), field="data.train")
