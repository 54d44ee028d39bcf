"""Rows to documents: which rows hold text, where a text is split, and what the log says about them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

from sophia_levanter.config.data import DataConfig
from sophia_levanter.errors import InputError

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


class Tally(NamedTuple):
    """What the rows of a source held, with the first place of each kind; replaced whenever a count changes."""

    num_bad: int = 0  # rows without text that were skipped
    first_bad: str = ""
    num_empty: int = 0
    first_empty: str = ""
    num_separators: int = 0
    special: tuple[tuple[str, int], ...] = ()  # special tokens that are spelled out, and how often
    first_special: str = ""


class Rows:
    """Makes documents of the rows of one source.

    A row without text is an error, or skipped, as `data.bad_rows` says. Empty text holds no tokens: it is left out.

    Args:
        config: which field of a row holds its text, and where texts are split.
        field: the config field to name in errors.
        special_tokens: names of tokens that are looked for in the text.

    Attributes:
        tally: what the rows so far held.
        tally_before: of these, what those held that are of the files before.
    """

    def __init__(self, config: DataConfig, *, field: str, special_tokens: Collection[str] = ()) -> None:
        self.tally = self.tally_before = Tally()
        self._config = config
        self._field = field
        names = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    @property
    def settings(self) -> list[Any]:
        """The settings that decide which text a row holds, as a JSON value."""
        separator = self._config.document_separator
        return [self._config.text_field, self._config.invalid_utf8, *([separator] if separator else [])]

    @property
    def skips(self) -> bool:
        """Whether rows without text are skipped."""
        return self._config.bad_rows == "skip"

    def text_of(self, row: Any, where: str) -> str | None:
        """The text in a row; None if the row is skipped.

        Raises:
            InputError: if the row has no text, or text that UTF-8 cannot hold.
        """
        name = self._config.text_field
        if not isinstance(row, dict):
            return self.bad(f"{where} is not a JSON object but {kind_of(row)}")
        if name not in row:
            shown = [repr(name) for name in row]
            listed = ", ".join(shown[:MAX_LISTED_FIELDS]) + (", …" if len(shown) > MAX_LISTED_FIELDS else "")
            return self.bad(f"{where} has no field {name!r}; data.text_field may be {listed or '(none)'}")
        text = row[name]
        if not isinstance(text, str):
            return self.bad(f"{where}: the field {name!r} is not a string but {kind_of(text)}")
        return self.encodable(text, f"{where}: the field {name!r}")

    def encodable(self, text: str, where: str) -> str:
        """The text as UTF-8 can hold it, with replacements if `data.invalid_utf8` is replace.

        Raises:
            InputError: if UTF-8 cannot hold it.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if self._config.invalid_utf8 == "replace":
                return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            raise InputError(
                f"{self._field}: {where} holds half of a surrogate pair, "
                f"\\u{ord(text[error.start]):04x}, at character {error.start}, which UTF-8 cannot"
            ) from error
        return text

    def bad(self, problem: str) -> str | None:
        """The text of a row without text, None: the row is skipped and counted.

        Args:
            problem: where the row is and what is wrong with it.

        Raises:
            InputError: unless `data.bad_rows` is skip.
        """
        if not self.skips:
            raise InputError(f"{self._field}: {problem}; correct the file, or set data.bad_rows to skip")
        tally = self.tally
        self.tally = tally._replace(num_bad=tally.num_bad + 1, first_bad=tally.first_bad or problem)
        return None

    def documents(self, text: str | None, where: str) -> list[str]:
        """The documents in a row's text, if it has any."""
        if text is None:
            return []
        tally, separator = self.tally, self._config.document_separator
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
        """How often the text was split, for the line that counts documents; empty without a separator."""
        separator = self._config.document_separator
        return f", split at {self.tally.num_separators:,} {separator!r}" if separator else ""

    @property
    def left_out(self) -> str:
        """How many rows are no documents, and the first of each kind; empty if there are none."""
        tally = self.tally
        bad = [f"{tally.num_bad:,} without text, first {tally.first_bad}"] if tally.num_bad else []
        empty = [f"{tally.num_empty:,} empty, first {tally.first_empty}"] if tally.num_empty else []
        return f"rows left out: {'; '.join(bad + empty)}" if bad or empty else ""

    def warnings(self) -> list[str]:
        """Lines about what the user may not want of the text."""
        tally, separator, lines = self.tally, self._config.document_separator, []
        if separator and not tally.num_separators:
            lines.append(
                f"WARNING: {self._field}: data.document_separator {separator!r} occurs nowhere in the text; "
                "correct its spelling, or remove it"
            )
        if tally.special:
            counted = ", ".join(f"{name} {count:,} times" for name, count in tally.special)
            if tally.num_separators:
                remedy = "remove them from the text if they do not belong there"
            else:
                most, _ = max(tally.special, key=lambda item: item[1])
                remedy = f"if they separate documents, set data.document_separator to {most!r}"
            lines.append(
                f"WARNING: {self._field}: special tokens are spelled out in the text, first in {tally.first_special}: "
                f"{counted}; they are encoded as ordinary text; {remedy}"
            )
        return lines


def kind_of(value: Any) -> str:
    """What a value is in JSON's words, for messages."""
    return KINDS.get(type(value), f"a value of type {type(value).__name__}")
