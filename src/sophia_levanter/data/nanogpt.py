"""Token files written by other programs (nanoGPT, llm.c and NumPy), read in place."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from sophia_levanter.data.token_store import MOST_READS, READ_TOKENS, Tokens, remembered
from sophia_levanter.data.tokenizer import Tokenizer, printable
from sophia_levanter.errors import InputError
from sophia_levanter.files import open_regular, read_regular

NANOGPT = "nanogpt:"
DTYPES = ("uint16", "uint32")
NPY_MAGIC = b"\x93NUMPY"
# Shards from llm.c and modded-nanogpt begin with 256 int32 numbers. Only the first three are meaningful.
HEADER_INTS = 256
# Magic number -> version and token dtype. The third number in the header is the token count.
HEADERS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
META = "meta.pkl"
META_BYTES = 1 << 26
UINT16_IDS = 1 << 16
REMEMBERED_TOKENS = 1 << 26  # results for smaller files are not cached
SHOWN_TOKENS = 16
DIGEST_PIECES = 64
DIGEST_PIECE_BYTES = 1 << 16


class _TokenFile:
    """Token ids in a file, read slice by slice.

    The file is not memory-mapped, because the system kills the process if a mapped file is truncated.
    """

    def __init__(self, path: Path, dtype: np.dtype, length: int, *, offset: int, where: str) -> None:
        self.dtype = dtype
        self._file = path.open("rb")
        self._length = length
        self._offset = offset
        self._where = where
        self.opened_as = self.status

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(self._length)
        tokens = np.empty(max(stop - start, 0), self.dtype)
        left = tokens.view(np.uint8).data
        while left:
            at = self._offset + stop * self.dtype.itemsize - len(left)
            count = os.preadv(self._file.fileno(), [left], at)
            if not count:
                raise InputError(f"{self._where} was truncated after it was opened; copy or download it again")
            left = left[count:]
        tokens.flags.writeable = False
        return tokens

    @property
    def status(self) -> list[int]:
        """Device, inode, size and modification time, which show whether the file has been written to."""
        now = os.fstat(self._file.fileno())
        return [now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns]


class NanogptTokens(Tokens):
    """A file of token ids, read in place.

    The file is a NumPy array (.npy), a shard with an llm.c header, or a file without a header, such as one from
    nanoGPT. A file without a header is read as uint16, or as uint32 with `?dtype=uint32`.

    Args:
        source: `nanogpt:FILE` or `nanogpt:FILE?dtype=uint32`.
        tokenizer: the tokenizer that is assumed to have produced the ids.
        field: the config field to name in error messages.
        cache_dir: the directory in which results for large files are cached, so that the files are read only once.

    Raises:
        InputError: if the file does not exist, or if this tokenizer cannot have produced its ids.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, field: str, cache_dir: Path | None = None) -> None:
        name, dtype = _parsed(source, field)
        self.path = Path(os.path.abspath(os.path.expanduser(name)))
        self.location = str(self.path)
        self._tokenizer = tokenizer
        self._where = f"{field}: {self.path}"
        self._cache_dir = cache_dir
        try:
            self._tokens = self._opened(dtype)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise InputError(
                f"{self._where}: {reason}; specify a file of token ids, such as {NANOGPT}train.bin"
            ) from error
        if self._tokens.dtype.itemsize <= 2 and tokenizer.vocab_size > UINT16_IDS:
            raise InputError(
                f"{self._where}: two-byte ids cannot come from data.tokenizer {tokenizer.name}, which has "
                f"{tokenizer.vocab_size} ids; if the file contains four-byte ids, use "
                f"{NANOGPT}{self.path.name}?dtype=uint32; otherwise, specify the tokenizer that produced it"
            )
        self._check_meta()

    def _opened(self, dtype: str | None) -> _TokenFile:
        with open_regular(self.path) as file:
            begin = file.read(4 * HEADER_INTS)
        if begin.startswith(NPY_MAGIC):
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            if array.ndim != 1 or array.dtype.kind not in "ui" or not array.size:
                raise InputError(
                    f"{self._where} is an array with dtype {array.dtype} and shape {array.shape}; "
                    "token ids must be a one-dimensional array of integers, such as "
                    "tokens.reshape(-1).astype(numpy.uint16)"
                )
            tokens = _TokenFile(self.path, array.dtype, array.size, offset=array.offset, where=self._where)
            return self._agreeing(tokens, dtype)
        size = self.path.stat().st_size
        header = np.frombuffer(begin, "<i4") if len(begin) == 4 * HEADER_INTS else np.zeros(HEADER_INTS, "<i4")
        magic, version, count = header[:3].tolist()
        if magic in HEADERS:
            known, of_header = HEADERS[magic]
            if version != known:
                raise InputError(
                    f"{self._where} has an llm.c header ({magic}) with version {version}; "
                    f"only version {known} is supported"
                )
            tokens = self._array(size, of_header, offset=len(begin))
            if count != len(tokens):
                raise InputError(
                    f"{self._where} has {len(tokens)} tokens, but its header specifies {count}; "
                    "copy or download it again"
                )
            return self._agreeing(tokens, dtype)
        tokens = self._array(size, dtype or "uint16", offset=0)
        if len(tokens) < 4 or len(tokens) % 2 or tokens[:READ_TOKENS][1::2].any():
            return tokens
        if tokens.dtype.itemsize == 4 or (not len(tokens) % 4 and not tokens[:READ_TOKENS][2::4].any()):
            if dtype != "uint16":
                raise InputError(
                    f"{self._where} contains eight-byte ids (int64); convert them with "
                    f"numpy.fromfile({self.path.name!r}, 'int64').astype('uint32').tofile(NEW_FILE)"
                )
        elif dtype is None:
            raise InputError(
                f"{self._where}: every second uint16 value is 0, as in a uint32 file; use "
                f"{NANOGPT}{self.path.name}?dtype=uint32, or ?dtype=uint16 if the file is correct"
            )
        return tokens

    def _array(self, size: int, dtype: str, *, offset: int) -> _TokenFile:
        item = np.dtype(dtype).itemsize
        if size <= offset or (size - offset) % item:
            raise InputError(
                f"{self._where} has {size - offset} bytes of tokens, but {dtype} ids require a positive multiple of "
                f"{item}; copy or download it again"
            )
        little = np.dtype(dtype).newbyteorder("<")
        return _TokenFile(self.path, little, (size - offset) // item, offset=offset, where=self._where)

    def _agreeing(self, tokens: _TokenFile, dtype: str | None) -> _TokenFile:
        if dtype is not None and tokens.dtype != np.dtype(dtype):
            raise InputError(f"{self._where}: the header specifies dtype {tokens.dtype}, not {dtype}; remove ?dtype=")
        return tokens

    def _check_meta(self) -> None:
        """Reject the file if nanoGPT's `meta.pkl` next to it describes a different vocabulary."""
        meta = _read_meta(self.path.with_name(META), self._where)
        if "stoi" in meta:
            raise InputError(
                f"{self._where}: according to the {META} next to it, its ids encode characters, which data.tokenizer "
                f"{self._tokenizer.name} cannot decode; specify the original text instead, such as input.txt"
            )
        size = meta.get("vocab_size", self._tokenizer.vocab_size)
        if not isinstance(size, int | str):  # a nested value may take forever to print
            size = type(size).__name__
        if size != self._tokenizer.vocab_size:
            raise InputError(
                f"{self._where}: according to the {META} next to it, there are {size!r} ids, but data.tokenizer "
                f"{self._tokenizer.name} has {self._tokenizer.vocab_size}; specify the tokenizer that produced the file"
            )

    def check(self, report: Callable[[str], None]) -> None:
        """Check all ids in the file, and report the text of its first tokens.

        Raises:
            InputError: if the file contains an id that is not in the tokenizer's vocabulary.
        """
        self._checked(np.array(self._contents["range"]))
        begin = printable(self._tokenizer.decode(self._tokens[:SHOWN_TOKENS]))
        report(f"{self._where}: {self.num_tokens:,} {self._tokens.dtype.name} tokens, beginning with {begin!r}")

    def check_whole(self, cache_dir: Path) -> None:
        pass  # `check` has already read the whole file

    def check_unchanged(self) -> None:
        now = self._tokens.status
        if now == self._tokens.opened_as:
            return
        known = vars(self).get("_contents")  # the cached property below
        if known is None or self._read_all() != known:
            raise InputError(f"{self._where} changed after it was opened; restore the file and restart the run")
        self._tokens.opened_as = now

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @cached_property
    def _contents(self) -> dict[str, Any]:
        """A digest of all ids, and the smallest and largest ids."""
        is_large = self.num_tokens >= REMEMBERED_TOKENS
        key = [str(self.path), *self._tokens.opened_as, self._tokens.dtype.str, self.num_tokens]
        return remembered(self._cache_dir if is_large else None, key, self._read_all)

    def _read_all(self) -> dict[str, Any]:
        for _ in range(MOST_READS):
            status = self._tokens.status
            found = self._read_once()
            if self._tokens.status == status:
                return found
        raise InputError(f"{self._where} keeps changing while it is being read; start the run once it is complete")

    def _read_once(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        least, greatest = [], []
        for start in range(0, self.num_tokens, READ_TOKENS):
            tokens = self._tokens[start : start + READ_TOKENS]
            digest.update(tokens.data)
            least.append(int(tokens.min()))
            greatest.append(int(tokens.max()))
        return {"digest": digest.hexdigest(), "range": [min(least), max(greatest)]}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Values that identify the file. Checkpoints from earlier versions contain only a digest of sampled pieces."""
        digest = hashlib.blake2b(digest_size=16)
        items = DIGEST_PIECE_BYTES // self._tokens.dtype.itemsize
        for start in np.linspace(0, max(self.num_tokens - items, 0), DIGEST_PIECES).astype(np.int64).tolist():
            digest.update(self._tokens[start : start + items].data)
        return {
            "tokenizer": self._tokenizer.fingerprint,
            "tokens": self.num_tokens,
            "digest": self._contents["digest"],
            "digest_of_samples": digest.hexdigest(),
        }

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._checked(self._tokens[start:stop])

    def _read_sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        sequences = [self._tokens[start : start + length] for start in starts.tolist()]
        return self._checked(np.stack(sequences)).astype(np.int32)

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        for token in (int(tokens.min()), int(tokens.max())) if tokens.size else ():
            if not 0 <= token < self._tokenizer.vocab_size:
                raise InputError(
                    f"{self._where} contains token id {token}, but data.tokenizer {self._tokenizer.name} has "
                    f"{self._tokenizer.vocab_size} ids; specify the tokenizer that produced the file, such as gpt2"
                )
        return tokens


def _parsed(source: str, field: str) -> tuple[str, str | None]:
    """Return the path and the dtype in `nanogpt:FILE?dtype=uint32`."""
    name, _, query = source.removeprefix(NANOGPT).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    dtype = options.pop("dtype", None)
    if options or (dtype is not None and dtype not in DTYPES):
        raise InputError(
            f"{field}: {source!r}: ?{query} is not a valid option; use ?dtype={' or ?dtype='.join(DTYPES)}"
        )
    return name, dtype


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler for numbers, strings, lists and dicts. It never imports or calls anything named in a pickle."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_meta(path: Path, where: str) -> dict[Any, Any]:
    """Return the content of nanoGPT's `meta.pkl`, or an empty dict if the file does not exist."""
    try:
        meta = _PlainUnpickler(io.BytesIO(read_regular(path, META_BYTES))).load()
    except FileNotFoundError:
        return {}
    except Exception as error:  # a damaged pickle may raise any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{where}: the {META} next to it is not a nanoGPT {META} ({reason}); move it elsewhere if it "
            "does not describe this file"
        ) from error
    if not isinstance(meta, dict):
        raise InputError(
            f"{where}: the {META} next to it contains a {type(meta).__name__}, not a dict; move it elsewhere"
        )
    return meta
