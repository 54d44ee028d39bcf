"""The types of sources that the `data` settings can specify. This module has no slow imports."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qsl

from draccus import ChoiceRegistry

from sophia_levanter.config.settings import check_subclass
from sophia_levanter.data.documents import START, Position, Rows, Source, kind_of
from sophia_levanter.data.file_source import FileSource
from sophia_levanter.data.text_files import DATASET_MARKS, PYTHON_STDLIB, TRAINED_TOKENIZER, Report, optional_import
from sophia_levanter.errors import InputError

if TYPE_CHECKING:
    from sophia_levanter.data.token_store import Tokens
    from sophia_levanter.data.tokenizer import Tokenizer

DATASET_OPTIONS = {"hub": ("split", "name", "revision", "streaming"), "datasets": ("split",)}


@dataclass(frozen=True)
class FoundSource:
    """The tokens of a source: one corpus, or a training and a validation corpus."""

    name: str  # as the user wrote it
    inputs: Sequence[str]  # the files or folders that are read; the same file always has the same name
    make: Callable[[], Sequence[Tokens]]  # returns the tokens, after preparing them if needed
    source: Source | None = None  # the documents; None if only their tokens exist


class DataSource(ChoiceRegistry):
    """A source with a name of the form `SCHEME:PATH`. Subclasses are registered under their scheme.

    Attributes:
        name: the name of the source, as the user wrote it.
        path: the part after the scheme.
        field: the config field that specifies the source, for error messages.
        holds: "text", "prepared text" (which may have been split at separators) or "tokens".
    """

    holds: ClassVar[str] = "text"

    def __init__(self, name: str, field: str) -> None:
        self.name = name
        self.field = field
        self.path = name.partition(":")[2]

    def absolute(self) -> str:
        """Return the name of the source in a form that is valid in any working directory."""
        return self.name

    def open(self, rows: Rows, report: Report) -> Source:
        """Open the documents.

        Args:
            rows: converts the source's rows to documents.
            report: called with messages about skipped files, and about files whose names and contents disagree.

        Raises:
            InputError: if the source does not exist, or contains tokens instead of text.
        """
        raise InputError(f"{self.field}: {self.name} contains tokens, not text; specify the original text")

    def find_tokens(self, tokenizer: Tokenizer, cache_dir: Path, report: Report, *, both: bool) -> FoundSource | None:
        """Return existing tokens, or None if they must be prepared from text.

        Args:
            tokenizer: the tokenizer that must have produced the tokens.
            cache_dir: the directory in which results for large files are cached.
            report: called with each message for the user.
            both: whether to return a training and a validation corpus.

        Raises:
            InputError: if the tokens do not exist, or were produced by another tokenizer.
        """
        return None


class TextSource(DataSource):
    """Documents that a program generates or fetches. Registered subclasses need only `documents` and `identity`."""

    @abstractmethod
    def documents(self) -> Iterable[str]:
        """Return all documents, in an order that does not change."""

    @abstractmethod
    def identity(self) -> Any:
        """Return a JSON value that changes when the documents change, such as file sizes and modification times.

        The value need not contain the name of the source.
        """

    def open(self, rows: Rows, report: Report) -> Source:
        return _Texts(self, rows)


class _Texts(Source):
    """The documents of a `TextSource`, checked and counted."""

    def __init__(self, source: TextSource, rows: Rows) -> None:
        super().__init__(source.name, rows)
        self._source = source
        self._kind = type(source).__qualname__
        self._identity = self._current_identity()

    def _current_identity(self) -> Any:
        with self._errors_reported("identity"):
            found = self._source.identity()
        with self._errors_reported("identity", "did not return a JSON value"):
            return json.loads(json.dumps(found))

    @contextmanager
    def _errors_reported(self, method: str, how: str = "failed") -> Iterator[None]:
        try:
            yield
        except (InputError, OSError):
            raise
        except Exception as error:
            what = f"{self.rows.field}: {self._kind}.{method}() {how}"
            raise InputError(f"{what}: {type(error).__name__}: {error}") from error

    @property
    def parts(self) -> list[Any]:
        return [self._identity]

    @property
    def identity(self) -> Any:
        return [self.name, self._identity, *self.rows.settings]

    def where(self, position: Position) -> str:
        return f"{self.name}, document {position[1]}"

    def documents(self, start: Position = START) -> Iterator[tuple[Position, str]]:
        field = self.rows.field
        for number, text in islice(enumerate(self._texts(), start=1), start[1], None):
            where = self.where((0, number))
            if not isinstance(text, str):
                raise InputError(f"{field}: {where} is {kind_of(text)}; {self._kind}.documents() must yield strings")
            for document in self.rows.documents(self.rows.encodable(text, where), where):
                yield (0, number), document
        if self._current_identity() != self._identity:
            raise InputError(
                f"{field}: {self.name} changed while it was being read; "
                "run the command again when nothing is writing to it"
            )

    def _texts(self) -> Iterator[Any]:
        with self._errors_reported("documents"):
            texts = self._source.documents()
            if isinstance(texts, str) or not hasattr(texts, "__iter__"):
                where = f"{self.rows.field}: {self._kind}.documents()"
                raise InputError(f"{where} returned {kind_of(texts)}; it must yield strings")
            yield from texts


class Files(DataSource):
    """A source without a scheme: a path, a folder, a glob, a URL, or Python's standard library."""

    def absolute(self) -> str:
        return self.name if self.name == PYTHON_STDLIB else _absolute(self.name)

    def open(self, rows: Rows, report: Report) -> Source:
        return FileSource(self.name, rows, report)


