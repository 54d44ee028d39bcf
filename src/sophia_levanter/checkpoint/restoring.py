"""Restoring trees of arrays from the newest intact step or a given step, and checking steps for damage."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import FlattenedIndexKey, keystr, tree_flatten_with_path, tree_unflatten

from sophia_levanter.checkpoint.arrays import box_of, find_damage, read_parts, whole
from sophia_levanter.checkpoint.manifest import (
    FILE_NAME,
    JSON,
    Box,
    CheckpointError,
    Manifest,
    SavedArray,
    decode_manifest,
)
from sophia_levanter.checkpoint.storage import Storage, step_name, storage_at
from sophia_levanter.errors import InputError
from sophia_levanter.partition.processes import PATIENCE, NoAnswer, Processes

Tree = TypeVar("Tree")


def arrays_of(tree: Any) -> dict[str, Any]:
    """Return the array leaves of `tree`, keyed by path (such as `model.layers.0.weight`).

    jax and numpy arrays, numpy scalars and `jax.ShapeDtypeStruct`s count as arrays. As in Equinox, Python numbers do
    not.
    """
    return {path: leaf for path, leaf in _named_leaves(tree)[0] if _is_array(leaf)}


def read_tree(
    folder: str, saved: Sequence[SavedArray], like: Tree, *, cast: bool, added: Mapping[str, int] | None = None
) -> Tree:
    """Return `like` with its arrays replaced by those saved in `folder`, which get the same shardings.

    `cast` and `added` are the arguments of `restore`.

    Raises:
        InputError: if the saved arrays do not match those in `like`.
        CheckpointError: if an array cannot be read.
    """
    named, structure = _named_leaves(like)
    there = {array.path: array for array in saved}
    new = {path: value for path, value in (added or {}).items() if path not in there}
    wanted = {path: leaf for path, leaf in named if _is_array(leaf) and path not in new}
    _check_model(folder, there, wanted, cast)
    parts = read_parts(folder, [(there[path], _wanted_boxes(leaf)) for path, leaf in wanted.items()])
    placed = {path: _place(path, part, wanted[path]) for path, part in zip(wanted, parts, strict=True)}
    for path, leaf in named:
        if path in new:
            placed[path] = _place(path, {whole(()): np.asarray(new[path])}, leaf)
    return tree_unflatten(structure, [placed.get(path, leaf) for path, leaf in named])


def _named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    leaves, structure = tree_flatten_with_path(tree)
    named = [(_name(path), leaf) for path, leaf in leaves]
    taken: set[str] = set()
    for name, _ in named:
        if name in taken:
            raise ValueError(f"two leaves of the tree are named {name}; rename one of their keys")
        taken.add(name)
    return named, structure


def _name(path: tuple[Any, ...]) -> str:
    # The array inside a NamedArray has index 0 and no name; use the NamedArray's name.
    if path and path[-1] == FlattenedIndexKey(0):
        path = path[:-1]
    return keystr(path, simple=True, separator=".")


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _check_model(folder: str, there: dict[str, SavedArray], wanted: dict[str, Any], cast: bool) -> None:
    """Reject a checkpoint from a different model. It is not damaged, so falling back to an older one would not help."""
    for path in [*wanted, *there]:
        if path in there and path in wanted and there[path].shape == wanted[path].shape:
            saved_dtype, dtype = there[path].numpy_dtype, wanted[path].dtype
            castable = cast and all(jnp.issubdtype(d, np.floating) for d in (saved_dtype, dtype))
            if saved_dtype.name == dtype.name or castable:
                continue
        saved = f"{there[path].dtype}{list(there[path].shape)}" if path in there else "missing"
        here = f"{wanted[path].dtype.name}{list(wanted[path].shape)}" if path in wanted else "missing"
        raise InputError(
            f"{folder} is from a different model or optimizer: leaf {path} is {saved} in the checkpoint "
            f"but {here} in this run; use the configuration that it was saved with"
        )


def _sharding(like: Any) -> jax.sharding.Sharding | None:
    """Return the sharding of an array, or None if it is on the default device without being committed to it."""
    if isinstance(like, jax.Array) and not like.committed:
        return None
    return getattr(like, "sharding", None)


def _wanted_boxes(like: Any) -> set[Box]:
    sharding = _sharding(like)
    if sharding is None:
        return {whole(like.shape)}
    return {box_of(index, like.shape) for index in sharding.addressable_devices_indices_map(like.shape).values()}


def _place(path: str, parts: dict[Box, np.ndarray], like: Any) -> Any:
    parts = {box: part.astype(like.dtype, copy=False) for box, part in parts.items()}
    if isinstance(like, np.ndarray | np.generic):
        return parts[whole(like.shape)]
    sharding = _sharding(like)
    if sharding is None:
        placed = jax.device_put(parts[whole(like.shape)])
    else:
        placed = jax.make_array_from_callback(like.shape, sharding, lambda index: parts[box_of(index, like.shape)])
    if placed.dtype != like.dtype:
        raise InputError(
            f"leaf {path} is {like.dtype.name}, but JAX converts it to {placed.dtype.name}; enable jax_enable_x64"
        )
    return placed


_numbers = itertools.count()


@dataclass(frozen=True)
class Restored(Generic[Tree]):
    """The result of `restore`.

    Attributes:
        tree: the restored tree.
        step, metadata, run_id: the values that were saved with the tree.
    """

    tree: Tree
    step: int
    metadata: dict[str, JSON]
    run_id: str


def steps(directory: Path | str) -> list[int]:
    """Return the committed steps in a directory in ascending order, or [] if the directory does not exist."""
    return storage_at(directory).steps()


def remove_leftovers(directory: Path | str) -> None:
    """Remove the leftovers of killed saves from a directory. No save may be in progress there."""
    storage_at(directory).remove_leftovers()


def check_writable(directory: Path | str) -> None:
    """Check that the directory can be written to. Call this function before the first save.

    Raises:
        InputError: if the directory cannot be written to.
    """
    storage_at(directory).check_writable()


def remove(directory: Path | str, step: int) -> None:
    """Remove a committed step. If the process is killed midway, only a leftover remains, not an incomplete step."""
    storage_at(directory).remove(step)


def read_step(directory: Path | str, step: int) -> Manifest:
    """Return the manifest of a committed step.

    Raises:
        CheckpointError: if the manifest is damaged.
        InputError: if it was written by another version of this package.
    """
    return _read_manifest(storage_at(directory), step)


def read_arrays(directory: Path | str, manifest: Manifest) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the path and the value of each array in a step, holding one array in memory at a time.

    Raises:
        CheckpointError: if a file is damaged.
    """
    folder = _arrays_folder(storage_at(directory), manifest)
    for saved in manifest.arrays:
        (parts,) = read_parts(folder, [(saved, {whole(saved.shape)})])
        yield saved.path, parts[whole(saved.shape)]


