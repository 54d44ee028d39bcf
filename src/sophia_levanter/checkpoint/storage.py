"""Checkpoint storage: a folder on disk or a prefix in a bucket, each with its own way of committing a step."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tensorstore as ts

from sophia_levanter.checkpoint.manifest import FILE_NAME, CheckpointError, one_line
from sophia_levanter.errors import InputError
from sophia_levanter.files import check_utf8, read_regular, sync
from sophia_levanter.kvstore import context_spec, kvstore_spec

_STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")
_ARRAYS = re.compile(r"step-\d{8,}/arrays-[0-9a-f]{32}/")
_LEFTOVER = re.compile(r"step-\d{8,}\.(partial|removed)-[0-9a-f]{32}")


class Stage(NamedTuple):
    """The location to which a step is written before it is committed."""

    folder: str  # a folder in the storage; in a bucket, where folders cannot be renamed, the final folder
    arrays: str  # the subfolder for the arrays
    replaces: bool  # whether the stage replaces a damaged checkpoint of the same step


class Storage(Protocol):
    """A store of checkpoints, keyed by step. Only committed steps are visible.

    Attributes:
        location: the path or URL of the storage, for messages.
    """

    location: str

    def steps(self) -> list[int]:
        """Return the committed steps in ascending order."""

    def folder(self, name: str) -> str:
        """Return the path or URL of a folder in the storage."""

    def read_manifest(self, step: int) -> bytes:
        """Return the content of a committed step's manifest. Raise `CheckpointError` if it cannot be read."""

    def check_writable(self) -> None:
        """Raise an `InputError` if the storage cannot be written to. Call this method before the first save."""

    def new_stage(self, step: int, *, replaces: bool) -> Stage:
        """Create a stage for a save, separate from all other stages."""

    def sync_stage(self, stage: Stage) -> None:
        """Block until the files written by this host are durable."""

    def sees(self, file: str) -> bool:
        """Return whether a file written by another host is visible on this host."""

    def commit(self, stage: Stage, step: int, manifest: bytes) -> None:
        """Commit the stage as a step. Raise `FileExistsError` if another save has already committed this step."""

    def discard(self, stage: Stage) -> None:
        """Remove the files of a failed save as far as possible.

        Raise `CheckpointError` if the stage had already been removed, because this explains why the save failed.
        """

    def remove(self, step: int) -> None:
        """Remove a committed step. If the process is killed midway, only a leftover remains, not an incomplete step."""

    def remove_leftovers(self) -> None:
        """Remove the leftovers of killed saves. No save may be in progress."""


def storage_at(location: str | Path) -> Storage:
    """Return the storage at a path, or at a `gs://` or `s3://` URL.

    Raises:
        InputError: if the URL has a different scheme or does not specify a bucket.
    """
    check_utf8("the checkpoint folder", str(location))
    scheme, separator, rest = str(location).partition("://")
    if not separator:
        return DiskStorage(Path(location))
    if scheme not in ("gs", "s3"):
        raise InputError(f"{location} has an unsupported scheme; use a path, gs:// or s3://")
    if not rest.strip("/") or rest.startswith("/"):
        raise InputError(f"{location} does not specify a bucket; use {scheme}://BUCKET/FOLDER")
    return BucketStorage(str(location).rstrip("/"))


def step_name(step: int) -> str:
    return f"step-{step:08d}"