class _Dataset(DataSource):
    """A dataset that is opened with the `datasets` library."""

    def open(self, rows: Rows, report: Report) -> Source:
        return DatasetSource(self.name, rows)


@DataSource.register_subclass("datasets")
class SavedDataset(_Dataset):
    """`datasets:FOLDER?split=train`: a folder saved by the `datasets` library."""

    def absolute(self) -> str:
        return f"datasets:{_absolute(self.path)}"


@DataSource.register_subclass("hub")
class HubDataset(_Dataset):
    """`hub:NAME?split=train&name=CONFIG&revision=COMMIT&streaming=false`: a dataset on the Hugging Face Hub."""

    def absolute(self) -> str:
        path, mark, options = self.path.partition("?")
        # `datasets` prefers a local folder with that name over the hub.
        return f"hub:{os.path.abspath(path)}{mark}{options}" if os.path.isdir(path) else self.name


class DatasetSource(Source):
    """Documents from the rows of a Hugging Face dataset. Documents without text are skipped.

    Raises:
        InputError: if an option is unknown or has an invalid value, `datasets` is not installed, the dataset,
            configuration, split or field does not exist, or the hub cannot be reached.
    """

    def __init__(self, name: str, rows: Rows) -> None:
        super().__init__(name, rows)
        self._where = f"{rows.field}: {name}"
        self._scheme, _, rest = name.partition(":")
        self._path, _, query = rest.partition("?")
        self._options = self._parsed(query)
        self._split = self._options.get("split", "train")
        self._done = 0
        self._num_rows: int | None = None
        self._looked_up = self.identity

    def _parsed(self, query: str) -> dict[str, str]:
        shown, known = f"{self.rows.field}: {self.name!r}", DATASET_OPTIONS[self._scheme]
        if not self._path:
            raise InputError(f"{shown} does not specify a dataset; use {self._scheme}:NAME")
        options: dict[str, str] = {}
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key not in known:
                raise InputError(f"{shown}: unknown option {key!r}; valid options: {', '.join(known)}")
            if not value:
                raise InputError(f"{shown}: the option {key!r} is empty")
            options[key] = value
        if (streaming := options.get("streaming", "true")) not in ("true", "false"):
            raise InputError(f"{shown}: streaming is {streaming!r}; it must be true or false")
        return options

    @property
    def parts(self) -> list[Any]:
        """A single part: the folder and its files, or an empty list for a dataset on the hub."""
        folder = Path(os.path.abspath(os.path.expanduser(self._path)))
        if self._scheme == "hub" and not os.path.isdir(self._path):
            return [[]]
        if self._scheme == "datasets" and not any((folder / mark).is_file() for mark in DATASET_MARKS):
            raise InputError(
                f"{self.rows.field}: {folder} was not saved by `datasets`: it contains no {DATASET_MARKS[0]}"
            )
        files = sorted((str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*"))
        return [[str(folder), files]]

    @property
    def identity(self) -> Any:
        return [self.name, *self.parts[0], *self.rows.settings]

    def where(self, position: Position) -> str:
        return f"{self.name}, row {position[1]}"

    def documents(self, start: Position = START) -> Iterator[tuple[Position, str]]:
        dataset = self._load()
        self._done = start[1]
        splits = getattr(getattr(dataset, "info", None), "splits", None) or {}
        split = splits.get(self._split)
        self._num_rows = len(dataset) if hasattr(dataset, "__len__") else getattr(split, "num_examples", None)
        if start[1] and start[1] == self._num_rows:
            return
        for row in self._rows_of(dataset.skip(start[1]) if start[1] else dataset):
            self._done += 1
            where = self.where((0, self._done))
            for document in self.rows.documents(self.rows.text_of(row, where), where):
                yield (0, self._done), document
        if self.identity != self._looked_up:
            raise InputError(
                f"{self._where} changed after it was found; run the command again when nothing is writing to it"
            )

    def share_read(self) -> float | None:
        return min(self._done / self._num_rows, 1.0) if self._num_rows else None

    def _rows_of(self, dataset: Any) -> Iterator[Any]:
        try:
            yield from dataset
        except Exception as error:
            where = f"{self._where} cannot be read after row {self._done} ({type(error).__name__})"
            if _may_be_shown(error):
                raise InputError(f"{where}: {str(error).splitlines()[0]}") from error
            # After a network error, progress is kept, so running the same command again resumes.
            raise OSError(where) from error

    def _load(self) -> Any:
        datasets = optional_import("datasets", "datasets", self._where)
        split = self._split
        try:
            if self._scheme == "hub":
                options = {key: self._options.get(key) for key in ("name", "revision")}
                streaming = self._options.get("streaming") != "false"
                return datasets.load_dataset(self._path, split=split, streaming=streaming, **options)
            loaded = datasets.load_from_disk(os.path.expanduser(self._path))
        except Exception as error:
            shown = f": {str(error).splitlines()[0]}" if _may_be_shown(error) and str(error) else ""
            raise InputError(f"{self._where} cannot be loaded ({type(error).__name__}){shown}") from error
        if isinstance(loaded, datasets.Dataset):
            loaded = {str(loaded.split or "train"): loaded}
            split = self._options.get("split", next(iter(loaded)))
        if split not in loaded:
            raise InputError(f"{self._where} has no split {split!r}; available splits: {', '.join(loaded)}")
        return loaded[split]


def _may_be_shown(error: Exception) -> bool:
    """Return whether an error message is safe to print. Messages from network libraries may contain a proxy password.

    The check is indirect, because `datasets` raises many classes of errors from four libraries.
    """
    return isinstance(error, ValueError) or type(error).__module__.startswith("datasets.")


@DataSource.register_subclass("nanogpt")
class TokenFile(DataSource):
    """`nanogpt:FILE`: token ids written by another program."""

    holds = "tokens"

    def absolute(self) -> str:
        return f"nanogpt:{_absolute(self.path)}"

    def find_tokens(self, tokenizer: Tokenizer, cache_dir: Path, report: Report, *, both: bool) -> FoundSource:
        from sophia_levanter.data.nanogpt import NanogptTokens

        if both:
            raise InputError(
                f"{self.field} {self.name}: a token file cannot be split; "
                "set data.validation, for example to nanogpt:val.bin"
            )
        corpus = NanogptTokens(self.name, tokenizer, field=self.field, cache_dir=cache_dir)

        def checked() -> list[Tokens]:
            corpus.check(report)
            return [corpus]

        return FoundSource(self.name, [os.path.realpath(corpus.path)], checked)


@DataSource.register_subclass("store")
class PreparedStore(DataSource):
    """`store:FOLDER`: a token store, or a folder with one store for training and one for validation."""

    holds = "prepared text"

    def absolute(self) -> str:
        return f"store:{_absolute(self.path)}"

    def find_tokens(self, tokenizer: Tokenizer, cache_dir: Path, report: Report, *, both: bool) -> FoundSource:
        from sophia_levanter.data.token_store import SIDES, TokenStore

        location = _absolute(self.path).rstrip("/")
        places = [f"{location}/{side}" for side in SIDES] if both else [location]
        try:
            stores = [TokenStore.open(place, tokenizer) for place in places]
        except InputError as error:
            hint = f"; without data.validation, store:FOLDER must contain {' and '.join(SIDES)}" if both else ""
            raise InputError(f"{self.field}: {error}{hint}") from error
        return FoundSource(self.name, [location], lambda: stores)


def source_named(name: str, field: str) -> DataSource:
    """Parse the name of a source and return the source.

    Args:
        name: `SCHEME:PATH` with a registered scheme, or a specification of files.
        field: the config field to name in error messages.

    Raises:
        InputError: if the scheme is unknown and no file has this name, or the source's class lacks a required method.
    """
    known = DataSource.get_known_choices()
    scheme, colon, path = name.partition(":")
    is_scheme = colon and re.fullmatch(r"\w+", scheme) and not path.startswith("//")
    if is_scheme and scheme not in known and not glob.glob(name.partition("/")[0]):
        nearest = difflib.get_close_matches(scheme, known, n=1, cutoff=0)[0]
        raise InputError(
            f"{field} is {name!r}; no file has this name, and {scheme}: is not a known source type; "
            f"did you mean {nearest}:? Available types: {', '.join(f'{kind}:' for kind in sorted(known))}"
        )
    kind = known.get(scheme, Files) if colon else Files
    check_subclass(kind, DataSource, field)
    return kind(name, field)


def absolute_source(name: str, field: str) -> str:
    """Return the name of a source in a form that is valid in any working directory."""
    return source_named(name, field).absolute()


def absolute_tokenizer(name: str) -> str:
    """Return the name of a tokenizer in a form that is valid in any working directory."""
    return _absolute(name) if name.endswith(TRAINED_TOKENIZER) else name


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
