from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sophia_levanter.data.batches import TrainBatches, ValidationBatches
from sophia_levanter.data.config import DataConfig
from sophia_levanter.data.nanogpt import NanogptTokens
from sophia_levanter.data.prepare import prepare
from sophia_levanter.data.tokenizer import ByteTokenizer
from sophia_levanter.errors import InputError

TOKENS = np.random.default_rng(0).integers(0, 257, 2000).astype(np.uint16)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    TOKENS.tofile(tmp_path / "train.bin")
    TOKENS[:100].tofile(tmp_path / "val.bin")
    return tmp_path


def opened(path: Path) -> NanogptTokens:
    return NanogptTokens(f"nanogpt:{path}", ByteTokenizer(), field="data.train")


def test_files_are_used_where_they_are(files: Path) -> None:
    data = prepare(
        DataConfig(
            train=f"nanogpt:{files}/train.bin", validation=f"nanogpt:{files}/val.bin", cache_dir=str(files / "cache")
        ),
        print,
    )
    assert not (files / "cache").exists()
    np.testing.assert_array_equal(data.train.read(0, 2000), TOKENS)
    np.testing.assert_array_equal(data.train.read_windows(np.array([5, 1990]), 10), [TOKENS[5:15], TOKENS[1990:]])
    assert TrainBatches(data.train, seq_len=16, batch_size=4, seed=0)[3].shape == (4, 17)
    assert sum(weights.sum() for _, weights in ValidationBatches(data.validation, seq_len=16, batch_size=4)) == 99


def test_the_facts_tell_files_apart(files: Path) -> None:
    before = opened(files / "train.bin").facts
    assert opened(files / "train.bin").facts == before
    assert opened(files / "val.bin").facts != before
    changed = TOKENS.copy()
    changed[7] += 1
    changed.tofile(files / "train.bin")
    assert opened(files / "train.bin").facts != before


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "No such file"), (b"", "0 bytes"), (b"abc", "3 bytes, which is no array")]
)
def test_files_that_are_none(tmp_path: Path, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(InputError, match=rf"^data\.train: .*a\.bin.*{expected}"):
        opened(tmp_path / "a.bin")


def test_ids_of_another_tokenizer(files: Path) -> None:
    np.array([1, 2, 50256, 3], np.uint16).tofile(files / "train.bin")
    with pytest.raises(InputError, match=r"token id 50256, and data\.tokenizer bytes has 257"):
        opened(files / "train.bin").read_windows(np.array([0]), 4)
    with pytest.raises(InputError, match="token id 50256"):
        opened(files / "train.bin").read(2, 3)


def test_ranges_outside_are_refused(files: Path) -> None:
    for start, stop in [(-1, 2), (0, 2001), (3, 2)]:
        with pytest.raises(IndexError):
            opened(files / "train.bin").read(start, stop)
    with pytest.raises(IndexError):
        opened(files / "train.bin").read_windows(np.array([1999]), 3)


def test_a_part_cannot_be_held_out(files: Path) -> None:
    with pytest.raises(InputError, match=r"set data\.validation to nanogpt:val\.bin"):
        prepare(DataConfig(train=f"nanogpt:{files}/train.bin"), print)
