"""Training byte-pair encodings, and writing them to files for tiktoken and transformers."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tiktoken_ext.openai_public import r50k_pat_str

from sophia_levanter.data.text_files import optional_import
from sophia_levanter.data.tokenizer import END_OF_TEXT, NUM_BYTES, Tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.files import write_atomically


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Train an encoding and return the rank of each token: first the 256 bytes, then merged tokens in merge order.

    Args:
        texts: the training documents. Only the current document and the counts of distinct words are in memory.
        vocab_size: the number of tokens, including end-of-text. The result has fewer if no pairs are left to merge.

    Raises:
        InputError: if `vocab_size` is too small, or the `tokenizers` package is not installed.
    """
    if vocab_size <= NUM_BYTES + 1:
        raise InputError(
            f"--vocab_size is {vocab_size}; it must be greater than {NUM_BYTES + 1} "
            f"({NUM_BYTES} bytes and the end-of-text token)"
        )
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
    """Return the content of a tiktoken file. Each line contains a token in base64 and its rank."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()).encode()


def save_bpe(path: Path, ranks: dict[bytes, int]) -> None:
    """Write `bpe_file(ranks)` to a path.

    Raises:
        InputError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, bpe_file(ranks))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield documents until their total size reaches `limit` bytes. The last document is not truncated."""
    left = limit
    for text in texts:
        yield text
        left -= len(text.encode("utf-8"))
        if left <= 0:
            return


def bytes_of_characters() -> dict[str, int]:
    """Return the byte for each character in the printable alphabet of GPT-2 vocabulary files.

    Printable bytes represent themselves. The other bytes are represented by the code points from 256 on, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, NUM_BYTES)]
    others: Any = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(NUM_BYTES + i): byte for i, byte in enumerate(others)}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of `tokenizer.json`, the file format of the `tokenizers` package.

    Unlike this package, transformers recognizes special tokens that are spelled out in the text, unless the caller sets
    `split_special_tokens`.

    Raises:
        InputError: if the tokenizer is not a byte-pair encoding.
    """
    if not tokenizer.merges_bytes:
        raise InputError(
            f"data.tokenizer {tokenizer.name} is not a byte-pair encoding and cannot be exported; "
            "use bytes, a tiktoken encoding or a file from train_tokenizer"
        )
    ranks = ranks_of(tokenizer)
    characters = {byte: character for character, byte in bytes_of_characters().items()}

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, token in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(tokenizer.pattern),
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # like tiktoken, look up whole words first
            # Include the special tokens. Otherwise, `tokenizers` would renumber them without gaps.
            "vocab": {written(token): rank for token, rank in ranks.items()} | dict(tokenizer.special_tokens),
            "merges": [[written(left), written(right)] for left, right in merges_of(ranks)],
        },
    }


def tokenizer_config_json(seq_len: int) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json` for a model with a context length of `seq_len` tokens."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # uses tokenizer.json unchanged
        "model_max_length": seq_len,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Return the id of each token that decodes to at least one byte."""
    return {token: rank for rank, token in enumerate(tokenizer.token_bytes) if token}


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Reconstruct the merges of a byte-pair encoding, in order, from the ranks of its tokens.

    Applying all earlier merges to the bytes of a token leaves the pair to merge. If it leaves more than two parts, the
    token has no merge and occurs only as a whole word.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = _merged(token, ranks, below=rank)
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def _merged(token: bytes, ranks: Mapping[bytes, int], *, below: int) -> list[bytes]:
    """Merge the bytes of a token, using only ranks less than `below`. If ranks are equal, merge the leftmost pair."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1))
        if rank >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    if pattern in ("", r50k_pat_str):
        # Byte-level pre-tokenizers include GPT-2's pattern. For a tokenizer without merges, splitting text into words
        # does not change the ids, and short words are encoded faster.
        return _byte_level(use_regex=True)
    split = {"type": "Split", "pattern": {"Regex": _oniguruma(pattern)}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _oniguruma(pattern: str) -> str:
    """Translate a regular expression from tiktoken for `tokenizers`.

    `tokenizers` parses `{1,3}+` as two quantifiers, not as a possessive one, and its `$` matches before every newline.
    """
    return re.sub(r"(\\p\{\w+\}\{[\d,]+\})\+", r"(?>\1)", pattern).replace("$", r"\z")
