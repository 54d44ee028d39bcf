"""Which documents are held out for validation."""

from __future__ import annotations

import hashlib

from sophia_levanter.errors import InputError

_HASH_BYTES = 8

# Whether a document is held out, and its text.
Side = tuple[bool, str]


class NoSplit:
    """Holds nothing out."""

    is_settled = True

    def push(self, text: str) -> list[Side]:
        """The documents whose side is known once `text` is."""
        return [(False, text)]

    def finish(self) -> list[Side]:
        """The others."""
        return []


class Split:
    """Holds a share of the documents out, in one pass that keeps one document back.

    A hash of its text decides over each document, so that the split stays as it is when documents are added, and the
    same text is on one side only. Where this leaves a side empty, the document nearest to it changes sides; of
    documents that are all the same one the end is held out.

    Args:
        fraction: share to hold out, in (0, 1).
        field: the config field to name in errors.
        settled: whether it goes on where both sides had documents already.

    Attributes:
        is_settled: whether both sides have documents, so that none is kept back.
    """

    def __init__(self, fraction: float, *, field: str, settled: bool = False) -> None:
        self._fraction = fraction
        self._limit = fraction * 256**_HASH_BYTES
        self._field = field
        self.is_settled = settled
        # Of the documents so far, all on one side, the nearest to the other side, and how often it was there.
        self._kept: tuple[int, str] | None = None
        self._count = 0
        self._others = False

    def push(self, text: str) -> list[Side]:
        """The documents whose side is known once `text` is; `text` is not empty."""
        value = _hash(text)
        held_out = value < self._limit
        if self.is_settled:
            return [(held_out, text)]
        if self._kept is None:
            self._kept, self._count = (value, text), 1
            return []
        kept_value, _ = self._kept
        if value == kept_value:
            self._count += 1
            return []
        if (kept_value < self._limit) != held_out:
            self.is_settled = True
            return [*self._release(kept_value < self._limit), (held_out, text)]
        self._others = True
        if (value > kept_value) if held_out else (value < kept_value):
            released = self._release(held_out)
            self._kept, self._count = (value, text), 1
            return released
        return [(held_out, text)]

    def finish(self) -> list[Side]:
        """What was kept back.

        Raises:
            InputError: if there is one document of one character.
        """
        if self.is_settled or self._kept is None:
            return []
        value, text = self._kept
        if self._others:
            return self._release(value >= self._limit)
        if len(text) < 2:
            raise InputError(
                f"{self._field}: its only document, {text!r}, is too short to hold out a part; set data.validation"
            )
        end = min(max(round(len(text) * (1 - self._fraction)), 1), len(text) - 1)
        return [(False, text[:end]), (True, text[end:])]

    def _release(self, held_out: bool) -> list[Side]:
        assert self._kept is not None
        return [(held_out, self._kept[1])] * self._count


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=_HASH_BYTES).digest(), "big")
