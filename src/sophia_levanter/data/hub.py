"""Documents of Hugging Face datasets: from the hub, or from a folder that `datasets` saved."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.documents import START, Position
from sophia_levanter.data.names import HUB, SAVED
from sophia_levanter.data.rows import Rows
from sophia_levanter.data.text_files import DATASET_MARKS, optional_import
from sophia_levanter.errors import InputError

OPTIONS = {HUB: ("split", "name", "revision", "streaming"), SAVED: ("split",)}


@dataclass(frozen=True)
class DatasetName:
    """`hub:NAME?split=train&name=CONFIG&revision=COMMIT&streaming=false`, or `datasets:FOLDER?split=train`, in parts.

    Attributes:
        kind: `hub:` or `datasets:`.
        path: the dataset's name, or the folder.
        split: which split.
        name: the dataset's configuration, if it has several.
        revision: a commit, tag or branch; the newest if not given.
        streaming: whether it is read as it arrives, rather than downloaded first.
    """

    kind: str
    path: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    streaming: bool = True

    @classmethod
    def parse(cls, source: str, field: str) -> DatasetName:
        """Takes a source's name apart.

        Raises:
            InputError: if an option is unknown or has a wrong value, or the path is missing.
        """
        kind = next(kind for kind in OPTIONS if source.startswith(kind))
        path, _, query = source.removeprefix(kind).partition("?")
        if not path:
            raise InputError(f"{field}: {source!r} names no dataset; write {kind}NAME")
        options: dict[str, Any] = {}
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key not in OPTIONS[kind]:
                raise InputError(f"{field}: {source!r}: unknown option {key!r}; there are {', '.join(OPTIONS[kind])}")
            if not value:
                raise InputError(f"{field}: {source!r}: the option {key!r} is empty")
            options[key] = value
        streaming = options.pop("streaming", "true")
        if streaming not in ("true", "false"):
            raise InputError(f"{field}: {source!r}: streaming is {streaming!r}; it must be true or false")
        return cls(kind, path, streaming=streaming == "true", **options)


class DatasetSource:
    """The rows of a Hugging Face dataset as documents; those without text are left out.

    Raises:
        InputError: if `datasets` is not installed, there is no such dataset, configuration, split or field, or the hub
            cannot be reached.
    """

    def __init__(self, source: str, config: DataConfig, *, field: str, special_tokens: Collection[str] = ()) -> None:
        self.rows = Rows(config, field=field, special_tokens=special_tokens)
        self._source = source
        self._name = DatasetName.parse(source, field)
        self._field = field
        self._done = 0
        self._num_rows: int | None = None
        self._looked_up = self.identity

    @property
    def parts(self) -> list[Any]:
        """A dataset is one part: the folder and its files; of one on the hub nothing is known but its name."""
        folder = Path(os.path.abspath(os.path.expanduser(self._name.path)))
        if self._name.kind == HUB and not Path(self._name.path).is_dir():
            return [[]]
        if self._name.kind == SAVED and not any((folder / mark).is_file() for mark in DATASET_MARKS):
            raise InputError(
                f"{self._field}: {folder} is no folder that `datasets` saved (no {DATASET_MARKS[0]} in it)"
            )
        files = sorted((str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*"))
        return [[str(folder), files]]

    @property
    def settings(self) -> list[Any]:
        """What else the documents depend on, as a JSON value."""
        return [self._source, *self.rows.settings]

    @property
    def identity(self) -> Any:
        """All that the documents depend on, as a JSON value."""
        return [self._source, *self.parts[0], *self.rows.settings]

    @property
    def inputs(self) -> list[str]:
        """What is read."""
        return [self._source]

    def where(self, position: Position) -> str:
        """The document before a position, for people."""
        return f"{self._source}, row {position[1]}"

    def documents(self, start: Position = START) -> Iterator[tuple[Position, str]]:
        """Each document from `start` on, with the position after its row."""
        dataset = self._load()
        self._done = start[1]
        info = getattr(dataset, "info", None)
        splits = getattr(info, "splits", None) or {}
        split = splits.get(self._name.split)
        self._num_rows = len(dataset) if hasattr(dataset, "__len__") else getattr(split, "num_examples", None)
        if start[1] and start[1] == self._num_rows:
            return
        for row in self._rows_of(dataset.skip(start[1]) if start[1] else dataset):
            self._done += 1
            where = f"{self._source}, row {self._done}"
            for document in self.rows.documents(self.rows.text_of(row, where), where):
                yield (0, self._done), document
        if self.identity != self._looked_up:
            raise InputError(
                f"{self._field}: {self._source} changed after it was looked up; run the command again when nothing "
                "writes to it"
            )

    def share_read(self) -> float | None:
        """How much of the source has been read, from 0 to 1; None if that cannot be known."""
        return min(self._done / self._num_rows, 1.0) if self._num_rows else None

    def _rows_of(self, dataset: Any) -> Iterator[Any]:
        rows = iter(dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                where = (
                    f"{self._field}: {self._source}, after row {self._done}, cannot be read ({type(error).__name__})"
                )
                if isinstance(error, ValueError) or type(error).__module__.startswith("datasets."):
                    raise InputError(f"{where}: {str(error).splitlines()[0]}") from error
                # A network that failed: what is done stays, and the same command goes on.
                raise OSError(where) from error
            yield row

    def _load(self) -> Any:
        datasets = optional_import("datasets", "datasets", f"{self._field}: {self._source}")
        name = self._name
        try:
            if name.kind == HUB:
                return datasets.load_dataset(
                    name.path, name.name, split=name.split, revision=name.revision, streaming=name.streaming
                )
            loaded = datasets.load_from_disk(os.path.expanduser(name.path))
        except Exception as error:
            # What can go wrong has many classes in four libraries. A network library's message is not shown: it may
            # spell out the address of a proxy, password included.
            known = isinstance(error, ValueError) or type(error).__module__.startswith("datasets.")
            shown = f": {str(error).splitlines()[0]}" if known and str(error) else ""
            raise InputError(
                f"{self._field}: {self._source} cannot be loaded ({type(error).__name__}){shown}"
            ) from error
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if name.split not in loaded:
            raise InputError(
                f"{self._field}: {self._source} has no split {name.split!r}; there are {', '.join(loaded)}"
            )
        return loaded[name.split]
