"""How a token store is written: shard by shard, so that one that was interrupted goes on where it was."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sophia_levanter.data.arrays import ArrayWriter, open_array
from sophia_levanter.data.blocks import Documents, store_dtype
from sophia_levanter.data.token_store import (
    DOCUMENT_ENDS,
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENS,
    Manifest,
    digest_of,
    tokens_digest,
)
from sophia_levanter.data.tokenizer import Tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.files import write_atomically

SHARD_TOKENS = 1 << 21  # one file
CHUNK_TOKENS = 1 << 14  # what one random read fetches and checks
SHARD_DOCUMENTS = 1 << 18
CHUNK_DOCUMENTS = 1 << 12


class NotWritten(InputError):
    """The disk does not take what is to be written; what is there already can be gone on with."""


@dataclass(frozen=True)
class WriterState:
    """Where a writer was: files that hold so many tokens and document ends, what comes after those, and its counts."""

    num_documents: int = 0
    num_bytes: int = 0
    written: dict[str, int] = field(default_factory=lambda: {TOKENS: 0, DOCUMENT_ENDS: 0})
    tails: dict[str, np.ndarray | None] = field(default_factory=lambda: {TOKENS: None, DOCUMENT_ENDS: None})


class TokenStoreWriter:
    """Writes a store in the directory `path`, from where `state` is. `finish` makes it a store.

    Raises:
        NotWritten: from any method, if the disk does not take it.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, source: str, state: WriterState | None = None) -> None:
        state = state or WriterState()
        self._path = path
        self._tokenizer = tokenizer
        self._source = source
        self.num_documents = state.num_documents
        self.num_bytes = state.num_bytes
        self._arrays = {}
        for name, dtype, shard, chunk in (
            (TOKENS, store_dtype(tokenizer), SHARD_TOKENS, CHUNK_TOKENS),
            (DOCUMENT_ENDS, np.dtype(np.uint64), SHARD_DOCUMENTS, CHUNK_DOCUMENTS),
        ):
            try:
                self._arrays[name] = ArrayWriter(
                    path / name,
                    dtype,
                    shard=shard,
                    chunk=chunk,
                    num_written=state.written[name],
                    tail=state.tails[name],
                )
            except ValueError as error:
                raise _not_written(path, error) from error

    @property
    def num_tokens(self) -> int:
        return self._arrays[TOKENS].length

    @property
    def num_written(self) -> int:
        """Tokens that are in files."""
        return self._arrays[TOKENS].num_written

    @property
    def state(self) -> WriterState:
        """For a writer that goes on after this one was killed."""
        return WriterState(
            self.num_documents,
            self.num_bytes,
            {name: array.num_written for name, array in self._arrays.items()},
            {name: array.tail.copy() for name, array in self._arrays.items()},
        )

    def append(self, documents: Documents) -> None:
        """Add documents at the end."""
        ends = self.num_tokens + np.cumsum(documents.lengths)
        try:
            self._arrays[TOKENS].append(documents.tokens)
            self._arrays[DOCUMENT_ENDS].append(ends.astype(np.uint64))
        except ValueError as error:
            raise _not_written(self._path, error) from error
        self.num_documents += len(documents.lengths)
        self.num_bytes += documents.num_bytes

    def finish(self) -> None:
        """Write what is left, read all of it back, and write the manifest."""
        try:
            for array in self._arrays.values():
                array.flush()
            digests = {
                name: tokens_digest(open_array(f"{self._path}/{name}"), str(self._path)) for name in self._arrays
            }
            # Tensorstore's locks, of which a process that was killed leaves some.
            for lock in self._path.rglob("*.__lock"):
                lock.unlink()
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                source=self._source,
                tokenizer_name=self._tokenizer.name,
                tokenizer_fingerprint=self._tokenizer.fingerprint,
                num_documents=self.num_documents,
                num_tokens=self.num_tokens,
                num_bytes=self.num_bytes,
                digest=digests[TOKENS],
                document_ends_digest=digests[DOCUMENT_ENDS],
                arrays={name: digest_of((self._path / name / "zarr.json").read_bytes()) for name in self._arrays},
            )
            content = json.dumps(manifest.with_checksum().__dict__, indent=2)
            write_atomically(self._path / MANIFEST_NAME, content.encode())
        except (ValueError, OSError) as error:
            raise _not_written(self._path, error) from error


def _not_written(path: Path, reason: object) -> NotWritten:
    shown = os.strerror(reason.errno) if isinstance(reason, OSError) and reason.errno else reason
    return NotWritten(
        f"data.cache_dir: cannot write the token store {path} ({shown}); make room, or choose another place; "
        "the same command goes on from what is written"
    )
