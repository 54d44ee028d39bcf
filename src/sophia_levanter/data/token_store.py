"""Corpora of token ids, with an end-of-text token after each document, and a reader for token stores."""

from __future__ import annotations

import contextlib
import hashlib
import json
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from sophia_levanter.data.tokenizer import Tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.files import check_regular, write_atomically
from sophia_levanter.kvstore import array_spec, context_spec, read_file

FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
TOKENS, DOCUMENT_ENDS = "tokens", "document_ends"
RESULTS = "results"  # subfolder of the cache directory, with results for large corpora
SIDES = ("train", "validation")  # the two stores of a source that is split
IN_MEMORY_BYTES = 1 << 30  # smaller stores are read once and kept in memory
CACHE_BYTES = 1 << 26  # for shard indices and chunks of larger stores
READ_TOKENS = 1 << 22  # tokens per read when a whole corpus is read
MOST_READS = 3  # attempts to read tokens whose files keep changing


class Tokens(ABC):
    """A corpus of tokens: a token store, a file from another program, or a mixture of corpora.

    Attributes:
        location: its path or URL, for messages.
    """

    location: str

    @property
    @abstractmethod
    def num_tokens(self) -> int: ...

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """JSON values that identify the corpus. They are saved in checkpoints and compared when a run resumes."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens in `[start, stop)` as a read-only array, int [position].

        Raises:
            IndexError: if the range is not within the corpus.
            InputError: if the corpus is damaged in this range.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(
                f"[{start}, {stop}) is out of range for {self.location}, which has {self.num_tokens} tokens"
            )
        return self._read(start, stop)

    def read_sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the sequences of `length` tokens that begin at `starts`, int32 [sequence, position].

        Raises:
            IndexError: if a sequence is not within the corpus or, in a mixture, within one of its parts.
            InputError: if the corpus is damaged in these ranges.
        """
        if starts.size and (starts.min() < 0 or starts.max() + length > self.num_tokens):
            raise IndexError(f"a sequence is out of range for {self.location}, which has {self.num_tokens} tokens")
        return self._read_sequences(starts, length)

    @abstractmethod
    def _read(self, start: int, stop: int) -> np.ndarray: ...

    @abstractmethod
    def _read_sequences(self, starts: np.ndarray, length: int) -> np.ndarray: ...

    @abstractmethod
    def check_whole(self, cache_dir: Path) -> None:
        """Verify the whole corpus, which may take minutes.

        Results for large corpora are cached in `cache_dir`.

        Raises:
            InputError: if the corpus is damaged or invalid.
        """

    @abstractmethod
    def check_unchanged(self) -> None:
        """Reverify all files that have been modified since `check_whole`.

        Raises:
            InputError: if the corpus has changed.
        """


@dataclass(frozen=True)
class Manifest:
    """The description of a token store. It is written last, so a store without a manifest is unfinished."""

    format_version: int
    source: str
    tokenizer_name: str
    tokenizer_fingerprint: str
    num_documents: int
    num_tokens: int  # including end-of-text
    num_bytes: int  # of UTF-8 text
    digest: str  # BLAKE2b of all tokens, in the array's dtype
    document_ends_digest: str
    arrays: dict[str, str]  # BLAKE2b of each array's zarr.json
    checksum: str = ""  # BLAKE2b of all values above

    def with_checksum(self) -> Manifest:
        """Return the manifest with a checksum of its other values."""
        values = asdict(self) | {"checksum": ""}
        return replace(self, checksum=digest_of(json.dumps(values, sort_keys=True).encode()))


