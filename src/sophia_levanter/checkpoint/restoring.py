"""Reading steps back: the newest that is whole, or one that is asked for; and looking for damage."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from sophia_levanter.checkpoint.arrays import find_damage, read_parts
from sophia_levanter.checkpoint.manifest import FILE_NAME, JSON, CheckpointError, Manifest, decode_manifest
from sophia_levanter.checkpoint.shards import whole
from sophia_levanter.checkpoint.storage import Storage, step_name, storage_at
from sophia_levanter.checkpoint.tree import arrays_of, read_tree
from sophia_levanter.errors import InputError
from sophia_levanter.partition.messages import PATIENCE, NoAnswer, Processes

Tree = TypeVar("Tree")

_numbers = itertools.count()


@dataclass(frozen=True)
class Restored(Generic[Tree]):
    """What `restore` returns.

    Attributes:
        tree: the tree.
        step, metadata, run_id: what it was saved with.
    """

    tree: Tree
    step: int
    metadata: dict[str, JSON]
    run_id: str


def steps(directory: Path | str) -> list[int]:
    """The committed steps in a directory, ascending; none when there is no such folder."""
    return storage_at(directory).steps()


def remove_leftovers(directory: Path | str) -> None:
    """Delete what killed saves left in a directory. For a run's start: no save into it may be under way."""
    storage_at(directory).remove_leftovers()


def check_writable(directory: Path | str) -> None:
    """Find out before the first save whether one can be made.

    Raises:
        InputError: if nothing can be written there.
    """
    storage_at(directory).check_writable()


def remove(directory: Path | str, step: int) -> None:
    """Remove a committed step; a kill half-way leaves a leftover and never a step that looks whole."""
    storage_at(directory).remove(step)


def read_step(directory: Path | str, step: int) -> Manifest:
    """The manifest of a committed step.

    Raises:
        CheckpointError: if it is damaged.
        InputError: if another version of this package wrote it.
    """
    return _read_manifest(storage_at(directory), step)


def read_arrays(directory: Path | str, manifest: Manifest) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a step with their paths in the tree, of which one at a time is in memory.

    Raises:
        CheckpointError: if a file is damaged.
    """
    folder = _arrays_folder(storage_at(directory), manifest)
    for saved in manifest.arrays:
        (parts,) = read_parts(folder, [(saved, {whole(saved.shape)})])
        yield saved.path, parts[whole(saved.shape)]


def damage(directory: Path | str, step: int) -> list[str]:
    """All that is wrong with a committed step, a line for each file; reads every byte of it.

    Raises:
        InputError: if another version of this package wrote it.
    """
    return _damage(storage_at(directory), step)


def is_intact(storage: Storage, step: int) -> bool:
    """Whether every byte of a committed step is what was written."""
    return not _damage(storage, step)


def restore(
    directory: Path | str,
    like: Tree,
    *,
    report: Callable[[str], None],
    step: int | None = None,
    cast: bool = False,
    partial: bool = False,
    added: Mapping[str, int] | None = None,
    processes: Processes | None = None,
) -> Restored[Tree]:
    """Read the newest intact checkpoint in `directory`, or exactly `step`, into the structure of `like`.

    The array leaves of `like` say shape, dtype and sharding: `jax.Array` or `jax.ShapeDtypeStruct` (the default device
    when it is committed to none), or numpy arrays, which come back as numpy arrays. Other leaves are returned as they
    are. The sharding and the number of processes need not be those of the save; only the chunks that this process
    needs are read. All processes of a run call it together, and get the same step.

    Args:
        directory: a path, or a `gs://` or `s3://` URL.
        like: says what is wanted.
        report: gets a line for each damaged checkpoint that is passed over for the one before it.
        step: the one to read; the newest that is whole if not given.
        cast: convert floating-point arrays of another dtype, which otherwise are refused.
        partial: pass over arrays that `like` does not have, which otherwise are refused.
        added: values of scalars, by path, that checkpoints lack which were saved before `like` had them.
        processes: those of the run; this one alone if not given.

    Raises:
        CheckpointError: if all are damaged.
        InputError: if there is none, or it is of another model (leaves, shapes or dtypes).
    """
    processes = processes or Processes()
    storage = storage_at(directory)
    name = f"restore/{next(_numbers)}"
    # Disks that hosts share do not always show all of them the same names.
    text = processes.broadcast(f"{name}/steps", " ".join(map(str, storage.steps())), PATIENCE)
    found = [int(word) for word in text.split()]
    if not found:
        raise InputError(f"{directory} holds no checkpoint (no step-* folder): name one that a run has saved to")
    if step is not None and step not in found:
        raise InputError(f"{directory} holds no checkpoint of step {step}: it has {', '.join(map(str, found))}")

    wanted = arrays_of(like)
    failures: list[str] = []
    for candidate in [step] if step is not None else reversed(found):
        if failures:
            report(f"WARNING: damaged checkpoint: {failures[-1]}; falling back to {step_name(candidate)}")
        started, failure = time.monotonic(), None
        try:
            manifest = _read_manifest(storage, candidate)
            arrays = [saved for saved in manifest.arrays if not partial or saved.path in wanted]
            tree = read_tree(_arrays_folder(storage, manifest), arrays, like, cast=cast, added=added)
        except CheckpointError as error:
            failure = str(error)
        try:
            patience = PATIENCE + time.monotonic() - started
            failure = processes.first_failure(f"{name}/{candidate}", failure, patience)
        except NoAnswer as error:
            raise CheckpointError(f"{directory}: step {candidate} could not be read: {error}") from error
        if failure is None:
            return Restored(tree, manifest.step, manifest.metadata, manifest.run_id)
        failures.append(failure)
    raise CheckpointError(f"{directory} holds no intact checkpoint: {'; '.join(failures)}")


def _damage(storage: Storage, step: int) -> list[str]:
    try:
        manifest = _read_manifest(storage, step)
    except CheckpointError as error:
        return [str(error)]
    return find_damage(_arrays_folder(storage, manifest), manifest.arrays)


def _read_manifest(storage: Storage, step: int) -> Manifest:
    folder = storage.folder(step_name(step))
    manifest = decode_manifest(f"{folder}/{FILE_NAME}", storage.read_manifest(step))
    if manifest.step != step:
        raise CheckpointError(f"{folder}: its manifest is the one of step {manifest.step}")
    return manifest


def _arrays_folder(storage: Storage, manifest: Manifest) -> str:
    return storage.folder(f"{step_name(manifest.step)}/{manifest.folder}")
