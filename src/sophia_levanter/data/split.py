"""Which documents are held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from sophia_levanter.errors import InputError

_HASH_BYTES = 8


def split_documents(documents: Iterable[str], fraction: float, *, field: str) -> Iterator[tuple[bool, str]]:
    """Each document with whether it is held out, in one pass that keeps one document back.

    A hash of its text decides over each document, so that the split stays as it is when documents are added. Where this
    leaves a side empty, the document nearest to it changes sides; the end of a single document is held out.

    Args:
        documents: at least one text, none empty.
        fraction: share to hold out, in (0, 1).
        field: the config field to name in errors.

    Yields:
        `(held_out, text)`, in the order of `documents` but for the one kept back.

    Raises:
        InputError: if there is one document of one character.
    """
    limit = fraction * 256**_HASH_BYTES
    kept: tuple[int, str] | None = None  # of the documents so far, all on one side, the nearest to the other side
    count = 0
    mixed = False
    for text in documents:
        count += 1
        value = _hash(text)
        held_out = value < limit
        if mixed:
            yield held_out, text
        elif kept is None:
            kept = (value, text)
        elif (kept[0] < limit) != held_out:
            mixed = True
            yield kept[0] < limit, kept[1]
            yield held_out, text
        elif (value > kept[0]) if held_out else (value < kept[0]):
            yield held_out, kept[1]
            kept = (value, text)
        else:
            yield held_out, text
    if mixed or kept is None:
        return
    if count == 1:
        yield from _cut(kept[1], fraction, field)
    else:
        yield kept[0] >= limit, kept[1]


def _cut(text: str, fraction: float, field: str) -> Iterator[tuple[bool, str]]:
    if len(text) < 2:
        raise InputError(f"{field}: its only document, {text!r}, is too short to hold out a part; set data.validation")
    end = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    yield False, text[:end]
    yield True, text[end:]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=_HASH_BYTES).digest(), "big")
