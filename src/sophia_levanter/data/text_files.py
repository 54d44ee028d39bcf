"""Finding the local and remote text files that a source specifies, and detecting changes to them."""

from __future__ import annotations

import glob
import importlib
import io
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from sophia_levanter.errors import InputError, counted

PYTHON_STDLIB = "python_stdlib"
TRAINED_TOKENIZER = ".tiktoken"  # suffix of a saved byte-pair encoding
NOT_STDLIB_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
# The suffixes of the files read from a folder. Uncompressed .json files are skipped: they may be configuration files.
KINDS = (".txt", ".jsonl", ".ndjson", ".jsonlines", ".parquet")
DATASET_MARKS = ("state.json", "dataset_dict.json")
# Metadata folders, and the suffixes of leftovers from editors and downloads.
LEFT_BESIDE_FOLDERS = {"__macosx", "_temporary", "_delta_log"}
LEFT_BESIDE = (".bak", ".orig", ".swp", ".part", ".crdownload", ".tmp", ".incomplete")
# The fsspec names of the properties that show whether a file was modified or replaced.
REMOTE_MARKS = ("size", "mtime", "ino", "ETag", "etag", "Last-Modified", "generation", "md5Hash", "blob_id")

Report = Callable[[str], None]


@dataclass(frozen=True)
class TextFile:
    """A text file, and its state when it was found."""

    name: str  # an absolute path, or a URL
    field: str  # the config field that specifies the file, for error messages
    size: int  # in bytes
    version: Any  # a JSON value that changes with the content
    marks: Mapping[str, Any]  # properties that change when the file is written to or replaced

    @property
    def where(self) -> str:
        """The field and the file, for messages."""
        return f"{self.field}: {self.name}"

    @property
    def named(self) -> tuple[str, str | None]:
        """The lowercase suffix, ignoring any compression suffix, and the compression (None if uncompressed)."""
        return _suffixes(self.name)

    def open(self) -> BinaryIO:
        """Open the file without decompressing it."""
        if "://" not in self.name:
            return cast(BinaryIO, Path(self.name).open("rb"))
        with _remote(self.name, self.field) as (filesystem, path):
            raw = filesystem.open(path, "rb")
            # fsspec reads lines slowly and, because it seeks, not from a stream.
            return cast(BinaryIO, io.BufferedReader(raw, 1 << 17) if hasattr(raw, "readinto") else raw)

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was found.

        Raises:
            InputError: if the file was modified or replaced.
        """
        if "://" not in self.name:
            now = _local_file(Path(self.name), self.field)
        else:
            with _remote(self.name, self.field) as (filesystem, path):
                filesystem.invalidate_cache(path)
                now = _remote_file(filesystem, path, self.field)
        # A server may report different properties for a single file than in a folder listing.
        if any(now.marks[name] != self.marks[name] for name in now.marks.keys() & self.marks.keys()):
            raise InputError(
                f"{self.where} changed after it was found; run the command again when nothing is writing to it"
            )


def _suffixes(name: str) -> tuple[str, str | None]:
    stem, last = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1], COMPRESSIONS[last]) if last in COMPRESSIONS else (last, None)


def _is_of_folder(name: str) -> bool:
    """Return whether a folder source includes files with this name, ignoring any backup or partial-download suffix."""
    kind, compression = _suffixes(_own_name(name))
    return kind in KINDS or (kind == ".json" and compression is not None)


def find_files(source: str, *, field: str, report: Report) -> list[TextFile]:
    """Find the files that `source` specifies, and return them in sorted order.

    Args:
        source: `python_stdlib`, or a file, folder or glob (`**` matches any folders; `~` is the home folder), given as
            a local path or as a URL that fsspec supports. For a folder, the files with the suffixes in `KINDS`,
            compressed or not, and compressed .json files are read. Folders and globs skip hidden files, backups,
            partial downloads and macOS metadata, and include each file only once even if several links lead to it.
        field: the config field to name in error messages.
        report: called with messages about skipped files.

    Raises:
        InputError: if no file is found, a path is not a file, or a URL cannot be read.
    """
    if source == PYTHON_STDLIB:
        paths = _stdlib_files()
        if not paths:
            raise InputError(
                f"{field}: {PYTHON_STDLIB}: this Python installation does not include the source code of the "
                "standard library; specify a file"
            )
        return [_local_file(path, field) for path in paths]
    if "://" in source:
        if "@" in urlsplit(source).netloc:
            raise InputError(
                f"{field}: the URL contains a user name or password; pass credentials in environment variables instead"
            )
        return _remote_files(source, field, report)
    pattern = os.path.abspath(os.path.expanduser(source))
    if os.path.isdir(pattern):
        paths = _files_of_folder(Path(pattern), source, field, report)
    elif os.path.lexists(pattern):
        paths = [Path(pattern)]
    else:
        # Hidden files are skipped unless the pattern contains their leading dot.
        shown, hidden = (
            {Path(name) for name in _matches(pattern, include_hidden=hidden) if not os.path.isdir(name)}
            for hidden in (False, True)
        )
        fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0]
        kept = {path for path in shown if not _is_left_beside(str(path)[len(fixed) :])}
        paths = _taken(shown | hidden, kept, field, report)
    if not paths:
        raise InputError(f"{field}: no file matches {source!r}; specify a path, a glob or {PYTHON_STDLIB}")
    return [_local_file(path, field) for path in paths]


def optional_import(module: str, package: str, what: str) -> Any:
    """Import a module of an optional dependency.

    Raises:
        InputError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{what} requires {package}, which is not installed; run pip install {package}") from None


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if not NOT_STDLIB_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    )


