"""The folders of the steps: written aside and committed by a rename, listed, read newest first, removed."""

import dataclasses
import json
import re
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

from sophia_levanter.checkpoint.arrays import WORKERS, arrays_are_intact, write_arrays
from sophia_levanter.checkpoint.manifest import (
    JSON,
    CheckpointError,
    Manifest,
    one_line,
    read_manifest,
    write_manifest,
)
from sophia_levanter.checkpoint.tree import arrays_of, read_tree
from sophia_levanter.errors import InputError
from sophia_levanter.files import sync

Tree = TypeVar("Tree")

_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"step-\d{8,}\.(partial|removed)-[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class Restored(Generic[Tree]):
    """What `restore` returns: the tree, and the step, metadata and run id that it was saved with."""

    tree: Tree
    step: int
    metadata: dict[str, JSON]
    run_id: str


def steps(directory: Path) -> list[int]:
    """The committed steps in `directory`, ascending; none when there is no such folder."""
    if not directory.is_dir():
        return []
    names = (_STEP.fullmatch(entry.name) for entry in directory.iterdir())
    return sorted(int(name[1]) for name in names if name)


def remove_leftovers(directory: Path) -> None:
    """Delete what killed saves left in `directory`. For a run's start: no save into it may be under way."""
    if directory.is_dir():
        for entry in list(directory.iterdir()):
            if _LEFTOVER.fullmatch(entry.name):
                shutil.rmtree(entry)


def save(directory: Path, step: int, tree: Any, *, run_id: str, metadata: dict[str, JSON], keep: int) -> Path:
    """Write the arrays of `tree` as `directory/step-NNNNNNNN`, durably or not at all, and return that folder.

    Leaves that are jax or numpy arrays, or numpy scalars, are saved; others, Python numbers among them, are not. Of
    this step and the ones before it the newest `keep` stay. Later steps, there when a run was taken back to an
    older one, are left alone.

    Raises `FileExistsError` when an intact checkpoint of this step is there (a damaged one is replaced, or else a run
    that fell back because of it could never get past it), and `CheckpointError` when the disk refuses.
    """
    if step < 0 or keep < 1:
        raise InputError(f"a checkpoint needs step >= 0 and keep >= 1, found step = {step} and keep = {keep}")
    metadata = json.loads(json.dumps(metadata))  # what JSON cannot hold fails here, before the arrays are written
    final = _folder(directory, step)
    if final.exists() and _is_intact(final):
        raise FileExistsError(f"{final} already holds a checkpoint: remove it to save step {step} again")

    partial = _with_suffix(final, "partial")
    try:
        partial.mkdir(parents=True)
        arrays = write_arrays(partial, arrays_of(tree))
        _sync_all(partial)
        write_manifest(partial, Manifest(run_id, step, metadata, arrays))
        sync(partial)
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync(directory)
        sync(directory.parent)
    except OSError as error:
        raise CheckpointError(f"{final} could not be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # still there only if something failed

    for old in [saved for saved in steps(directory) if saved <= step][:-keep]:
        _remove(_folder(directory, old))
    return final


def restore(directory: Path, like: Tree, *, report: Callable[[str], None], step: int | None = None) -> Restored[Tree]:
    """Read the newest intact checkpoint in `directory`, or exactly `step`, into the structure of `like`.

    The array leaves of `like` say shape, dtype and sharding: `jax.Array` or `jax.ShapeDtypeStruct` (the default device
    when it is committed to none), or numpy arrays, which come back as numpy arrays. Other leaves are returned as they
    are. The sharding need not be the one of the save; only the chunks that it needs are read.

    A damaged checkpoint is passed over for the one before it, with a line to `report`. Raises `CheckpointError` when
    all are damaged, and `InputError` when there is none or when it is of another model (leaves, shapes or dtypes).
    """
    found = steps(directory)
    if not found:
        raise InputError(f"{directory} holds no checkpoint (no step-* folder): name one that a run has saved to")
    if step is not None and step not in found:
        raise InputError(f"{directory} holds no checkpoint of step {step}: it has {', '.join(map(str, found))}")

    failures: list[str] = []
    for candidate in [step] if step is not None else reversed(found):
        folder = _folder(directory, candidate)
        if failures:
            report(f"WARNING: damaged checkpoint: {failures[-1]}; falling back to {folder.name}")
        try:
            manifest = _read_own_manifest(folder)
            tree = read_tree(folder, manifest.arrays, like)
        except CheckpointError as error:
            failures.append(str(error))
        else:
            return Restored(tree, manifest.step, manifest.metadata, manifest.run_id)
    raise CheckpointError(f"{directory} holds no intact checkpoint: {'; '.join(failures)}")


def _folder(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def _with_suffix(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}.{kind}-{uuid.uuid4().hex}")


def _read_own_manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if _folder(folder.parent, manifest.step) != folder:
        raise CheckpointError(f"{folder}: its manifest is the one of step {manifest.step}")
    return manifest


def _is_intact(folder: Path) -> bool:
    try:
        return arrays_are_intact(folder, _read_own_manifest(folder).arrays)
    except CheckpointError:
        return False


def _remove(folder: Path) -> None:
    """Rename, then delete: a kill half-way leaves a leftover and never a step that looks whole."""
    removed = _with_suffix(folder, "removed")
    folder.rename(removed)
    sync(folder.parent)
    # A reader may hold a file open (NFS then refuses); what stays is removed with the leftovers.
    shutil.rmtree(removed, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(sync, [folder, *folder.rglob("*")]))