class DiskStorage:
    """Storage in a folder, created by the first save. A step has a temporary name until it is complete and durable."""

    def __init__(self, path: Path) -> None:
        self.location = str(path)
        self._path = path
        # Once the folder has existed, it is never recreated: a removed run directory must not reappear incomplete.
        self._was_there = path.is_dir()

    def steps(self) -> list[int]:
        if not self._path.is_dir():
            return []
        names = (_STEP.fullmatch(entry.name) for entry in self._path.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def folder(self, name: str) -> str:
        return str(self._path / name)

    def read_manifest(self, step: int) -> bytes:
        file = self._path / step_name(step) / FILE_NAME
        try:
            return read_regular(file)
        except OSError as error:
            raise CheckpointError(f"{file}: {one_line(error)}") from error

    def check_writable(self) -> None:
        probe = self._path / _aside(0, "partial")
        try:
            probe.mkdir(parents=True)
            (probe / FILE_NAME).touch()
            shutil.rmtree(probe)
        except OSError as error:
            raise InputError(f"{self.location} is not writable: {error.strerror}; choose another directory") from error

    def new_stage(self, step: int, *, replaces: bool) -> Stage:
        folder = _aside(step, "partial")
        new = [path for path in (self._path, *self._path.parents) if not path.exists()]
        if new and self._was_there:
            raise CheckpointError(f"{self.location} was removed or renamed during the run")
        (self._path / folder).mkdir(parents=not self._was_there)
        for path in new:
            sync(path.parent)
        self._was_there = True
        (self._path / folder / FILE_NAME).touch()  # if it is missing later, the folder was removed
        return Stage(folder, "arrays", replaces)

    def sync_stage(self, stage: Stage) -> None:
        # tensorstore has already synced the files and their directory entries.
        arrays = self._path / stage.folder / stage.arrays
        if arrays.exists():
            sync(arrays)

    def sees(self, file: str) -> bool:
        return (self._path / file).exists()

    def commit(self, stage: Stage, step: int, manifest: bytes) -> None:
        folder, final = self._path / stage.folder, self._path / step_name(step)
        with (folder / FILE_NAME).open("r+b") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        sync(folder)
        if stage.replaces and final.exists():
            self.remove(step)
        try:
            folder.rename(final)  # fails if `final` is a non-empty folder
        except OSError as error:
            if final.exists():
                raise FileExistsError(f"{final} was created by another process in the meantime") from error
            raise
        sync(self._path)

    def discard(self, stage: Stage) -> None:
        folder = self._path / stage.folder
        step, _, _ = stage.folder.partition(".")
        # If the rename succeeded and only the sync failed, the stage was not removed.
        was_removed = not (folder / FILE_NAME).exists() and not (self._path / step / FILE_NAME).exists()
        shutil.rmtree(folder, ignore_errors=True)
        if was_removed:
            # tensorstore recreates removed folders while it writes.
            with contextlib.suppress(OSError):
                self._path.rmdir()
                self._path.parent.rmdir()
            raise CheckpointError(f"{folder} was removed or renamed while it was being written")

    def remove(self, step: int) -> None:
        removed = self._path / _aside(step, "removed")
        with contextlib.suppress(FileNotFoundError):  # another process has already removed it
            (self._path / step_name(step)).rename(removed)
        sync(self._path)
        _delete(removed)

    def remove_leftovers(self) -> None:
        if self._path.is_dir():
            for entry in list(self._path.iterdir()):
                if _LEFTOVER.fullmatch(entry.name):
                    _delete(entry)


class BucketStorage:
    """Storage under a bucket prefix. A conditional write of the manifest commits a step, so only one save succeeds.

    Each save writes its arrays under its own prefix, which is recorded in the manifest, so two saves never mix.
    """

    def __init__(self, url: str) -> None:
        self.location = url
        self._opened: ts.KvStore | None = None

    @property
    def _store(self) -> ts.KvStore:
        if self._opened is None:
            try:
                self._opened = ts.KvStore.open(kvstore_spec(self.location), context=ts.Context(context_spec())).result()
            except ValueError as error:
                raise InputError(f"{self.location}: {one_line(error)}") from error
        return self._opened

    def steps(self) -> list[int]:
        names = (_STEP.fullmatch(key.removesuffix(f"/{FILE_NAME}")) for key in self._keys())
        return sorted(int(name[1]) for name in names if name)

    def folder(self, name: str) -> str:
        return f"{self.location}/{name}"

    def read_manifest(self, step: int) -> bytes:
        key = f"{step_name(step)}/{FILE_NAME}"
        try:
            found = self._store.read(key).result()
        except Exception as error:  # the client raises many kinds of errors
            raise CheckpointError(f"{self.location}/{key}: {one_line(error)}") from error
        if found.state != "value":
            raise CheckpointError(f"{self.location}/{key} is missing")
        return bytes(found.value)

    def check_writable(self) -> None:
        # If objects cannot be deleted, the probe remains as a leftover.
        probe = f"{step_name(0)}/arrays-{uuid.uuid4().hex}/probe"
        try:
            self._do(self._store.write(probe, b""))
            self._do(self._store.write(probe, None))
        except CheckpointError as error:
            raise InputError(f"{error}; the bucket must permit writing and deleting objects") from error

    def new_stage(self, step: int, *, replaces: bool) -> Stage:
        return Stage(step_name(step), f"arrays-{uuid.uuid4().hex}", replaces)

    def sync_stage(self, stage: Stage) -> None:
        """Do nothing: an object is durable once its write has been acknowledged."""

    def sees(self, file: str) -> bool:
        return True

    def commit(self, stage: Stage, step: int, manifest: bytes) -> None:
        key = f"{step_name(step)}/{FILE_NAME}"
        there = self._do(self._store.read(key))
        if there.state == "missing" or stage.replaces:
            if self._do(self._store.write(key, manifest, if_equal=there.stamp.generation)).generation:
                with contextlib.suppress(CheckpointError):  # the step is committed; the others are leftovers
                    self._remove_other_arrays(stage)
                return
            there = self._do(self._store.read(key))
        if there.value != manifest:  # identical if our write succeeded but its response was lost
            raise FileExistsError(f"{self.location}/{key} was created by another process in the meantime")

    def discard(self, stage: Stage) -> None:
        with contextlib.suppress(CheckpointError):  # any remaining files are leftovers
            # The manifest may have been written even if the request failed.
            if stage.arrays.encode() not in self._do(self._store.read(f"{stage.folder}/{FILE_NAME}")).value:
                self._delete_all(f"{stage.folder}/{stage.arrays}/")

    def remove(self, step: int) -> None:
        self._do(self._store.write(f"{step_name(step)}/{FILE_NAME}", None))
        self._delete_all(f"{step_name(step)}/")

    def remove_leftovers(self) -> None:
        saves = self._saves()
        manifests = {step_name(step): self.read_manifest(step) for step in self.steps()} if saves else {}
        for prefix in saves:
            step, arrays, _ = prefix.split("/")
            if arrays.encode() not in manifests.get(step, b""):
                self._delete_all(prefix)

    def _remove_other_arrays(self, stage: Stage) -> None:
        if stage.replaces:
            for prefix in self._saves() - {f"{stage.folder}/{stage.arrays}/"}:
                if prefix.startswith(f"{stage.folder}/"):
                    self._delete_all(prefix)

    def _saves(self) -> set[str]:
        """Return the prefix of the arrays of each save, finished or not."""
        return {found[0] for key in self._keys() if (found := _ARRAYS.match(key))}

    def _keys(self) -> list[str]:
        return [key.decode() for key in self._do(self._store.list())]

    def _delete_all(self, prefix: str) -> None:
        self._do(self._store.delete_range(ts.KvStore.KeyRange(prefix, prefix.removesuffix("/") + "0")))

    def _do(self, request: Any) -> Any:
        try:
            return request.result()
        except Exception as error:  # the client raises many kinds of errors
            raise CheckpointError(f"{self.location}: {one_line(error)}") from error


def _delete(path: Path) -> None:
    """Remove a leftover. Files that cannot be removed yet, such as open files on NFS, are removed at a later start."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _aside(step: int, kind: str) -> str:
    return f"{step_name(step)}.{kind}-{uuid.uuid4().hex}"