def damage(directory: Path | str, step: int) -> list[str]:
    """Read every byte of a committed step, and return a description of any damage, one line per file.

    Raises:
        InputError: if the step was written by another version of this package.
    """
    return damage_in(storage_at(directory), step)


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

    The array leaves of `like` specify shapes, dtypes and shardings. A `jax.Array` that is not committed to a device, or
    a `jax.ShapeDtypeStruct` without a sharding, is restored on the default device. A numpy array is restored as a numpy
    array. Other leaves are returned unchanged. The sharding and the number of processes may have changed since the
    save; each process reads only the chunks that it needs. All processes in a run must call this function together, and
    all restore the same step.

    Args:
        directory: a path, or a `gs://` or `s3://` URL.
        like: a tree with the wanted structure.
        report: called with a line for each damaged checkpoint that is skipped in favor of an older one.
        step: the step to read; by default, the newest intact step.
        cast: whether to convert floating-point arrays that have a different dtype instead of rejecting them.
        partial: whether to skip saved arrays that are not in `like` instead of rejecting the checkpoint.
        added: values, keyed by path, for scalars that are missing from older checkpoints.
        processes: the run's processes; by default, only this one.

    Raises:
        CheckpointError: if the requested checkpoint or all checkpoints are damaged, or if a process does not answer.
        InputError: if no such checkpoint exists, or its leaves, shapes or dtypes do not match `like`.
    """
    processes = processes or Processes()
    storage = storage_at(directory)
    name = f"restore/{next(_numbers)}"
    # Hosts may see different folders on a shared disk, so all processes use the list from the first process.
    text = processes.broadcast(f"{name}/steps", " ".join(map(str, storage.steps())), PATIENCE)
    found = [int(word) for word in text.split()]
    if not found:
        raise InputError(
            f"{directory} contains no checkpoint (no step-* folder); specify a directory that a run has saved to"
        )
    if step is not None and step not in found:
        raise InputError(
            f"{directory} has no checkpoint for step {step}; available steps: {', '.join(map(str, found))}"
        )

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
    raise CheckpointError(f"{directory} contains no intact checkpoint: {'; '.join(failures)}")


def damage_in(storage: Storage, step: int) -> list[str]:
    """Like `damage`, for an open storage."""
    try:
        manifest = _read_manifest(storage, step)
    except CheckpointError as error:
        return [str(error)]
    return find_damage(_arrays_folder(storage, manifest), manifest.arrays)


def _read_manifest(storage: Storage, step: int) -> Manifest:
    folder = storage.folder(step_name(step))
    manifest = decode_manifest(f"{folder}/{FILE_NAME}", storage.read_manifest(step))
    if manifest.step != step:
        raise CheckpointError(f"{folder}: the manifest belongs to step {manifest.step}")
    return manifest


def _arrays_folder(storage: Storage, manifest: Manifest) -> str:
    return storage.folder(f"{step_name(manifest.step)}/{manifest.folder}")
