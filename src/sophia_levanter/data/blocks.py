"""The work of the processes that make tokens. Imports no more than that takes, so that they start at once."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import platform
import signal
import threading
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sophia_levanter.data.tokenizer import Tokenizer, load_tokenizer
from sophia_levanter.errors import InputError


@dataclass(frozen=True)
class Documents:
    """Documents one after the other, as a tokenizer makes them.

    Attributes:
        tokens: [position], in a store's dtype, with an end-of-text after each document.
        lengths: int64 [document], of the tokens.
        num_bytes: of their text in UTF-8, together.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: int


# The texts of a block: of its documents for training, and of those held out.
Texts = tuple[list[str], list[str]]
Encoded = tuple[Documents, Documents]


def store_dtype(tokenizer: Tokenizer) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def encode(tokenizer: Tokenizer, texts: Texts) -> Encoded:
    """The tokens of a block, an end-of-text after each document."""
    train, held_out = texts
    return _documents(tokenizer, train), _documents(tokenizer, held_out)


def _documents(tokenizer: Tokenizer, texts: list[str]) -> Documents:
    dtype = store_dtype(tokenizer)
    end = np.array([tokenizer.end_of_text], dtype)
    pieces = [tokenizer.encode(text).astype(dtype) for text in texts]
    lengths = np.array([len(piece) + 1 for piece in pieces], np.int64)
    tokens = np.concatenate([array for piece in pieces for array in (piece, end)]) if pieces else np.empty(0, dtype)
    return Documents(tokens, lengths, sum(len(text.encode("utf-8")) for text in texts))


@lru_cache(maxsize=1)
def _tokenizer(module: str, name: str, fingerprint: str) -> Tokenizer:
    importlib.import_module(module)  # registers a plug-in's tokenizer
    tokenizer = load_tokenizer(name)
    if tokenizer.fingerprint != fingerprint:
        raise InputError(
            f"data.tokenizer: {name} differs on worker {platform.node()}; "
            "use the same file on every host and do not change it during tokenization"
        )
    return tokenizer


def encode_with(module: str, name: str, fingerprint: str, texts: Texts) -> Encoded:
    """`encode` with the tokenizer of this name, which a process loads once; the module is its class's.

    Raises:
        InputError: if its fingerprint is another one: the file may have changed, or differ between hosts.
    """
    return encode(_tokenizer(module, name, fingerprint), texts)


def start_worker() -> None:
    """Make a process ready for work, and end it with the one that started it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
