"""A cache of directories that appear whole or not at all, whoever is killed and however many build at once."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sophia_levanter.errors import InputError

_CONTENT = "content"
_TEMPORARY = re.compile(r"(?P<target>[0-9a-f]{32})\.tmp-\w{8}")


def build_directory(
    target: Path,
    *,
    is_complete: Callable[[Path], bool],
    build: Callable[[Path], None],
    report: Callable[[str], None],
) -> None:
    """Make `target` by `build(directory)`, unless it is complete.

    `build` works in a temporary directory beside `target`, which becomes `target` when `build` returns and is removed
    when it raises. A second process that wants the same target waits for the first. What killed processes left in the
    parent of `target` is removed.

    Raises:
        InputError: if the parent of `target` cannot be written.
    """
    if is_complete(target):
        return
    with _naming_cache_dir(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        lock = _lock(target, wait=False)
    if lock is None:
        report(f"waiting for another process that prepares {target}")
        with _naming_cache_dir(target.parent):
            lock = _lock(target, wait=True)
    assert lock is not None
    try:
        if not is_complete(target):
            _build_beside(target, build)
    finally:
        _unlock(target, lock)


def _build_beside(target: Path, build: Callable[[Path], None]) -> None:
    with _naming_cache_dir(target.parent):
        temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
    try:
        content = temporary / _CONTENT  # made by mkdir: mkdtemp's own permissions are for its owner only
        content.mkdir()
        build(content)
        with _naming_cache_dir(target.parent):
            shutil.rmtree(target, ignore_errors=True)  # one from which something has been deleted
            content.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(parent: Path) -> None:
    """A temporary directory whose target nobody has locked belongs to a process that is gone."""
    for temporary in parent.iterdir():
        # The folder is the user's choice and may hold other things: only names that are made here count.
        name = _TEMPORARY.fullmatch(temporary.name)
        if name is None:
            continue
        target = parent / name["target"]
        lock = _lock(target, wait=False)
        if lock is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            _unlock(target, lock)


def _lock_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")


def _lock(target: Path, *, wait: bool) -> int | None:
    """An open file that holds the lock on `target`; None if another holds it and `wait` is false.

    The system lets go of the lock when its process ends, however it ends.
    """
    path = _lock_path(target)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder deletes the file on leaving, and a lock on a deleted file excludes nobody: then start again.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _unlock(target: Path, descriptor: int) -> None:
    _lock_path(target).unlink(missing_ok=True)
    os.close(descriptor)


@contextmanager
def _naming_cache_dir(parent: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"data.cache_dir: cannot write in {parent}: {error.strerror}; choose another folder"
        ) from error