def _matches(pattern: str, *, include_hidden: bool) -> list[str]:
    """Return the paths that match a glob. `**` visits each folder only once, even if several links lead to it."""
    crossing = re.search(r"/\*\*(?=/|$)", pattern)
    if not crossing:
        return glob.glob(pattern, include_hidden=include_hidden)
    head, tail = pattern[: crossing.start()] or "/", pattern[crossing.end() + 1 :] or "*"
    folders = [f for top in glob.glob(head, include_hidden=include_hidden) for f in _folders_in(top, include_hidden)]
    return [n for f in folders for n in _matches(os.path.join(glob.escape(f), tail), include_hidden=include_hidden)]


def _folders_in(top: str, include_hidden: bool) -> list[str]:
    """Return a folder and all folders below it without duplicates, each under the path with the fewest links."""
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
    """Return whether a path is a backup, a partial download, or inside a metadata folder from macOS or Spark."""
    *folders, name = relative.lower().split("/")
    return (
        not LEFT_BESIDE_FOLDERS.isdisjoint(folders)
        or name.endswith((*LEFT_BESIDE, "~"))
        or (name[:1] == name[-1:] == "#")
    )


def _own_name(name: str) -> str:
    """Return the name of the file to which a backup or a partial download belongs."""
    name = name.removeprefix("#").removesuffix("#").removesuffix("~")
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in LEFT_BESIDE else name


def _report_left_out(names: set[Any], field: str, report: Report) -> None:
    if names:
        report(
            f"{field}: skipped {counted(len(names), 'hidden, backup or partially downloaded file')}, "
            f"such as {min(names)}; to read one, specify its path"
        )


def _taken(found: set[Path], kept: set[Path], field: str, report: Report) -> list[Path]:
    """Return the kept files in sorted order without duplicates, and report how many files are skipped."""
    _report_left_out(found - kept, field, report)
    # Prefer paths without links, then short paths.
    by_real_path: dict[str, Path] = {}
    for path in sorted(kept, key=lambda path: (os.path.realpath(path) != str(path), len(path.parts), path)):
        by_real_path.setdefault(os.path.realpath(path), path)
    once = sorted(by_real_path.values())
    if len(once) < len(kept):
        again = min(kept - set(once))
        report(f"{field}: skipped {counted(len(kept) - len(once), 'link')} to files already included, such as {again}")
    return once


