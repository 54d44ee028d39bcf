"""A corpus as one long array of token ids on disk, with an end-of-text after each document."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tensorstore as ts

from sophia_levanter.data.tokenizer import Tokenizer
from sophia_levanter.errors import InputError

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SHARD_TOKENS = 1 << 22  # one file
CHUNK_TOKENS = 1 << 14  # what one random read fetches and checks
IN_MEMORY_BYTES = 1 << 30  # smaller stores are read once and kept
CACHE_BYTES = 1 << 26  # for shard indices and chunks of the larger ones


@dataclass(frozen=True)
class Manifest:
    """What a token store holds. Written last, so that a store without one is unfinished."""

    format_version: int
    source: str
    tokenizer_name: str
    tokenizer_fingerprint: str
    num_documents: int
    num_tokens: int  # end-of-text included
    num_bytes: int  # of UTF-8 text
    digest: str  # BLAKE2b of all tokens, in the array's dtype


class TokenStore:
    """A finished token store, opened by `TokenStore.open`.

    Attributes:
        path: its directory.
        manifest: what it holds.
    """

    def __init__(self, path: Path, manifest: Manifest, array: ts.TensorStore) -> None:
        self.path = path
        self.manifest = manifest
        self._array = array

    @classmethod
    def open(cls, path: str | Path, tokenizer: Tokenizer | None = None) -> TokenStore:
        """Open the store at `path`.

        Args:
            path: its directory.
            tokenizer: if given, the store must have been written with it.

        Raises:
            InputError: if there is no finished store, it is damaged or of another format, or of another tokenizer.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        if tokenizer is not None and manifest.tokenizer_fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"{path}: the token store was written with the tokenizer {manifest.tokenizer_name} "
                f"({manifest.tokenizer_fingerprint}), not with {tokenizer.name} ({tokenizer.fingerprint}); "
                f"prepare the data with {tokenizer.name}"
            )
        try:
            array = ts.open(
                _spec(path),
                open=True,
                read=True,
                context=ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}}),
            ).result()
        except ValueError as error:
            raise _damaged(path, error) from error
        if array.shape != (manifest.num_tokens,):
            raise _damaged(path, f"{array.shape[0]} tokens where the manifest has {manifest.num_tokens}")
        return cls(path, manifest, array)

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        return self.manifest.num_documents

    @property
    def num_bytes(self) -> int:
        return self.manifest.num_bytes

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.manifest.tokenizer_fingerprint

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens in `[start, stop)`, uint16 or uint32 [position], read-only.

        Raises:
            IndexError: if the range is not within the store.
            InputError: if the store is damaged there.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) is not within the {self.num_tokens} tokens of {self.path}")
        if self._fits_in_memory:
            return self._tokens[start:stop]
        return self._fetch([slice(start, stop)])[0]

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `starts` on, int32 [window, position].

        Raises:
            IndexError: if a window is not within the store.
            InputError: if the store is damaged there.
        """
        if starts.size and (starts.min() < 0 or starts.max() + length > self.num_tokens):
            raise IndexError(f"a window is not within the {self.num_tokens} tokens of {self.path}")
        if self._fits_in_memory:
            return self._tokens[starts[:, None] + np.arange(length)].astype(np.int32)
        return np.stack(self._fetch([slice(start, start + length) for start in starts.tolist()])).astype(np.int32)

    @property
    def _fits_in_memory(self) -> bool:
        return self.num_tokens * self._array.dtype.numpy_dtype.itemsize < IN_MEMORY_BYTES

    @cached_property
    def _tokens(self) -> np.ndarray:
        return self._fetch([slice(0, self.num_tokens)])[0]

    def _fetch(self, ranges: list[slice]) -> list[np.ndarray]:
        futures = [self._array[tokens].read() for tokens in ranges]  # all at once: the reads overlap
        try:
            arrays = [future.result() for future in futures]
        except ValueError as error:
            raise _damaged(self.path, error) from error
        for array in arrays:
            array.flags.writeable = False
        return arrays


class TokenStoreWriter:
    """Writes a store at `path` document by document, holding one shard in memory. `finish` makes it a store.

    Raises:
        InputError: from any method, if the disk does not take it.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, source: str) -> None:
        self._path = path
        self._tokenizer = tokenizer
        self._source = source
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._buffer = np.empty(SHARD_TOKENS, self._dtype)
        self._filled = 0
        self._num_written = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self.num_documents = 0
        self.num_bytes = 0
        try:
            self._array = ts.open(_spec(path, self._dtype), create=True).result()
        except ValueError as error:
            raise _not_written(path, error) from error

    @property
    def num_tokens(self) -> int:
        return self._num_written + self._filled

    def append(self, tokens: np.ndarray, num_bytes: int) -> None:
        """Add a document of `tokens` (int [position], without end-of-text), `num_bytes` long as UTF-8."""
        self._put(tokens)
        self._put(np.array([self._tokenizer.end_of_text]))
        self.num_documents += 1
        self.num_bytes += num_bytes

    def finish(self) -> None:
        self._flush()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            source=self._source,
            tokenizer_name=self._tokenizer.name,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            num_bytes=self.num_bytes,
            digest=self._digest.hexdigest(),
        )
        try:
            with (self._path / MANIFEST_NAME).open("w", encoding="utf-8") as file:
                json.dump(asdict(manifest), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _not_written(self._path, error) from error

    def _put(self, tokens: np.ndarray) -> None:
        while tokens.size:
            taken = min(tokens.size, SHARD_TOKENS - self._filled)
            self._buffer[self._filled : self._filled + taken] = tokens[:taken]
            self._filled += taken
            tokens = tokens[taken:]
            if self._filled == SHARD_TOKENS:
                self._flush()

    def _flush(self) -> None:
        end = self._num_written + self._filled
        self._digest.update(self._buffer[: self._filled].data)
        try:
            self._array = self._array.resize(exclusive_max=[end]).result()
            self._array[self._num_written : end].write(self._buffer[: self._filled]).result()
        except ValueError as error:
            raise _not_written(self._path, error) from error
        self._num_written, self._filled = end, 0


def _spec(path: Path, dtype: np.dtype | None = None) -> dict:
    spec: dict = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/tokens/"},
        # Otherwise a chunk whose file is gone would read as zeros.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    if dtype is not None:
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        sharding = {"chunk_shape": [CHUNK_TOKENS], "codecs": codecs, "index_codecs": codecs}
        spec["metadata"] = {
            "shape": [0],
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD_TOKENS]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
    return spec


def _read_manifest(path: Path) -> Manifest:
    try:
        values = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no finished token store is there (no {MANIFEST_NAME})") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{MANIFEST_NAME}: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: a token store of format {version!r}, and this program reads {FORMAT_VERSION}; "
            "delete it and it is prepared again"
        )
    try:
        return Manifest(**values)
    except TypeError as error:
        raise _damaged(path, f"{MANIFEST_NAME}: {error}") from error


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(f"{path}: the token store is damaged ({reason}); delete it and it is prepared again")


def _not_written(path: Path, reason: object) -> InputError:
    return InputError(
        f"data.cache_dir: cannot write the token store {path} ({reason}); make room or choose another place"
    )
