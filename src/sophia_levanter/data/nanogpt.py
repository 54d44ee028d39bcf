"""Token files that other programs wrote, used where they are: nanoGPT's, llm.c's and NumPy's."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from sophia_levanter.data.names import NANOGPT
from sophia_levanter.data.tokenizer import Tokenizer, printable
from sophia_levanter.errors import InputError

DTYPES = ("uint16", "uint32")
NPY_MAGIC = b"\x93NUMPY"
# Shards of llm.c and modded-nanogpt begin with 256 int32 numbers; only the first three have a meaning.
HEADER_INTS = 256
# Magic number -> version and token dtype. The third number of the header counts the tokens.
HEADERS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
META = "meta.pkl"
META_BYTES = 1 << 26
UINT16_IDS = 1 << 16
READ_TOKENS = 1 << 22  # at once, where all are read
SHOWN_TOKENS = 16
DIGEST_PIECES = 64
DIGEST_PIECE_BYTES = 1 << 16


class NanogptTokens:
    """A file of token ids, one after the other, by memory map.

    It is an array of NumPy (.npy), a shard with the header of llm.c, or has no header, as nanoGPT writes it: then the
    ids are uint16 unless `?dtype=uint32` is given.

    Args:
        source: `nanogpt:FILE` or `nanogpt:FILE?dtype=uint32`.
        tokenizer: what the ids are taken to be of.
        field: the config field to name in errors.

    Raises:
        InputError: if the file does not exist, or this tokenizer cannot have made it.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, field: str) -> None:
        name, dtype = _parsed(source, field)
        self._path = Path(os.path.abspath(os.path.expanduser(name)))
        self._tokenizer = tokenizer
        self._where = f"{field}: {self._path}"
        try:
            self._tokens = self._mapped(dtype)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise InputError(f"{self._where}: {reason}; {NANOGPT}FILE.bin names a file of token ids") from error
        if self._tokens.dtype.itemsize <= 2 and tokenizer.vocab_size > UINT16_IDS:
            raise InputError(
                f"{self._where}: ids of two bytes cannot be of data.tokenizer {tokenizer.name}, which has "
                f"{tokenizer.vocab_size} ids; if those of the file have four bytes, write "
                f"{NANOGPT}{self._path.name}?dtype=uint32, otherwise name the tokenizer that made it"
            )
        self._check_meta()

    def _mapped(self, dtype: str | None) -> np.ndarray:
        with self._path.open("rb") as file:
            begin = file.read(4 * HEADER_INTS)
        if begin.startswith(NPY_MAGIC):
            tokens = np.load(self._path, mmap_mode="r", allow_pickle=False)
            if tokens.ndim != 1 or tokens.dtype.kind not in "ui" or not tokens.size:
                raise InputError(
                    f"{self._where} is an array of {tokens.dtype} with the shape {tokens.shape}; "
                    "token ids are one axis of integers, such as tokens.reshape(-1).astype(numpy.uint16)"
                )
            return self._agreeing(tokens, dtype)
        size = self._path.stat().st_size
        header = np.frombuffer(begin, "<i4") if len(begin) == 4 * HEADER_INTS else np.zeros(HEADER_INTS, "<i4")
        magic, version, count = header[:3].tolist()
        if magic in HEADERS:
            known, of_header = HEADERS[magic]
            if version != known:
                raise InputError(
                    f"{self._where} has the header of llm.c, {magic}, with version {version}; only {known} is read"
                )
            tokens = self._array(size, of_header, offset=len(begin))
            if count != len(tokens):
                raise InputError(
                    f"{self._where} has {len(tokens)} tokens, and its header says {count}; copy or download it again"
                )
            return self._agreeing(tokens, dtype)
        tokens = self._array(size, dtype or "uint16", offset=0)
        if dtype is None and len(tokens) >= 4 and not len(tokens) % 2 and not tokens[1:READ_TOKENS:2].any():
            raise InputError(
                f"{self._where}: every second uint16 is 0, as in a file of uint32; write "
                f"{NANOGPT}{self._path.name}?dtype=uint32, or ?dtype=uint16 if the file is correct"
            )
        return tokens

    def _array(self, size: int, dtype: str, *, offset: int) -> np.ndarray:
        item = np.dtype(dtype).itemsize
        if size <= offset or (size - offset) % item:
            raise InputError(
                f"{self._where} has {size - offset} bytes of tokens, and {dtype} ids need a multiple of {item} above "
                "0; copy or download it again"
            )
        return np.memmap(self._path, np.dtype(dtype).newbyteorder("<"), mode="r", offset=offset)

    def _agreeing(self, tokens: np.ndarray, dtype: str | None) -> np.ndarray:
        if dtype is not None and tokens.dtype != np.dtype(dtype):
            raise InputError(f"{self._where} has a header with dtype {tokens.dtype}, not {dtype}; remove ?dtype=")
        return tokens

    def _check_meta(self) -> None:
        """Refuses a file beside which nanoGPT wrote that the ids are of another vocabulary."""
        meta = _read_meta(self._path.with_name(META), self._where)
        if "stoi" in meta:
            raise InputError(
                f"{self._where}: {META} beside it says that its ids are characters, which data.tokenizer "
                f"{self._tokenizer.name} cannot read; name the text that it was made from, such as input.txt"
            )
        size = meta.get("vocab_size", self._tokenizer.vocab_size)
        if size != self._tokenizer.vocab_size:
            raise InputError(
                f"{self._where}: {META} beside it says that there are {size!r} ids, and data.tokenizer "
                f"{self._tokenizer.name} has {self._tokenizer.vocab_size}; name the tokenizer that made the file"
            )

    def check(self, report: Callable[[str], None]) -> None:
        """Reads all of the file, and reports how it begins.

        Raises:
            InputError: if there is an id that the tokenizer does not have.
        """
        for start in range(0, self.num_tokens, READ_TOKENS):
            self._checked(self._tokens[start : start + READ_TOKENS])
        begin = printable(self._tokenizer.decode(self._tokens[:SHOWN_TOKENS]))
        report(f"{self._where}: {self.num_tokens:,} tokens of {self._tokens.dtype.name}; begins: {begin!r}")

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it from other files: a digest of some pieces, since all of it may be 18 GB."""
        digest = hashlib.blake2b(digest_size=16)
        items = DIGEST_PIECE_BYTES // self._tokens.dtype.itemsize
        for start in np.linspace(0, max(self.num_tokens - items, 0), DIGEST_PIECES).astype(np.int64).tolist():
            digest.update(np.ascontiguousarray(self._tokens[start : start + items]).data)
        return {
            "tokenizer": self._tokenizer.fingerprint,
            "tokens": self.num_tokens,
            "digest_of_samples": digest.hexdigest(),
        }

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens in `[start, stop)`, [position], in the file's type, read-only.

        Raises:
            IndexError: if the range is not within the file.
            InputError: if the file was overwritten with ids that the tokenizer does not have.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) is not within the {self.num_tokens} tokens of {self._path}")
        return self._checked(np.asarray(self._tokens[start:stop]))

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `starts` on, int32 [window, position].

        Raises:
            IndexError: if a window is not within the file.
            InputError: if the file was overwritten with ids that the tokenizer does not have.
        """
        if starts.size and (starts.min() < 0 or starts.max() + length > self.num_tokens):
            raise IndexError(f"a window is not within the {self.num_tokens} tokens of {self._path}")
        windows = [np.asarray(self._tokens[start : start + length]) for start in starts.tolist()]
        return self._checked(np.stack(windows)).astype(np.int32)

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        for token in (int(tokens.min()), int(tokens.max())) if tokens.size else ():
            if not 0 <= token < self._tokenizer.vocab_size:
                raise InputError(
                    f"{self._where} holds the token id {token}, and data.tokenizer {self._tokenizer.name} has "
                    f"{self._tokenizer.vocab_size} ids; name the tokenizer that made the file, such as gpt2"
                )
        return tokens


def _parsed(source: str, field: str) -> tuple[str, str | None]:
    """The path and the dtype in `nanogpt:FILE?dtype=uint32`."""
    name, _, query = source.removeprefix(NANOGPT).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    dtype = options.pop("dtype", None)
    if options or (dtype is not None and dtype not in DTYPES):
        raise InputError(f"{field}: {source!r}: ?{query} is not understood; write ?dtype={' or ?dtype='.join(DTYPES)}")
    return name, dtype


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; nothing that a pickle can name is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_meta(path: Path, where: str) -> dict[Any, Any]:
    """What nanoGPT's `meta.pkl` says; nothing if there is none."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > META_BYTES:
                raise pickle.UnpicklingError(f"it has more than {META_BYTES} bytes")
            meta = _PlainUnpickler(file).load()
    except FileNotFoundError:
        return {}
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{where}: {META} beside it is not as nanoGPT writes it ({reason}); move it away if the ids are not of it"
        ) from error
    if not isinstance(meta, dict):
        raise InputError(f"{where}: {META} beside it holds a {type(meta).__name__}, not a dict; move it away")
    return meta
