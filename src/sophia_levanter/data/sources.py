"""What `data.train` and `data.validation` name: files, or a registered kind of source. Free of heavy imports."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from draccus import ChoiceRegistry

from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.settings import check_subclass
from sophia_levanter.data.documents import START, FileSource, Position
from sophia_levanter.data.hub import DatasetSource
from sophia_levanter.data.names import HUB, NANOGPT, PYTHON_STDLIB, SAVED, STORE
from sophia_levanter.data.rows import Rows, kind_of
from sophia_levanter.errors import InputError

if TYPE_CHECKING:
    from sophia_levanter.data.token_store import Tokens
    from sophia_levanter.data.tokenizer import Tokenizer

Report = Callable[[str], None]


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


@dataclass(frozen=True)
class Corpora:
    """The tokens of a source that was looked up: one corpus, or one to train on and one to validate with.

    Attributes:
        name: what the user wrote.
        inputs: what is read, by names that are the same for the same file.
        make: makes what is not there yet.
        source: the documents; None where only their tokens are there.
    """

    name: str
    inputs: Sequence[str]
    make: Callable[[], Sequence[Tokens]]
    source: Source | None = None


class DataSource(ChoiceRegistry):
    """A source by its name, `SCHEME:PATH`. Subclasses are registered by their scheme.

    Attributes:
        name: what the user wrote.
        path: what follows the scheme.
        field: the config field that names it, for errors.
        holds: text; prepared text, which may have been split at separators; or tokens.
    """

    holds: ClassVar[str] = "text"

    def __init__(self, name: str, field: str) -> None:
        self.name = name
        self.field = field
        self.path = name.partition(":")[2]

    def absolute(self) -> str:
        """The same source, named so that it is found from any working directory."""
        return self.name

    def open(self, config: DataConfig, report: Report, special_tokens: Collection[str]) -> Source:
        """The documents.

        Args:
            config: how the text is read.
            report: takes a line about skipped files, and about files whose names do not say what they hold.
            special_tokens: names of tokens that are looked for in the text.

        Raises:
            InputError: if the source does not exist, or holds tokens.
        """
        raise InputError(f"{self.field}: {self.name} holds tokens; name the text that they were made from")

    def find_tokens(self, tokenizer: Tokenizer, cache_dir: Path, report: Report, *, both: bool) -> Corpora | None:
        """The tokens, where they are; None if they are made from text.

        Args:
            tokenizer: the one that the tokens must be of.
            cache_dir: where what was found in large files is kept.
            report: takes a line of news.
            both: whether to look for a corpus to train on and one to validate with.

        Raises:
            InputError: if they do not exist, or another tokenizer made them.
        """
        return None


class TextSource(DataSource):
    """Documents that a program makes or fetches. A registered subclass needs no more than these two methods."""

    @abstractmethod
    def documents(self) -> Iterable[str]:
        """All documents, in an order that does not change."""

    @abstractmethod
    def identity(self) -> Any:
        """A JSON value that changes when the documents change, such as the sizes and times of files.

        The name of the source need not be in it.
        """

    def open(self, config: DataConfig, report: Report, special_tokens: Collection[str]) -> Source:
        return _Texts(self, Rows(config, field=self.field, special_tokens=special_tokens))


class _Texts:
    """The documents of a `TextSource`, checked and counted."""

    def __init__(self, source: TextSource, rows: Rows) -> None:
        self.rows = rows
        self._source = source
        self._kind = type(source).__qualname__
        self._identity = self._current_identity()

    def _current_identity(self) -> Any:
        found = self._source.identity()
        try:
            return json.loads(json.dumps(found))
        except (TypeError, ValueError) as error:
            raise InputError(f"{self._source.field}: {self._kind}.identity() is not a JSON value: {error}") from error

    @property
    def identity(self) -> Any:
        return [self._source.name, self._identity, *self.rows.settings]

    @property
    def settings(self) -> list[Any]:
        return [self._source.name, *self.rows.settings]

    @property
    def parts(self) -> list[Any]:
        return [self._identity]

    @property
    def inputs(self) -> list[str]:
        return [self._source.name]

    def where(self, position: Position) -> str:
        return f"{self._source.name}, document {position[1]}"

    def documents(self, start: Position = START) -> Iterator[tuple[Position, str]]:
        field, texts = self._source.field, self._source.documents()
        if isinstance(texts, str) or not hasattr(texts, "__iter__"):
            raise InputError(f"{field}: {self._kind}.documents() gives {kind_of(texts)}; it must yield strings")
        for number, text in enumerate(texts, start=1):
            if number <= start[1]:
                continue
            where = self.where((0, number))
            if not isinstance(text, str):
                raise InputError(f"{field}: {where} is {kind_of(text)}; {self._kind}.documents() must yield strings")
            for document in self.rows.documents(self.rows.encodable(text, where), where):
                yield (0, number), document
        if self._current_identity() != self._identity:
            raise InputError(
                f"{field}: {self._source.name} changed while it was read; run the command again when nothing writes "
                "to it"
            )

    def share_read(self) -> float | None:
        return None


class Files(DataSource):
    """Files by a path, a folder, a glob or a URL, or the standard library: names without a scheme."""

    def absolute(self) -> str:
        return self.name if self.name == PYTHON_STDLIB else _absolute(self.name)

    def open(self, config: DataConfig, report: Report, special_tokens: Collection[str]) -> Source:
        return FileSource(self.name, config, field=self.field, report=report, special_tokens=special_tokens)


class _Dataset(DataSource):
    """A dataset that the library `datasets` opens."""

    def open(self, config: DataConfig, report: Report, special_tokens: Collection[str]) -> Source:
        return DatasetSource(self.name, config, field=self.field, special_tokens=special_tokens)


@DataSource.register_subclass("datasets")
class SavedDataset(_Dataset):
    """`datasets:FOLDER?split=train`: a folder that `datasets` saved."""

    def absolute(self) -> str:
        return SAVED + _absolute(self.path)


@DataSource.register_subclass("hub")
class HubDataset(_Dataset):
    """`hub:NAME?split=train`: a dataset of the Hugging Face hub."""

    def absolute(self) -> str:
        path, mark, options = self.path.partition("?")
        # `datasets` takes a folder of that name before it asks the hub.
        return HUB + os.path.abspath(path) + mark + options if os.path.isdir(path) else self.name


@DataSource.register_subclass("nanogpt")
class TokenFile(DataSource):
    """`nanogpt:FILE`: token ids that another program wrote."""

    holds = "tokens"

    def absolute(self) -> str:
        return NANOGPT + _absolute(self.path)

    def find_tokens(self, tokenizer: Tokenizer, cache_dir: Path, report: Report, *, both: bool) -> Corpora:
        from sophia_levanter.data.nanogpt import NanogptTokens

        if both:
            raise InputError(
                f"{self.field} {self.name}: a part cannot be held out of tokens; "
                f"set data.validation to {NANOGPT}val.bin"
            )
        corpus = NanogptTokens(self.name, tokenizer, field=self.field, cache_dir=cache_dir)

        def checked() -> list[Tokens]:
            corpus.check(report)
            return [corpus]

        return Corpora(self.name, [os.path.realpath(corpus.path)], checked)


@DataSource.register_subclass("store")
class PreparedStore(DataSource):
    """`store:FOLDER`: a token store, or the two that were made of one text."""

    holds = "prepared text"

    def absolute(self) -> str:
        return STORE + _absolute(self.path)

    def find_tokens(self, tokenizer: Tokenizer, cache_dir: Path, report: Report, *, both: bool) -> Corpora:
        from sophia_levanter.data.token_store import SIDES, TokenStore

        location = _absolute(self.path).rstrip("/")
        places = [f"{location}/{side}" for side in SIDES] if both else [location]
        try:
            stores = [TokenStore.open(place, tokenizer) for place in places]
        except InputError as error:
            hint = f"; without data.validation, {STORE}FOLDER holds {' and '.join(SIDES)}" if both else ""
            raise InputError(f"{self.field}: {error}{hint}") from error
        return Corpora(self.name, [location], lambda: stores)


def source_named(name: str, field: str) -> DataSource:
    """The source that a string means.

    Args:
        name: what the user wrote: `SCHEME:PATH` with a registered scheme, or files.
        field: the config field to name in errors.

    Raises:
        InputError: if the scheme is unknown and no file is called that, or its class lacks a method.
    """
    known = DataSource.get_known_choices()
    scheme, colon, path = name.partition(":")
    is_scheme = colon and re.fullmatch(r"\w+", scheme) and not path.startswith("//")
    if is_scheme and scheme not in known and not glob.glob(name.partition("/")[0]):
        nearest = difflib.get_close_matches(scheme, known, n=1, cutoff=0)[0]
        raise InputError(
            f"{field} is {name!r}; no file is called that, and {scheme}: is not a known kind of source; "
            f"did you mean {nearest}:? There are {', '.join(f'{kind}:' for kind in sorted(known))}"
        )
    kind = known.get(scheme, Files) if colon else Files
    check_subclass(kind, DataSource, field)
    return kind(name, field)


def absolute_source(name: str, field: str) -> str:
    """`DataSource.absolute` of the source that `name` means."""
    return source_named(name, field).absolute()


def open_source(
    name: str, config: DataConfig, *, field: str, report: Report, special_tokens: Collection[str] = ()
) -> Source:
    """The documents of the source that `name` means; see `source_named` and `DataSource.open`."""
    return source_named(name, field).open(config, report, special_tokens)


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
