"""A cache of directories that appear whole or not at all, whoever is killed and however many build at once.

Beside them it keeps small results of reading much.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sophia_levanter.errors import InputError
from sophia_levanter.files import sync, write_atomically

PARTIAL = ".partial"
RESULTS = "results"


def build_directory(
    base: Path,
    *,
    find: Callable[[], Path | None],
    build: Callable[[Path], Path],
    is_resumable: Callable[[Path], bool] = lambda directory: False,
    report: Callable[[str], None],
) -> Path:
    """The directory that `find` finds; if there is none, one that `build` makes.

    `build(directory)` works in `base.partial`, which is renamed to the path that it returns. Where it was killed, the
    next call of `build` finds there what it left; where it failed with an `InputError`, only if that `is_resumable`. A
    second process with the same `base` waits for the first.

    Raises:
        InputError: if the parent of `base` cannot be written.
    """
    if (found := find()) is not None:
        return found
    with _naming_cache_dir(base.parent):
        base.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(base, wait=False)
    if lock is None:
        report(f"waiting for another process that prepares {base}")
        with _naming_cache_dir(base.parent):
            lock = _lock(base, wait=True)
    assert lock is not None
    try:
        return find() or _build_beside(base, build, is_resumable)
    finally:
        _unlock(base, lock)


def _build_beside(base: Path, build: Callable[[Path], Path], is_resumable: Callable[[Path], bool]) -> Path:
    partial = base.with_name(base.name + PARTIAL)
    with _naming_cache_dir(base.parent):
        partial.mkdir(exist_ok=True)
    try:
        target = build(partial)
    except InputError:
        if not is_resumable(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    with _naming_cache_dir(base.parent):
        shutil.rmtree(target, ignore_errors=True)  # one from which something has been deleted
        partial.rename(target)
        sync(target.parent)
    return target


def remembered(cache_dir: Path | None, key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compute` gives, a JSON object; for a key that was there before, what it gave then.

    Args:
        cache_dir: where it is kept, if that can be written; None keeps nothing.
        key: all that the result depends on, a JSON value.
        compute: reads much.
    """
    if cache_dir is None:
        return compute()
    path = cache_dir / RESULTS / hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    result = compute()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(result).encode())
    return result


def _lock_path(base: Path) -> Path:
    return base.with_name(f"{base.name}.lock")


def _lock(base: Path, *, wait: bool) -> int | None:
    """An open file that holds the lock on `base`; None if another holds it and `wait` is false.

    The system lets go of the lock when its process ends, however it ends.
    """
    path = _lock_path(base)
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


def _unlock(base: Path, descriptor: int) -> None:
    _lock_path(base).unlink(missing_ok=True)
    os.close(descriptor)


@contextmanager
def _naming_cache_dir(parent: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"data.cache_dir: cannot write in {parent}: {error.strerror}; choose another folder"
        ) from error
