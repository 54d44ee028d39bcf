"""Texts, and what was made of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from sophia_levanter.data.corpora import TextData
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.data.tokenizer import Tokenizer

TEXTS = [f"the document number {i}, naïve\n" for i in range(60)]


def quiet(line: str) -> None:
    assert "\n" not in line


def documents(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    texts: list[list[int]] = [[]]
    for token in store.read(0, store.num_tokens).tolist():
        if token == tokenizer.end_of_text:
            texts.append([])
        else:
            texts[-1].append(token)
    assert texts.pop() == []  # the last document is ended too
    assert len(texts) == store.num_documents
    return [tokenizer.decode(text) for text in texts]


def sides(data: TextData) -> tuple[list[str], list[str]]:
    return documents(data.train, data.tokenizer), documents(data.validation, data.tokenizer)


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def json_lines(texts: list) -> bytes:
    return "\n".join(json.dumps({"text": text}) for text in texts).encode()


def parquet(texts: list) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer)
    return buffer.getvalue()
