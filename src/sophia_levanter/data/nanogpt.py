"""Token files as nanoGPT's prepare.py writes them, used where they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from sophia_levanter.data.names import NANOGPT
from sophia_levanter.data.tokenizer import Tokenizer
from sophia_levanter.errors import InputError

ITEM_BYTES = 2
DIGEST_PIECES = 64
DIGEST_PIECE_BYTES = 1 << 16


class NanogptTokens:
    """A file of uint16 token ids, one after the other, by memory map.

    Raises:
        InputError: if there is no such file or it is no array of uint16; when ids are read that the tokenizer does not
            have.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, field: str) -> None:
        self._path = Path(os.path.abspath(os.path.expanduser(source.removeprefix(NANOGPT))))
        self._tokenizer = tokenizer
        self._field = field
        try:
            size = self._path.stat().st_size
            if not size or size % ITEM_BYTES:
                raise InputError(f"{field}: {self._path} has {size} bytes, which is no array of two-byte token ids")
            self._tokens = np.memmap(self._path, dtype="<u2", mode="r")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise InputError(f"{field}: {self._path}: {reason}; {NANOGPT}FILE.bin names a file of nanoGPT's") from error

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it from other files: a digest of some pieces, since all of it may be 18 GB."""
        digest = hashlib.blake2b(digest_size=16)
        items = DIGEST_PIECE_BYTES // ITEM_BYTES
        for start in np.linspace(0, max(self.num_tokens - items, 0), DIGEST_PIECES).astype(np.int64).tolist():
            digest.update(np.ascontiguousarray(self._tokens[start : start + items]).data)
        return {
            "tokenizer": self._tokenizer.fingerprint,
            "tokens": self.num_tokens,
            "digest_of_samples": digest.hexdigest(),
        }

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens in `[start, stop)`, uint16 [position], read-only.

        Raises:
            IndexError: if the range is not within the file.
            InputError: if the tokenizer does not have an id.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) is not within the {self.num_tokens} tokens of {self._path}")
        return self._checked(np.asarray(self._tokens[start:stop]))

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `starts` on, int32 [window, position].

        Raises:
            IndexError: if a window is not within the file.
            InputError: if the tokenizer does not have an id.
        """
        if starts.size and (starts.min() < 0 or starts.max() + length > self.num_tokens):
            raise IndexError(f"a window is not within the {self.num_tokens} tokens of {self._path}")
        windows = [np.asarray(self._tokens[start : start + length]) for start in starts.tolist()]
        return self._checked(np.stack(windows)).astype(np.int32)

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.size and tokens.max() >= self._tokenizer.vocab_size:
            raise InputError(
                f"{self._field}: {self._path} holds the token id {tokens.max()}, and data.tokenizer "
                f"{self._tokenizer.name} has {self._tokenizer.vocab_size}; nanoGPT's files for GPT-2 are of gpt2"
            )
        return tokens
