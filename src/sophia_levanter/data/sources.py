"""A source of documents, named by one string."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.documents import START, FileSource, Position
from sophia_levanter.data.hub import DatasetSource
from sophia_levanter.data.names import HUB, SAVED
from sophia_levanter.data.rows import Rows


class Source(Protocol):
    """Documents in a fixed order, which can be read from any place on.

    Attributes:
        rows: what makes documents of its rows.
    """

    rows: Rows

    @property
    def identity(self) -> Any:
        """All that the documents depend on, as a JSON value."""
        ...

    @property
    def settings(self) -> list[Any]:
        """The part of the identity that does not depend on files, as a JSON value."""
        ...

    @property
    def parts(self) -> list[Any]:
        """What the documents of each file depend on, as JSON values."""
        ...

    @property
    def inputs(self) -> list[str]:
        """What is read: real paths, URLs or names."""
        ...

    def where(self, position: Position) -> str:
        """The document before a position, for people."""
        ...

    def documents(self, start: Position = START) -> Iterator[tuple[Position, str]]:
        """Each document from `start` on, with the position after the file's record that it is of."""
        ...

    def share_read(self) -> float | None:
        """How much of it has been read, from 0 to 1; None if that cannot be known."""
        ...


def open_source(
    name: str,
    config: DataConfig,
    *,
    field: str,
    report: Callable[[str], None],
    special_tokens: Collection[str] = (),
) -> Source:
    """The source that `name` means: `hub:...`, `datasets:...`, or files as `find_files` says.

    Args:
        name: what the user wrote.
        config: how its text is read.
        field: the config field to name in errors.
        report: takes a line about skipped files, and about files whose names do not say what they hold.
        special_tokens: names of tokens that are looked for in the text.

    Raises:
        InputError: if there is no such source.
    """
    if name.startswith((HUB, SAVED)):
        return DatasetSource(name, config, field=field, special_tokens=special_tokens)
    return FileSource(name, config, field=field, report=report, special_tokens=special_tokens)