def digest_of(data: bytes | memoryview) -> str:
    """Return the 16-byte BLAKE2b digest of `data` in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class TokenStore(Tokens):
    """A finished token store, opened by `TokenStore.open`."""

    def __init__(self, location: str, manifest: Manifest, array: ts.TensorStore) -> None:
        self.location = location
        self.manifest = manifest
        self._array = array

    @classmethod
    def open(cls, location: str | Path, tokenizer: Tokenizer | None = None) -> TokenStore:
        """Open the store at `location`.

        Args:
            location: the store's directory: a path, or a URL that tensorstore can read, such as gs://bucket/folder.
            tokenizer: the tokenizer that the store must have been written with, if given.

        Raises:
            InputError: if the store is unfinished, damaged, in another format, or from another tokenizer.
        """
        location = str(location).rstrip("/")
        manifest = _read_manifest(location)
        if tokenizer is not None and manifest.tokenizer_fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"{location}: the token store was written with the tokenizer {manifest.tokenizer_name} "
                f"({manifest.tokenizer_fingerprint}), not with {tokenizer.name} ({tokenizer.fingerprint}); "
                f"prepare the data with {tokenizer.name}"
            )
        for name, digest in manifest.arrays.items():
            if digest_of(read_file(location, f"{name}/zarr.json") or b"") != digest:
                raise _damaged(location, f"{name}/zarr.json has changed since it was written")
        array = _open(location, TOKENS, manifest.num_tokens)
        return cls(location, manifest, array)

    @property
    def path(self) -> Path:
        """`location` as a path; only valid for a store on disk."""
        return Path(self.location)

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        return self.manifest.num_documents

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the tokens: uint16 or uint32."""
        return self._array.dtype.numpy_dtype

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "tokenizer": self.manifest.tokenizer_fingerprint,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "digest": self.manifest.digest,
        }

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop] if self._fits_in_memory else self._fetch([slice(start, stop)])[0]

    def _read_sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        if self._fits_in_memory:
            return self._tokens[starts[:, None] + np.arange(length)].astype(np.int32)
        return np.stack(self._fetch([slice(start, start + length) for start in starts.tolist()])).astype(np.int32)

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of a document without end-of-text, uint16 or uint32 [position]. `number` counts from 0.

        Raises:
            IndexError: if the number is out of range.
            InputError: if the document is damaged.
        """
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} is out of range; {self.location} has {self.num_documents} documents")
        ends = self.document_ends(max(number - 1, 0), number + 1).tolist()
        return self.read(ends[0] if number else 0, ends[-1] - 1)

    def document_ends(self, first: int, last: int) -> np.ndarray:
        """Return the index after the end-of-text token of each document in `[first, last)`, int64 [document].

        Raises:
            InputError: if these indices are damaged.
        """
        try:
            array = _open(self.location, DOCUMENT_ENDS, self.num_documents)
            return array[first:last].read().result().astype(np.int64)
        except ValueError as error:
            raise _damaged(self.location, error) from error

    def verify(self) -> None:
        """Read everything and compare it with the manifest.

        Raises:
            InputError: if the store is damaged.
        """
        self._check_digest(tokens_digest(self._array, self.location))
        ends = _open(self.location, DOCUMENT_ENDS, self.num_documents)
        if tokens_digest(ends, self.location) != self.manifest.document_ends_digest:
            raise _damaged(self.location, "the document ends have changed since they were written")

    def check_whole(self, cache_dir: Path) -> None:
        if self._fits_in_memory:
            _ = self._tokens
            return
        key = [self.location, self._status]
        found = remembered(cache_dir if self._status else None, key, self._read_all)
        self._check_digest(found["digest"])
        self.check_unchanged()

    def check_unchanged(self) -> None:
        if self._fits_in_memory:
            return
        for _ in range(MOST_READS):
            now = self._files()  # a deleted file is detected when it is read
            if all(now.get(name, status) == status for name, status in self._status.items()):
                return
            self._check_digest(self._read_all()["digest"])
            self._status = self._status | now
        raise _damaged(self.location, "its files keep changing during the run")

    @cached_property
    def _status(self) -> dict[str, list[int]]:
        return self._files()

    def _files(self) -> dict[str, list[int]]:
        """Return the inode, size and timestamps of each token file, or an empty dict for a store at a URL."""
        if "://" in self.location:
            return {}
        found = {}
        for path in sorted(self.path.joinpath(TOKENS).rglob("*")):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    found[str(path)] = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        return found

    def _read_all(self) -> dict[str, str]:
        # Open the array without the chunk cache, which is for random reads.
        return {"digest": tokens_digest(open_array(f"{self.location}/{TOKENS}"), self.location)}

    def _check_digest(self, digest: str) -> None:
        if digest != self.manifest.digest:
            raise _damaged(self.location, "the tokens have changed since they were written")

    @property
    def _fits_in_memory(self) -> bool:
        return self.num_tokens * self.dtype.itemsize < IN_MEMORY_BYTES

    @cached_property
    def _tokens(self) -> np.ndarray:
        (tokens,) = self._fetch([slice(0, self.num_tokens)])
        self._check_digest(digest_of(tokens.data))
        return tokens

    def _fetch(self, ranges: list[slice]) -> list[np.ndarray]:
        futures = [self._array[tokens].read() for tokens in ranges]  # all at once, so that the reads overlap
        try:
            arrays = [future.result() for future in futures]
        except ValueError as error:
            raise _damaged(self.location, error) from error
        for array in arrays:
            array.flags.writeable = False
        return arrays


def open_array(location: str, cache_bytes: int = 0) -> ts.TensorStore:
    """Open the array at a path or URL for reading.

    Raises:
        NotRegular: if one of its files is not a regular file.
        ValueError: if the array does not exist or cannot be read.
    """
    for path in Path(location).rglob("*") if "://" not in location else ():
        if not path.is_dir():
            check_regular(path)
    context = ts.Context(context_spec(cache_bytes))
    return ts.open(array_spec(location), open=True, read=True, context=context).result()


def tokens_digest(array: ts.TensorStore, location: str) -> str:
    """Return the BLAKE2b digest of a whole array, reading it in pieces.

    Raises:
        InputError: if the array is damaged.
    """
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, array.shape[0], READ_TOKENS):
        try:
            tokens = array[start : min(start + READ_TOKENS, array.shape[0])].read().result()
            digest.update(np.ascontiguousarray(tokens).data)
        except ValueError as error:
            raise _damaged(location, error) from error
    return digest.hexdigest()


def _open(location: str, name: str, length: int) -> ts.TensorStore:
    try:
        array = open_array(f"{location}/{name}", CACHE_BYTES)
    except ValueError as error:
        raise _damaged(location, error) from error
    if array.shape != (length,):
        raise _damaged(location, f"it has {array.shape[0]} {name}, but the manifest specifies {length}")
    return array


def _read_manifest(location: str) -> Manifest:
    try:
        content = read_file(location, MANIFEST_NAME)
    except ValueError as error:
        raise InputError(f"{location}: the token store cannot be read: {error}") from error
    if content is None:
        raise InputError(f"{location} contains no finished token store (no {MANIFEST_NAME})")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(location, f"{MANIFEST_NAME}: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{location}: the token store has format {version!r}, but this version reads format {FORMAT_VERSION}; "
            "delete it and prepare the data again"
        )
    try:
        manifest = Manifest(**values)
    except TypeError as error:
        raise _damaged(location, f"{MANIFEST_NAME}: {error}") from error
    if manifest.with_checksum() != manifest:
        raise _damaged(location, f"{MANIFEST_NAME} has changed since it was written")
    return manifest


def _damaged(location: str, reason: object) -> InputError:
    return InputError(f"{location}: the token store is damaged ({reason}); delete it and prepare the data again")


def remembered(cache_dir: Path | None, key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `compute`, a JSON object, from a cache on disk if possible.

    Args:
        cache_dir: the cache directory. If it is not writable, results are not saved. None disables caching.
        key: a JSON value covering everything that the result depends on.
        compute: the function that computes the result, which may be slow.
    """
    if cache_dir is None:
        return compute()
    path = cache_dir / RESULTS / digest_of(json.dumps(key).encode())
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    result = compute()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(result).encode())
    return result
