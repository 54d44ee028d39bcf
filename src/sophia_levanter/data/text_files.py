"""Files of text, here or at a URL, plain or compressed: which there are, and how they are opened."""

from __future__ import annotations

import bz2
import glob
import gzip
import importlib
import io
import lzma
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from sophia_levanter.data.names import PYTHON_STDLIB
from sophia_levanter.errors import InputError

NOT_STDLIB_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
# How compressed files begin; the second pattern of zstd is a skippable frame.
MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
}
MAGIC_BYTES = 10
# A compressed file may expand to so many bytes, or so many times its size if that is more.
EXPANDED_BYTES, MOST_EXPANSION = 1 << 28, 200
# What is taken of a folder. A .json that is not compressed may well be a configuration.
KINDS = (".txt", ".jsonl", ".ndjson", ".jsonlines", ".parquet")
DATASET_MARKS = ("state.json", "dataset_dict.json")
# What fsspec's file systems call that by which a changed file is known.
REMOTE_MARKS = ("size", "mtime", "ino", "ETag", "etag", "generation", "md5Hash", "blob_id")


@dataclass(frozen=True)
class TextFile:
    """A file.

    Attributes:
        name: an absolute path, or a URL.
        size: bytes.
        version: another one if the content is another; a JSON value.
        marks: what changes when something is written to the file, or another one takes its place.
    """

    name: str
    size: int
    version: Any
    marks: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def kind(self) -> str:
        """The suffix without that of a compression, in lower case."""
        name = self.name.lower()
        for suffix in COMPRESSIONS:
            name = name.removesuffix(suffix)
        return os.path.splitext(name)[1]

    @property
    def named_compression(self) -> str | None:
        """The compression that the suffix stands for."""
        return COMPRESSIONS.get(os.path.splitext(self.name.lower())[1])

    @property
    def is_of_folder(self) -> bool:
        """Whether a folder that is named as a source takes it."""
        return self.kind in KINDS or (self.kind == ".json" and self.named_compression is not None)


class OpenFile:
    """A file that is being read, decompressed as its first bytes say.

    Attributes:
        file: which one.
        compression: gzip, zstd, xz, bzip2 or None.
        content: the decompressed bytes, from where they have been read to.
    """

    def __init__(self, file: TextFile, field: str) -> None:
        self.file = file
        self._field = field
        self._raw = _open_raw(file, field)
        begin = self._raw.read(MAGIC_BYTES)
        self.compression = next((name for name, magic in MAGIC.items() if magic.match(begin)), None)
        self.rewind()

    def rewind(self) -> None:
        """Go back to the beginning."""
        try:
            self._raw.seek(0)
        except (OSError, ValueError):  # a stream of a server that sends whole files only
            self._raw.close()
            self._raw = _open_raw(self.file, self._field)
        where = f"{self._field}: {self.file.name}"
        self.content = _decompressed(self._raw, self.compression, where)
        if self.compression is not None:
            limit = max(EXPANDED_BYTES, MOST_EXPANSION * self.file.size)
            self.content = cast(BinaryIO, io.BufferedReader(_Bounded(self.content, limit, where), 1 << 17))

    def share_read(self) -> float:
        """The share of the file that has been read."""
        return self._raw.tell() / self.file.size if self.file.size else 1.0

    def close(self) -> None:
        """Close the file."""
        self._raw.close()


class _Bounded(io.RawIOBase):
    """Decompressed bytes, as long as there are not many more than a text can have been."""

    def __init__(self, content: BinaryIO, limit: int, where: str) -> None:
        self._content, self._left, self._where = content, limit, where

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # One read, so that what stands before damage is there before the error.
        data = self._content.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise InputError(
                f"{self._where} expands to more than {MOST_EXPANSION} times its size, unlike any text; if it is one, "
                "decompress it first"
            )
        return len(data)


# What editors and downloads leave beside a file.
LEFT_BESIDE = (".bak", ".orig", ".swp", ".part", ".crdownload", ".tmp", ".incomplete")


def find_files(source: str, *, field: str, report: Callable[[str], None]) -> list[TextFile]:
    """The files that `source` names, in sorted order.

    Args:
        source: `python_stdlib`, or a path, a folder or a glob (`**` crosses folders), here (`~` is the home folder) or
            as a URL that fsspec knows. Of a folder the files of `KINDS`, compressed or not, and compressed .json.
            Of a folder or a glob, hidden files, backups, partial downloads and what macOS leaves are not taken, and a
            file with several links to it is taken once.
        field: the config field to name in errors.
        report: takes a line about files that were not taken.

    Raises:
        InputError: if there are none, one is something else than a file, or a URL cannot be read.
    """
    if source == PYTHON_STDLIB:
        paths = _stdlib_files()
        if not paths:
            raise InputError(f"{field}: {PYTHON_STDLIB}: this Python has no source files of its library; name a file")
        return [_local_file(path, field) for path in paths]
    if "://" in source:
        if "@" in urlsplit(source).netloc:
            raise InputError(
                f"{field}: the URL holds a name or a password; leave them to the environment of the library"
            )
        return _remote_files(source, field, report)
    pattern = os.path.abspath(os.path.expanduser(source))
    if os.path.isdir(pattern):
        paths = _files_of_folder(Path(pattern), source, field, report)
    elif os.path.lexists(pattern):
        paths = [Path(pattern)]
    else:
        # Without hidden files unless the pattern spells out their dot.
        shown, hidden = (
            {Path(name) for name in _matches(pattern, include_hidden=hidden) if not os.path.isdir(name)}
            for hidden in (False, True)
        )
        fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0]
        kept = {path for path in shown if not _is_left_beside(str(path)[len(fixed) :])}
        paths = _taken(shown | hidden, kept, field, report)
    if not paths:
        raise InputError(f"{field}: no file is called or matches {source!r}; give a path, a glob or {PYTHON_STDLIB}")
    return [_local_file(path, field) for path in paths]


