"""Tokenizers: plain bytes, and byte-pair encodings from tiktoken or `train_bpe`."""

from __future__ import annotations

import base64
import difflib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import tiktoken
from draccus import ChoiceRegistry
from tiktoken_ext.openai_public import r50k_pat_str

from sophia_levanter.config.settings import check_subclass
from sophia_levanter.data.text_files import TRAINED_TOKENIZER
from sophia_levanter.errors import CONTROLS, InputError
from sophia_levanter.files import read_regular

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256
PIECE_CHARACTERS = 100_000
# The vocabulary sizes of well-known encodings, so that looking them up does not require a download.
VOCAB_SIZES = {"gpt2": 50257, "r50k_base": 50257, "p50k_base": 50281, "cl100k_base": 100277, "o200k_base": 200019}


class Tokenizer(ABC, ChoiceRegistry):
    """A fixed mapping between text and ids in `[0, vocab_size)`.

    For `data.tokenizer: NAME` or `NAME:PATH`, the subclass registered as NAME is called with the whole string.

    Attributes:
        name: the name to pass to `load_tokenizer`.
        vocab_size: the number of ids.
        end_of_text: the id that ends a document.
        token_bytes: the bytes that each of the `vocab_size` ids decodes to; empty for end-of-text, other special tokens
            and unused ids.
        special_tokens: the ids of the special tokens, including end-of-text, keyed by name.
        pattern: the regular expression that splits text into words; tokens never cross word boundaries. It is empty if
            text is not split.
        fingerprint: a hash of the encoding. It is the same for two tokenizers only if their ids have the same meaning.
        is_slow: whether encoding is slow enough to benefit from several processes.
        merges_bytes: whether this is a byte-pair encoding defined by `token_bytes` and `pattern`.
    """

    is_slow = True
    merges_bytes: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        end_of_text: int,
        token_bytes: Sequence[bytes],
        *,
        special_tokens: Mapping[str, int],
        pattern: str,
    ) -> None:
        self.name = name
        self.vocab_size = len(token_bytes)
        self.end_of_text = end_of_text
        self.token_bytes = token_bytes
        self.special_tokens = special_tokens
        self.pattern = pattern
        digest = hashlib.blake2b(f"{end_of_text} {pattern}".encode(), digest_size=16)
        for token in token_bytes:
            digest.update(len(token).to_bytes(4, "little") + token)
        self.fingerprint = digest.hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """The dtype of ids in a token store: uint16 if all ids fit, otherwise uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Encode `text` as ids, int32 [position]. Special tokens spelled out in it are treated as ordinary text."""

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """Decode `tokens` to bytes. End-of-text decodes to no bytes.

        Raises:
            ValueError: if an id is not in `[0, vocab_size)`.
        """
        return b"".join(self.token_bytes[token] for token in self._checked(tokens).tolist())

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decode `tokens` to text, with U+FFFD in place of bytes that are not valid UTF-8."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def _checked(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(
                f"token ids must be in [0, {self.vocab_size}), but they range from {ids.min()} to {ids.max()}"
            )
        return ids


@Tokenizer.register_subclass(BYTES)
class ByteTokenizer(Tokenizer):
    """A tokenizer whose ids 0 to 255 are the bytes of UTF-8 text, and whose id 256 is end-of-text."""

    is_slow = False
    merges_bytes = True

    def __init__(self, name: str = BYTES) -> None:
        if name != BYTES:
            raise InputError(f"data.tokenizer is {name!r}; did you mean {BYTES}?")
        values = [bytes([value]) for value in range(NUM_BYTES)]
        super().__init__(BYTES, NUM_BYTES, [*values, b""], special_tokens={END_OF_TEXT: NUM_BYTES}, pattern="")

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int32)