def _files_of_folder(folder: Path, source: str, field: str, report: Report) -> list[Path]:
    if any((folder / mark).is_file() for mark in DATASET_MARKS):
        raise InputError(f"{field}: {source!r} is a folder saved by `datasets`; use datasets:{source}")
    relative = {path: path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    found = [path for path in relative if path.is_file() and _is_of_folder(path.name)]
    kept = {path for path in found if not _is_hidden(relative[path]) and not _is_left_beside(relative[path])}
    paths = _taken({*found}, kept, field, report)
    links = [path for path in relative if path.is_symlink() and path.is_dir() and not _is_hidden(relative[path])]
    # The files in a link to a folder below this one are read anyway.
    if outside := [path for path in links if not path.resolve().is_relative_to(folder.resolve())]:
        report(
            f"{field}: skipped {counted(len(outside), 'link')} to other folders, such as {min(outside)}; "
            f"to follow links, use a glob such as {source.rstrip('/')}/**/*.txt"
        )
    if not paths:
        raise InputError(
            f"{field}: the folder {source!r} contains no {', '.join(KINDS)} files; "
            f"specify other files with a glob such as {source.rstrip('/')}/*.md"
        )
    return paths


def _local_file(path: Path, field: str) -> TextFile:
    if not path.is_file():
        raise InputError(f"{field}: {path} is not a regular file, or is a broken link")
    status = path.stat()
    marks = {"size": status.st_size, "mtime": status.st_mtime_ns, "ino": status.st_ino}
    return TextFile(str(path), field, status.st_size, status.st_mtime_ns, marks)


def _remote_files(source: str, field: str, report: Report) -> list[TextFile]:
    with _remote(source, field) as (filesystem, path):
        if filesystem.isdir(path):
            found = [name for name in filesystem.find(path) if _is_of_folder(name)]
            fixed = len(path)
        elif any(character in path for character in "*?["):
            found = [name for name in filesystem.glob(path) if not filesystem.isdir(name)]
            fixed = min(path.find(character) for character in "*?[" if character in path)
        else:
            found = [path] if filesystem.exists(path) else []
            fixed = len(path)
        if not found:
            raise InputError(f"{field}: no file matches {source!r}")
        rest = {name: name[fixed:].lstrip("/") for name in found}
        taken = [name for name in found if not (_is_hidden(rest[name]) or _is_left_beside(rest[name]))]
        _report_left_out({*found} - {*taken}, field, report)
        return [_remote_file(filesystem, name, field) for name in sorted(taken)]


def _remote_file(filesystem: Any, path: str, field: str) -> TextFile:
    details = filesystem.info(path)
    marks = {name: details[name] for name in REMOTE_MARKS if name in details}
    name, version = filesystem.unstrip_protocol(path), filesystem.ukey(path)
    if name.startswith(("http://", "https://")) and (tag := marks.get("ETag") or marks.get("Last-Modified")):
        version = [version, tag]  # fsspec assumes that files on web servers never change
    return TextFile(name, field, details.get("size") or 0, version, marks)


@contextmanager
def _remote(url: str, field: str) -> Iterator[tuple[Any, str]]:
    """Yield the file system for a URL and the path in it. Convert errors inside the context to `InputError`."""
    fsspec = optional_import("fsspec", "fsspec", f"{field}: {url}")
    try:
        found = fsspec.core.url_to_fs(url)
    except ImportError as error:  # the message names the package for this kind of URL
        raise InputError(f"{field}: {url} cannot be read: {str(error).splitlines()[0]}") from None
    except ValueError:
        known = ", ".join(f"{name}://" for name in ("gs", "s3", "hf", "https"))
        raise InputError(
            f"{field}: {url} has an unknown scheme; use {known} or another scheme that fsspec supports"
        ) from None
    try:
        yield found
    except InputError:
        raise
    except Exception as error:
        # Show only the type of the error, because messages from network libraries may contain URLs with credentials.
        raise InputError(f"{field}: {url} cannot be read ({type(error).__name__})") from error
