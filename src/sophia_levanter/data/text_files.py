"""Files of text, here or at a URL, plain or compressed: which there are, and how they are opened."""

from __future__ import annotations

import glob
import gzip
import importlib
import lzma
import os
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from sophia_levanter.data.names import PYTHON_STDLIB
from sophia_levanter.errors import InputError

NOT_STDLIB_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
COMPRESSIONS = (".gz", ".zst", ".xz")
JSON_LINES, PARQUET = ".jsonl", ".parquet"
# What is taken of a folder.
KINDS = (".txt", JSON_LINES, PARQUET)
DATASET_MARKS = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class TextFile:
    """A file.

    Attributes:
        name: an absolute path, or a URL.
        size: bytes.
        version: another one if the content is another; a JSON value.
    """

    name: str
    size: int
    version: Any

    @property
    def kind(self) -> str:
        """The suffix without that of a compression, in lower case."""
        name = self.name.lower()
        for suffix in COMPRESSIONS:
            name = name.removesuffix(suffix)
        return os.path.splitext(name)[1]


def find_files(source: str, *, field: str) -> list[TextFile]:
    """The files that `source` names, in sorted order.

    Args:
        source: `python_stdlib`, or a path, a folder or a glob (`**` crosses folders), here (`~` is the home folder) or
            as a URL that fsspec knows. Of a folder all that is called .txt, .jsonl or .parquet, compressed or not.
        field: the config field to name in errors.

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
        return _remote_files(source, field)
    pattern = os.path.abspath(os.path.expanduser(source))
    if os.path.isdir(pattern):
        paths = _files_of_folder(Path(pattern), source, field)
    elif os.path.lexists(pattern):
        paths = [Path(pattern)]
    else:
        paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(match)]
    if not paths:
        raise InputError(f"{field}: no file is called or matches {source!r}; give a path, a glob or {PYTHON_STDLIB}")
    return [_local_file(path, field) for path in paths]


@contextmanager
def opened(file: TextFile, field: str) -> Iterator[tuple[BinaryIO, Callable[[], float]]]:
    """The content of a file, and a function that says which share of the file has been read.

    Raises:
        InputError: here or while it is read, if it cannot be read or decompressed.
    """
    with readable(file, field), _open_raw(file, field) as raw:
        yield _decompressed(raw, file.name, field), lambda: raw.tell() / file.size if file.size else 1.0


@contextmanager
def readable(file: TextFile, field: str) -> Iterator[None]:
    """Errors of reading a file as errors of input."""
    try:
        yield
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise _undone(file, field, error) from error
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(f"{field}: cannot read {file.name}: {reason}") from error
    except Exception as error:
        # Each compression has an error of its own.
        if isinstance(error, EOFError | zlib.error | lzma.LZMAError) or type(error).__name__ == "ZstdError":
            raise _undone(file, field, error) from error
        raise


def _undone(file: TextFile, field: str, error: Exception) -> InputError:
    suffix = os.path.splitext(file.name)[1].removeprefix(".").replace("gz", "gzip")
    return InputError(f"{field}: {file.name} is truncated or damaged, or no {suffix} file: {error}")


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


def _decompressed(raw: BinaryIO, name: str, field: str) -> BinaryIO:
    suffix = os.path.splitext(name.lower())[1]
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    if suffix == ".zst":
        # Python has it from 3.14 on. The package zstandard takes a truncated file for a whole one.
        module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
        return cast(BinaryIO, optional_import(module, "backports.zstd", f"{field}: {name}").ZstdFile(raw))
    return raw


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if not NOT_STDLIB_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    )


def _files_of_folder(folder: Path, source: str, field: str) -> list[Path]:
    if any((folder / mark).is_file() for mark in DATASET_MARKS):
        raise InputError(f"{field}: {source!r} is a folder that `datasets` saved; write datasets:{source}")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and TextFile(path.name, 0, None).kind in KINDS)
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
    return TextFile(str(path), status.st_size, status.st_mtime_ns)


def _remote_files(source: str, field: str) -> list[TextFile]:
    filesystem, path = _filesystem(source, field)
    with _naming_url(source, field):
        if filesystem.isdir(path):
            found = [name for name in filesystem.find(path) if TextFile(name, 0, None).kind in KINDS]
        elif any(character in path for character in "*?["):
            found = [name for name in filesystem.glob(path) if not filesystem.isdir(name)]
        else:
            found = [path] if filesystem.exists(path) else []
        if not found:
            raise InputError(f"{field}: no file is called or matches {source!r}")
        return [
            TextFile(filesystem.unstrip_protocol(name), filesystem.size(name) or 0, filesystem.ukey(name))
            for name in sorted(found)
        ]


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
