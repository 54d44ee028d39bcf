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
    target: Path,
    *,
    is_complete: Callable[[Path], bool],
    build: Callable[[Path], None],
    resumes_after: type[InputError] | tuple[type[InputError], ...] = (),
    report: Callable[[str], None],
) -> None:
    """Make `target` by `build(directory)`, unless it is complete.

    `build` works in `target.partial`, which becomes `target` when `build` returns. Where it was killed or failed, the
    next call of `build` finds there what it left. After an `InputError` that is none of `resumes_after` nothing is
    left: other input will have another target. A second process that wants the same target waits for the first.

    Raises:
        InputError: if the parent of `target` cannot be written.
    """
    if is_complete(target):
        return
    with _naming_cache_dir(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(target, wait=False)
    if lock is None:
        report(f"waiting for another process that prepares {target}")
        with _naming_cache_dir(target.parent):
            lock = _lock(target, wait=True)
    assert lock is not None
    try:
        if not is_complete(target):
            _build_beside(target, is_complete, build, resumes_after)
    finally:
        _unlock(target, lock)


def _build_beside(
    target: Path,
    is_complete: Callable[[Path], bool],
    build: Callable[[Path], None],
    resumes_after: type[InputError] | tuple[type[InputError], ...],
) -> None:
    partial = target.with_name(target.name + PARTIAL)
    with _naming_cache_dir(target.parent):
        partial.mkdir(exist_ok=True)
    try:
        if not is_complete(partial):
            build(partial)
    except resumes_after:
        raise
    except InputError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with _naming_cache_dir(target.parent):
        shutil.rmtree(target, ignore_errors=True)  # one from which something has been deleted
        partial.rename(target)
        sync(target.parent)


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