@contextmanager
def opened(file: TextFile, field: str) -> Iterator[OpenFile]:
    """The file, open for reading.

    Raises:
        InputError: here or while it is read, if it cannot be read or decompressed; at the end, if something was written
            to it since it was looked up, or another file took its place.
    """
    try:
        with readable(file, field), closing(OpenFile(file, field)) as open_file:
            yield open_file
    except InputError:
        _check_unchanged(file, field)  # a file that is being written to may look damaged
        raise
    _check_unchanged(file, field)


def _check_unchanged(file: TextFile, field: str) -> None:
    if "://" not in file.name:
        marks = _local_file(Path(file.name), field).marks
    else:
        filesystem, path = _filesystem(file.name, field)
        with _naming_url(file.name, field):
            filesystem.invalidate_cache(path)
            marks = _remote_file(filesystem, path).marks
    # What a server tells of a file alone and of all in a folder may differ.
    if any(marks[name] != file.marks[name] for name in marks.keys() & file.marks.keys()):
        raise InputError(
            f"{field}: {file.name} changed after it was looked up; run the command again when nothing writes to it"
        )


@contextmanager
def readable(file: TextFile, field: str) -> Iterator[None]:
    """Errors of reading a file as errors of input."""
    try:
        yield
    except Exception as error:
        # Each compression has an error of its own.
        if (
            isinstance(error, EOFError | zlib.error | lzma.LZMAError | gzip.BadGzipFile)
            or type(error).__name__ == "ZstdError"
        ):
            raise InputError(
                f"{field}: {file.name} is truncated or damaged: {error}; copy or download it again"
            ) from error
        if isinstance(error, MemoryError):
            raise InputError(f"{field}: {file.name} holds a text that does not fit into memory; split it") from error
        if isinstance(error, OSError):
            reason = error.strerror or " ".join(str(error).split())
            raise InputError(f"{field}: cannot read {file.name}: {reason}") from error
        raise