class TiktokenTokenizer(Tokenizer):
    """A tokenizer that wraps a tiktoken `Encoding`.

    Raises:
        InputError: if the encoding has no end-of-text token.
    """

    merges_bytes = True

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        try:
            end_of_text = encoding.eot_token
        except KeyError:
            raise InputError(
                f"data.tokenizer: {encoding.name} has no <|endoftext|> token; choose a tokenizer that has one"
            ) from None
        self._encoding = encoding
        # tiktoken exposes the pattern that splits text into words only as a private attribute.
        super().__init__(
            encoding.name,
            end_of_text,
            _token_bytes(encoding),
            special_tokens={name: encoding.encode_single_token(name) for name in encoding.special_tokens_set},
            pattern=encoding._pat_str,
        )

    def encode(self, text: str) -> np.ndarray:
        try:
            return self._encode(text)
        except ValueError as error:
            if len(text) <= PIECE_CHARACTERS or isinstance(error, UnicodeError):
                raise
            # The pattern that splits text into words fails on a run of a million spaces, but not on shorter pieces.
            pieces = [text[i : i + PIECE_CHARACTERS] for i in range(0, len(text), PIECE_CHARACTERS)]
            return np.concatenate([self._encode(piece) for piece in pieces])

    def _encode(self, text: str) -> np.ndarray:
        try:
            # Ask for an array, because converting a list takes longer than encoding. Treat no token as special.
            ids = self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, for example from a command line
            return np.array(self._encoding.encode_ordinary(text), dtype=np.int32)
        return ids.astype(np.int32)


def load_bpe(path: str) -> tiktoken.Encoding:
    """Load an encoding written by `save_bpe`. End-of-text has the highest id.

    Raises:
        InputError: if the file does not exist or is not in tiktoken's format.
    """
    try:
        # Do not use tiktoken's loader, which caches the content that it first reads from a path.
        lines = (line.split() for line in read_regular(path).splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if set(ranks.values()) != set(range(len(ranks))) or any(
            bytes([byte]) not in ranks for byte in range(NUM_BYTES)
        ):
            raise ValueError("some ranks, or some of the 256 bytes, are missing")
        return tiktoken.Encoding(
            path, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
        )
    except OSError as error:
        raise InputError(f"data.tokenizer: {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"data.tokenizer: {path} is not in tiktoken's format: {error}") from error


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer by name.

    The name is a registered tokenizer such as `bytes`, a tiktoken encoding such as `gpt2`, or a file written by
    `save_bpe`. tiktoken downloads an encoding on first use and stores it in its own cache.

    Raises:
        InputError: if the tokenizer is unknown, or can be neither downloaded nor found in tiktoken's cache.
    """
    if name.endswith(TRAINED_TOKENIZER):
        return TiktokenTokenizer(load_bpe(name))
    registered = Tokenizer.get_known_choices()
    if kind := registered.get(name.partition(":")[0]):
        check_subclass(kind, Tokenizer, "data.tokenizer")
        return kind(name)
    if "/" in name or "." in name:
        raise InputError(
            f"data.tokenizer is {name!r}; a tokenizer file must be written by train_tokenizer and end in "
            f"{TRAINED_TOKENIZER}; otherwise, specify {BYTES} or a tiktoken encoding"
        )
    known = [*registered, *tiktoken.list_encoding_names()]
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise InputError(
            f"data.tokenizer is {name!r}; did you mean {nearest}? Available tokenizers: {', '.join(known)}"
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        # Show only the type of the error, because messages from network libraries may contain a proxy password.
        raise InputError(
            f"data.tokenizer: {name} is not in tiktoken's cache and could not be downloaded ({type(error).__name__}); "
            f"check the network, set TIKTOKEN_CACHE_DIR to a folder that contains it, or set data.tokenizer to {BYTES}"
        ) from error
    return TiktokenTokenizer(encoding)


def vocab_size_of(name: str) -> int:
    """Return the vocabulary size of the tokenizer called `name`, without loading it if it is well known.

    Raises:
        InputError: under the same conditions as `load_tokenizer`.
    """
    return VOCAB_SIZES.get(name) or load_tokenizer(name).vocab_size


def printable(text: str) -> str:
    """Replace control characters other than newlines and tabs with U+FFFD, so that text cannot control the terminal."""
    return CONTROLS.sub(lambda found: found[0] if found[0] in "\n\t" else "\N{REPLACEMENT CHARACTER}", text)


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Return the number of text bytes that each id represents, int32 [vocab]; 0 for end-of-text."""
    return np.array([len(token) for token in tokenizer.token_bytes], dtype=np.int32)


def _token_bytes(encoding: tiktoken.Encoding) -> list[bytes]:
    table = []
    for token in range(encoding.n_vocab):
        try:
            special = encoding.is_special_token(token)
            table.append(b"" if special else encoding.decode_single_token_bytes(token))
        except KeyError:  # some encodings leave ids unused
            table.append(b"")
    return table
