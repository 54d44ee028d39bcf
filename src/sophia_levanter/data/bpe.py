"""A byte-pair encoding trained on a text, as a tiktoken encoding with GPT-2's way to cut text into words."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from sophia_levanter.data.text_files import optional_import
from sophia_levanter.errors import InputError
from sophia_levanter.files import read_regular, write_atomically

END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """The rank of each token: the 256 bytes, and what was merged from them, in the order of merging.

    Args:
        texts: what to train on, held in memory one at a time; distinct words are counted.
        vocab_size: tokens, end-of-text included; fewer are found if the text has no more pairs.

    Raises:
        InputError: if `vocab_size` is too small, or the package `tokenizers` is not installed.
    """
    if vocab_size <= NUM_BYTES + 1:
        raise InputError(f"--vocab_size is {vocab_size}; it must be above {NUM_BYTES + 1}: the bytes and end-of-text")
    tokenizers = optional_import("tokenizers", "tokenizers", "training a tokenizer")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=sorted(byte_level.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    decoder = bytes_of_characters()
    return {bytes(decoder[character] for character in token): rank for rank, (token, _) in enumerate(by_id)}


def bpe_file(ranks: dict[bytes, int]) -> bytes:
    """The file that tiktoken reads: a token in base64 and its rank a line."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()).encode()


def save_bpe(path: Path, ranks: dict[bytes, int]) -> None:
    """Writes `bpe_file`.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, bpe_file(ranks))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def load_bpe(path: str) -> tiktoken.Encoding:
    """The encoding that `save_bpe` wrote; end-of-text comes after all other tokens.

    Raises:
        InputError: if there is no such file, or it is none of tiktoken's.
    """
    try:
        # Not by tiktoken's own function, which keeps a copy of a path's first content in its cache.
        lines = (line.split() for line in read_regular(path).splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if set(ranks.values()) != set(range(len(ranks))) or any(
            bytes([byte]) not in ranks for byte in range(NUM_BYTES)
        ):
            raise ValueError("ranks are missing, or some of the 256 bytes")
        return tiktoken.Encoding(
            path, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
        )
    except OSError as error:
        raise InputError(f"data.tokenizer: {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"data.tokenizer: {path} is no file of tiktoken's: {error}") from error


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts up to a number of bytes, the last one whole."""
    left = limit
    for text in texts:
        yield text
        left -= len(text.encode("utf-8"))
        if left <= 0:
            return


def bytes_of_characters() -> dict[str, int]:
    """The byte that each character of GPT-2's printable alphabet stands for, in which vocabularies are written.

    Printable bytes stand for themselves, the others for the characters from 256 on, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, NUM_BYTES)]
    others: Any = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(NUM_BYTES + i): byte for i, byte in enumerate(others)}
