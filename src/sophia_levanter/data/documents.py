"""Document sources, conversion of rows to documents, and the split into training and held-out documents."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from sophia_levanter.config.data import DataConfig
from sophia_levanter.errors import InputError, counted

MAX_LISTED_FIELDS = 10
KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
HASH_BYTES = 8  # size of the text hash that decides whether a document is held out

# A position in a source: the number of finished files, and the number of finished records in the next file.
Position = tuple[int, int]
START: Position = (0, 0)
# Whether a document is held out, and its text.
Side = tuple[bool, str]


class Source(ABC):
    """Documents in a fixed order, readable from any position.

    Attributes:
        name: the name of the source, as the user wrote it.
        rows: converts the rows of the source to documents.
    """

    def __init__(self, name: str, rows: Rows) -> None:
        self.name = name
        self.rows = rows

    @property
    @abstractmethod
    def parts(self) -> list[Any]:
        """One JSON value per file, covering everything that the documents in the file depend on."""

    @property
    def settings(self) -> list[Any]:
        """A JSON value covering everything that the documents depend on, except `parts`."""
        return [self.name, *self.rows.settings]

    @property
    @abstractmethod
    def identity(self) -> Any:
        """A JSON value covering everything that the documents depend on."""

    @property
    def inputs(self) -> list[str]:
        """The resolved paths, URLs or names of everything that is read."""
        return [self.name]

    @abstractmethod
    def where(self, position: Position) -> str:
        """Describe the location of the last document before a position, for messages."""

    @abstractmethod
    def documents(self, start: Position = START) -> Iterator[tuple[Position, str]]:
        """Yield each document from `start` on, with the position after its record."""

    def share_read(self) -> float | None:
        """Return the fraction of the source that has been read, from 0 to 1, or None if it is unknown."""
        return None


class Tally(NamedTuple):
    """Counts for the rows of a source, with the location of the first row of each kind. Tallies are immutable."""

    num_bad: int = 0  # rows without text that were skipped
    first_bad: str = ""
    num_empty: int = 0
    first_empty: str = ""
    num_separators: int = 0
    special: tuple[tuple[str, int], ...] = ()  # special tokens spelled out in the text, and their counts
    first_special: str = ""
    num_copies: int = 0  # documents that were dropped because all documents are identical


class Rows:
    """Converts the rows of a source to documents.

    A row without text is an error or is skipped, depending on `data.bad_rows`. Empty rows are always skipped.

    Args:
        config: specifies the row field that contains the text, and the document separator.
        field: the config field to name in error messages.
        special_tokens: the special tokens to search for in the text.

    Attributes:
        config, field: the arguments of the same names.
        tally: the counts so far.
        tally_before: the counts before the current file.
    """

    def __init__(self, config: DataConfig, field: str, special_tokens: Collection[str] = ()) -> None:
        self.tally = self.tally_before = Tally()
        self.config = config
        self.field = field
        names = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    @property
    def settings(self) -> list[Any]:
        """The settings that determine the text of a row, as a JSON value."""
        separator = self.config.document_separator
        return [self.config.text_field, self.config.invalid_utf8, *([separator] if separator else [])]

    @property
    def skips(self) -> bool:
        """Whether rows without text are skipped."""
        return self.config.bad_rows == "skip"

    def text_of(self, row: Any, where: str) -> str | None:
        """Return the text of a row, or None if the row is skipped.

        Raises:
            InputError: if the row has no text and must not be skipped, or its text cannot be encoded as UTF-8.
        """
        name = self.config.text_field
        if not isinstance(row, dict):
            return self.bad(f"{where} is {kind_of(row)}, not a JSON object")
        if name not in row:
            shown = [repr(name) for name in row]
            listed = ", ".join(shown[:MAX_LISTED_FIELDS]) + (", …" if len(shown) > MAX_LISTED_FIELDS else "")
            return self.bad(f"{where} has no field {name!r}; possible values for data.text_field: {listed or '(none)'}")
        text = row[name]
        if not isinstance(text, str):
            return self.bad(f"{where}: the field {name!r} is {kind_of(text)}, not a string")
        return self.encodable(text, f"{where}: the field {name!r}")

    def encodable(self, text: str, where: str) -> str:
        """Return the text, with lone surrogates replaced if `data.invalid_utf8` is `replace`.

        Raises:
            InputError: if the text cannot be encoded as UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if self.config.invalid_utf8 == "replace":
                return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            raise InputError(
                f"{self.field}: {where} contains a lone surrogate, \\u{ord(text[error.start]):04x}, at "
                f"character {error.start}; correct the text, or set data.invalid_utf8 to replace"
            ) from error
        return text

    def bad(self, problem: str) -> str | None:
        """Skip and count a row without text, and return None instead of its text.

        Args:
            problem: where the row is, and what is wrong with it.

        Raises:
            InputError: unless `data.bad_rows` is `skip`.
        """
        if not self.skips:
            raise InputError(f"{self.field}: {problem}; correct the file, or set data.bad_rows to skip")
        tally = self.tally
        self.tally = tally._replace(num_bad=tally.num_bad + 1, first_bad=tally.first_bad or problem)
        return None

    def documents(self, text: str | None, where: str) -> list[str]:
        """Return the documents in the text of a row, and update the tally."""
        if text is None:
            return []
        tally, separator = self.tally, self.config.document_separator
        pieces = text.split(separator) if separator else [text]
        texts = [piece for piece in pieces if piece and not piece.isspace()]
        if len(pieces) > 1:
            tally = tally._replace(num_separators=tally.num_separators + len(pieces) - 1)
        elif not texts:
            tally = tally._replace(num_empty=tally.num_empty + 1, first_empty=tally.first_empty or where)
        if self._special and (found := [token for text in texts for token in self._special.findall(text)]):
            counts = Counter(dict(tally.special)) + Counter(found)
            tally = tally._replace(special=tuple(counts.items()), first_special=tally.first_special or where)
        self.tally = tally
        return texts

    @property
    def split_at(self) -> str:
        """The number of separators found, as part of a message; empty if no separator is set."""
        separator = self.config.document_separator
        return f", split at {self.tally.num_separators:,} occurrences of {separator!r}" if separator else ""

    @property
    def left_out(self) -> str:
        """A message with the number of skipped rows and the first row of each kind; empty if no row was skipped."""
        tally = self.tally
        bad = [f"{tally.num_bad:,} without text (first: {tally.first_bad})"] if tally.num_bad else []
        empty = [f"{tally.num_empty:,} empty (first: {tally.first_empty})"] if tally.num_empty else []
        return f"skipped rows: {'; '.join(bad + empty)}" if bad or empty else ""

    def warnings(self) -> list[str]:
        """Return warnings about text that may not be what the user intended."""
        tally, separator, lines = self.tally, self.config.document_separator, []
        if separator and not tally.num_separators:
            lines.append(
                f"WARNING: {self.field}: data.document_separator {separator!r} does not occur in the text; "
                "correct or remove it"
            )
        if tally.special:
            found = ", ".join(f"{name} ({counted(count, 'time')})" for name, count in tally.special)
            if tally.num_separators:
                remedy = "remove them from the text if they do not belong there"
            else:
                most, _ = max(tally.special, key=lambda item: item[1])
                remedy = f"if they separate documents, set data.document_separator to {most!r}"
            lines.append(
                f"WARNING: {self.field}: the text contains special tokens: {found}; the first is in "
                f"{tally.first_special}; they are encoded as ordinary text; {remedy}"
            )
        if tally.num_copies:
            lines.append(
                f"WARNING: {self.field}: all {tally.num_copies + 1:,} documents are identical; only one is kept, and "
                "its end is held out for validation; set data.validation to keep all of them"
            )
        return lines