def optional_import(module: str, package: str, what: str) -> Any:
    """A module of an optional dependency.

    Raises:
        InputError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{what} needs {package}, which is not installed: pip install {package}") from None


def _open_raw(file: TextFile, field: str) -> BinaryIO:
    if "://" not in file.name:
        return cast(BinaryIO, Path(file.name).open("rb"))
    filesystem, path = _filesystem(file.name, field)
    with _naming_url(file.name, field):
        return cast(BinaryIO, filesystem.open(path, "rb"))


def _decompressed(raw: BinaryIO, compression: str | None, where: str) -> BinaryIO:
    match compression:
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
        case "xz":
            return cast(BinaryIO, lzma.LZMAFile(raw))
        case "bzip2":
            return cast(BinaryIO, bz2.BZ2File(raw))
        case "zstd":
            # Python has it from 3.14 on. The package zstandard takes a truncated file for a whole one.
            module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
            zstd = optional_import(module, "backports.zstd", where)
            # `zstd --long=31` makes windows that decoders refuse unless they are told.
            window = zstd.DecompressionParameter.window_log_max
            return cast(BinaryIO, zstd.ZstdFile(raw, options={window: window.bounds()[1]}))
    return raw


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if not NOT_STDLIB_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    )


def _matches(pattern: str, *, include_hidden: bool) -> list[str]:
    """What a glob matches. `**` enters each folder once, by however many links it can be reached."""
    crossing = re.search(r"/\*\*(?=/|$)", pattern)
    if not crossing:
        return glob.glob(pattern, include_hidden=include_hidden)
    head, tail = pattern[: crossing.start()] or "/", pattern[crossing.end() + 1 :] or "*"
    folders = [f for top in glob.glob(head, include_hidden=include_hidden) for f in _folders_in(top, include_hidden)]
    return [n for f in folders for n in _matches(os.path.join(glob.escape(f), tail), include_hidden=include_hidden)]


def _folders_in(top: str, include_hidden: bool) -> list[str]:
    """A folder and those in it, each once: by the path with the fewest links."""
    found: dict[str, str] = {}
    waiting = [top]
    while waiting:
        links = []
        for start in waiting:
            for folder, names, _ in os.walk(start):
                names[:] = sorted(name for name in names if include_hidden or not name.startswith("."))
                if found.setdefault(os.path.realpath(folder), folder) is not folder:
                    names.clear()
                links += [path for name in names if os.path.islink(path := os.path.join(folder, name))]
        waiting = links
    return list(found.values())


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def _is_left_beside(relative: str) -> bool:
    """Whether it is an editor's backup, a partial download, or of macOS's folder for what only macOS reads."""
    *folders, name = relative.lower().split("/")
    return "__macosx" in folders or name.endswith((*LEFT_BESIDE, "~")) or (name[:1] == name[-1:] == "#")


def _own_name(name: str) -> str:
    """The name of the file beside which a backup or a partial download was left."""
    name = name.removeprefix("#").removesuffix("#").removesuffix("~")
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in LEFT_BESIDE else name


def _report_left_out(names: set[Any], field: str, report: Callable[[str], None]) -> None:
    if names:
        report(
            f"{field}: left out {len(names)} hidden files, backups or partial downloads, such as {min(names)}; "
            "name one to read it"
        )


def _taken(found: set[Path], kept: set[Path], field: str, report: Callable[[str], None]) -> list[Path]:
    """Those of the files that are kept, each once, in sorted order; one line says how many are not."""
    _report_left_out(found - kept, field, report)
    # A path without a link goes before one with a link, and a short one before a long one.
    by_real_path: dict[str, Path] = {}
    for path in sorted(kept, key=lambda path: (os.path.realpath(path) != str(path), len(path.parts), path)):
        by_real_path.setdefault(os.path.realpath(path), path)
    once = sorted(by_real_path.values())
    if len(once) < len(kept):
        again = min(kept - set(once))
        report(f"{field}: left out {len(kept) - len(once)} links to files that are read already, such as {again}")
    return once


def _files_of_folder(folder: Path, source: str, field: str, report: Callable[[str], None]) -> list[Path]:
    if any((folder / mark).is_file() for mark in DATASET_MARKS):
        raise InputError(f"{field}: {source!r} is a folder that `datasets` saved; write datasets:{source}")
    found = [p for p in folder.rglob("*") if p.is_file() and TextFile(_own_name(p.name), 0, None).is_of_folder]
    relative = {path: path.relative_to(folder).as_posix() for path in found}
    kept = {path for path in found if not _is_hidden(relative[path]) and not _is_left_beside(relative[path])}
    paths = _taken({*found}, kept, field, report)
    if not paths:
        raise InputError(
            f"{field}: the folder {source!r} holds no {', '.join(KINDS)} files; "
            f"name others with a glob such as {source.rstrip('/')}/*.md"
        )
    return paths


def _local_file(path: Path, field: str) -> TextFile:
    if not path.is_file():
        raise InputError(f"{field}: {path} is not a regular file, or a link to one that is gone")
    status = path.stat()
    marks = {"size": status.st_size, "mtime": status.st_mtime_ns, "ino": status.st_ino}
    return TextFile(str(path), status.st_size, status.st_mtime_ns, marks)


def _remote_files(source: str, field: str, report: Callable[[str], None]) -> list[TextFile]:
    filesystem, path = _filesystem(source, field)
    with _naming_url(source, field):
        if filesystem.isdir(path):
            found = [name for name in filesystem.find(path) if TextFile(_own_name(name), 0, None).is_of_folder]
            fixed = len(path)
        elif any(character in path for character in "*?["):
            found = [name for name in filesystem.glob(path) if not filesystem.isdir(name)]
            fixed = min(path.find(character) for character in "*?[" if character in path)
        else:
            found = [path] if filesystem.exists(path) else []
            fixed = len(path)
        if not found:
            raise InputError(f"{field}: no file is called or matches {source!r}")
        rest = {name: name[fixed:].lstrip("/") for name in found}
        taken = [name for name in found if not (_is_hidden(rest[name]) or _is_left_beside(rest[name]))]
        _report_left_out({*found} - {*taken}, field, report)
        return [_remote_file(filesystem, name) for name in sorted(taken)]


def _remote_file(filesystem: Any, path: str) -> TextFile:
    details = filesystem.info(path)
    marks = {name: details[name] for name in REMOTE_MARKS if name in details}
    return TextFile(filesystem.unstrip_protocol(path), details.get("size") or 0, filesystem.ukey(path), marks)


def _filesystem(url: str, field: str) -> tuple[Any, str]:
    fsspec = optional_import("fsspec", "fsspec", f"{field}: {url}")
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # the message names the package of this kind of URL
        raise InputError(f"{field}: {url} cannot be read: {str(error).splitlines()[0]}") from None
    except ValueError:
        known = ", ".join(f"{name}://" for name in ("gs", "s3", "hf", "https"))
        raise InputError(f"{field}: {url} is of an unknown kind; {known} and what fsspec knows besides") from None


@contextmanager
def _naming_url(url: str, field: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Only the kind of error: a message of a network library may spell out an address with its credentials.
        raise InputError(f"{field}: {url} cannot be read ({type(error).__name__})") from error
