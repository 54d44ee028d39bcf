from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiktoken

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.encoding import encode
from sophia_levanter.data.store_writer import TokenStoreWriter
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.data.tokenizer import ByteTokenizer, TiktokenTokenizer, Tokenizer
from tiny_runs import TEXTS, json_lines


@pytest.fixture
def tiny_encoding() -> Callable[..., tiktoken.Encoding]:
    """An encoding of all bytes, a few merges and, after a gap of unused ids, end-of-text as 300."""

    def make(merges: Sequence[bytes] = (b"th", b"the", b"an"), pattern: str = r"\S+|\s+") -> tiktoken.Encoding:
        ranks = {bytes([value]): value for value in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}
        return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300})

    return make


@pytest.fixture
def tiny_bpe(tiny_encoding: Callable[..., tiktoken.Encoding]) -> Tokenizer:
    return TiktokenTokenizer(tiny_encoding())


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., TokenStore]:
    """Write documents to a new store and open it."""
    made = 0

    def make(texts: Sequence[str], tokenizer: Tokenizer | None = None) -> TokenStore:
        nonlocal made
        made += 1
        tokenizer = tokenizer or ByteTokenizer()
        writer = TokenStoreWriter(tmp_path / f"store{made}", tokenizer, "test")
        for text in texts:
            writer.append(encode(tokenizer, ([text], []))[0])
        writer.finish()
        return TokenStore.open(tmp_path / f"store{made}", tokenizer)

    return make


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "train.jsonl").write_bytes(json_lines(TEXTS))
    return DataConfig(
        train=str(tmp_path / "train.jsonl"), validation_fraction=0.2, cache_dir=str(tmp_path / "deep" / "cache")
    )