def kind_of(value: Any) -> str:
    """Return the JSON name for the type of a value, for messages."""
    return KINDS.get(type(value), f"a value of type {type(value).__name__}")


class Split:
    """A split that holds out a fraction of the documents, in one pass that buffers at most one document.

    A hash of the text determines whether a document is held out. Documents added later therefore do not change the
    split, and identical documents are on the same side. If one side would be empty, the document whose hash is closest
    to that side moves there. If all documents are identical, only one is kept, and the end of its text is held out.

    Args:
        fraction: the fraction to hold out, in [0, 1).
        field: the config field to name in error messages.
        settled: whether both sides already have documents, or one may remain empty.

    Attributes:
        is_settled: whether both sides have documents, so that no document needs to be buffered.
        num_copies: the number of documents that `finish` dropped because all documents are identical.
    """

    def __init__(self, fraction: float, *, field: str, settled: bool = False) -> None:
        self._fraction = fraction
        self._limit = fraction * 256**HASH_BYTES
        self._field = field
        self.is_settled = settled
        self.num_copies = 0
        # While all documents are on one side: the document closest to the other side, and its number of occurrences.
        self._kept: tuple[int, str] | None = None
        self._count = 0
        self._others = False

    def push(self, text: str) -> list[Side]:
        """Add a non-empty document, and return the documents whose side is now decided."""
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
        """Return the remaining documents.

        Raises:
            InputError: if the only document consists of a single character.
        """
        if self.is_settled or self._kept is None:
            return []
        value, text = self._kept
        if self._others:
            return self._release(value >= self._limit)
        if len(text) < 2:
            raise InputError(f"{self._field}: the only document, {text!r}, is too short to split; set data.validation")
        self.num_copies = self._count - 1
        end = min(max(round(len(text) * (1 - self._fraction)), 1), len(text) - 1)
        return [(False, text[:end]), (True, text[end:])]

    def _release(self, held_out: bool) -> list[Side]:
        assert self._kept is not None
        return [(held_out, self._kept[1])] * self._count


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=HASH_BYTES).digest(), "big")
