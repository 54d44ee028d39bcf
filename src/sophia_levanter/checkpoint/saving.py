"""Saving a tree as a checkpoint step, either synchronously or while training continues."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

from sophia_levanter.checkpoint.arrays import HostArray, copied_to_host, host_arrays, with_digests, write_arrays
from sophia_levanter.checkpoint.manifest import (
    JSON,
    CheckpointError,
    Manifest,
    SavedArray,
    encode_manifest,
    one_line,
)
from sophia_levanter.checkpoint.restoring import arrays_of, damage_in, read_step
from sophia_levanter.checkpoint.storage import DiskStorage, Stage, Storage, step_name, storage_at
from sophia_levanter.errors import InputError
from sophia_levanter.files import sync
from sophia_levanter.partition.processes import PATIENCE, NoAnswer, Processes

# All processes save in the same order, so they agree on the number of each save.
_numbers = itertools.count()


@dataclass(frozen=True)
class Retention:
    """The steps to keep after a save. Later steps, left over from before a rollback, are always kept.

    Attributes:
        last: number of newest steps to keep.
        every: also keep all multiples of this number, if given.
        best: also keep this step, if given.

    Raises:
        InputError: if `last` or `every` is below 1.
    """

    last: int
    every: int | None = None
    best: int | None = None

    def __post_init__(self) -> None:
        if self.last < 1 or (self.every is not None and self.every < 1):
            raise InputError(f"retention has last={self.last} and every={self.every}; both must be at least 1")

    def surplus(self, steps: list[int]) -> list[int]:
        """Return the steps to remove from `steps`, which must be in ascending order."""
        return [s for s in steps[: -self.last] if s != self.best and (self.every is None or s % self.every)]


def save(
    directory: Path | str,
    step: int,
    tree: Any,
    *,
    run_id: str,
    metadata: dict[str, JSON],
    retention: Retention,
    processes: Processes | None = None,
) -> str:
    """Write the arrays of `tree` as `directory/step-NNNNNNNN`, durably or not at all.

    Only leaves that are jax or numpy arrays or numpy scalars are saved; other leaves, such as Python numbers, are not.
    All processes in a run must call this function together and share `directory`; each writes some of its shards.

    Args:
        directory: a path, or a `gs://` or `s3://` URL.
        step: the number of steps taken.
        tree: any pytree.
        run_id: the run's id.
        metadata: data about the run, as JSON.
        retention: the steps to keep.
        processes: the run's processes; by default, only this one.

    Returns:
        The path or URL of the step.

    Raises:
        CheckpointError: on every process, if any process fails; the step is then not committed.
        FileExistsError: if an intact checkpoint of this step exists. A damaged checkpoint is replaced; otherwise, a run
            that fell back because of the damage could never get past this step.
    """
    saver = Saver(directory, run_id=run_id, processes=processes)
    return saver._prepared(step, tree, metadata, retention).run()


def copy_step(source: Path, step: int, target: Path, *, run_id: str, metadata: dict[str, JSON]) -> None:
    """Durably copy a step from one local folder to another, as a step of another run.

    The target folder is created if it does not exist. `metadata` contains the entries to add or replace.

    Raises:
        CheckpointError: if the step is damaged.
        FileExistsError: if the target folder already contains the step.
    """
    manifest = read_step(source, step)
    storage = DiskStorage(target)
    stage = storage.new_stage(step, replaces=False)
    arrays = target / stage.folder / stage.arrays
    shutil.copytree(source / step_name(step) / manifest.folder, arrays)
    for path in (arrays, *arrays.rglob("*")):
        sync(path)
    new = replace(manifest, run_id=run_id, folder=stage.arrays, metadata={**manifest.metadata, **metadata})
    storage.commit(stage, step, encode_manifest(new))
    if found := damage_in(storage, step):
        raise CheckpointError(found[0])


class Saver:
    """Saves steps while training continues. `save` returns once the arrays are copied; a background thread writes them.

    Args:
        directory: a path, or a `gs://` or `s3://` URL.
        run_id: the run's id.
        processes: the processes of the run, which must all make the same calls; by default, only this one.
        on_failure: called in the background thread as soon as a save fails, with the error.

    Attributes:
        saved: the path or URL of the last committed step; None before the first commit.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        run_id: str,
        processes: Processes | None = None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self.saved: str | None = None
        self._storage = storage_at(directory)
        self._run_id = run_id
        self._processes = processes or Processes()
        self._on_failure = on_failure
        self._thread: Thread | None = None
        self._failure: Exception | None = None

    def save(self, step: int, tree: Any, *, metadata: dict[str, JSON], retention: Retention) -> None:
        """Wait for the previous save to finish, then start a new one. The arguments are those of the function `save`.

        The arrays may be donated as soon as this method returns.

        Raises:
            CheckpointError, FileExistsError: if the previous save failed.
        """
        self.wait()
        job = self._prepared(step, tree, metadata, retention)
        job = replace(job, arrays=copied_to_host(job.arrays))
        self._thread = Thread(target=self._run, args=(job,), name=f"save of step {step}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of the last save if it failed. Call this method often."""
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Wait until the last save is committed.

        Raises:
            CheckpointError, FileExistsError: if the last save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _prepared(self, step: int, tree: Any, metadata: dict[str, JSON], retention: Retention) -> _Save:
        if step < 0:
            raise InputError(f"the checkpoint step is {step}; it must be at least 0")
        processes = self._processes
        arrays = host_arrays(arrays_of(tree), process=processes.index, num_processes=processes.count)
        # Metadata that JSON cannot represent fails here, before the arrays are written.
        metadata = json.loads(json.dumps(metadata))
        return _Save(self._storage, step, arrays, self._run_id, metadata, retention, processes, next(_numbers))

    def _run(self, job: _Save) -> None:
        try:
            self.saved = job.run()
        except Exception as error:
            self._failure = error
            if self._on_failure is not None:
                self._on_failure(error)


@dataclass(frozen=True)
class _Save:
    """One save. The first process chooses the folder, and commits the step once all files are written."""

    storage: Storage
    step: int
    arrays: Sequence[HostArray]
    run_id: str
    metadata: dict[str, JSON]
    retention: Retention
    processes: Processes
    number: int

    def run(self) -> str:
        """Write and commit the step, remove surplus steps, and return the step's path or URL."""
        final = self.storage.folder(step_name(self.step))
        started = time.monotonic()
        try:
            stage = Stage(*self._by_first("stage", self._stage, PATIENCE))
            outcome = self._write(stage)
            patience = PATIENCE + time.monotonic() - started
            if not self.processes.is_first:
                self._gather(outcome, patience)  # sends the outcome to the first process
            self._by_first("commit", lambda: self._commit(stage, outcome, patience), patience)
            if self.number:
                self.processes.forget(f"save/{self.number - 1}")
        except FileExistsError:
            raise
        except (OSError, NoAnswer, CheckpointError) as error:
            raise CheckpointError(f"{final} could not be written: {one_line(error)}") from error
        return final

    def _stage(self) -> Stage:
        is_there = self.step in self.storage.steps()
        if is_there and not damage_in(self.storage, self.step):
            raise FileExistsError(
                f"{self.storage.folder(step_name(self.step))} already contains a checkpoint; "
                f"remove it to save step {self.step} again"
            )
        return self.storage.new_stage(self.step, replaces=is_there)

    def _write(self, stage: Stage) -> dict[str, Any]:
        """Write this process's files, and return their digests or the reason for a failure."""
        folder = self.storage.folder(f"{stage.folder}/{stage.arrays}")
        try:
            digests = write_arrays(folder, self.arrays, headers=self.processes.is_first)
            self.storage.sync_stage(stage)
        except (OSError, CheckpointError) as error:
            return {"failure": one_line(error)}
        return {"digests": digests}

    def _commit(self, stage: Stage, outcome: dict[str, Any], patience: float) -> None:
        try:
            outcomes = self._gather(outcome, patience)
            for number, one in enumerate(outcomes):
                if "failure" in one:
                    raise CheckpointError((f"process {number}: " if len(outcomes) > 1 else "") + one["failure"])
            arrays = with_digests(self.arrays, [one["digests"] for one in outcomes])
            self._check_shared(stage, arrays, outcomes[1:])
            manifest = Manifest(self.run_id, self.step, time.time(), self.metadata, stage.arrays, arrays)
            self.storage.commit(stage, self.step, encode_manifest(manifest))
        except BaseException:
            self.storage.discard(stage)
            raise
        for old in self.retention.surplus([saved for saved in self.storage.steps() if saved <= self.step]):
            self.storage.remove(old)

    def _check_shared(self, stage: Stage, arrays: list[SavedArray], others: list[dict[str, Any]]) -> None:
        folders = {array.path: array.folder for array in arrays}
        for number, outcome in enumerate(others, start=1):
            for path, names in outcome["digests"].items():
                file = f"{stage.folder}/{stage.arrays}/{folders[path]}/{next(iter(names))}"
                if not self.storage.sees(file):
                    raise CheckpointError(
                        f"process {number} wrote {file}, but it is not visible on this host; "
                        "checkpoints from several hosts require a shared disk or a bucket"
                    )

    def _gather(self, outcome: dict[str, Any], patience: float) -> list[dict[str, Any]]:
        texts = self.processes.gather(f"save/{self.number}/written", json.dumps(outcome), patience)
        return [json.loads(text) for text in texts]

    def _by_first(self, name: str, work: Callable[[], Any], patience: float) -> Any:
        """Call `work` on the first process only. Every process returns its result or raises its error."""
        text = None
        if self.processes.is_first:
            try:
                text = json.dumps({"result": work()})
            except (OSError, NoAnswer, CheckpointError) as error:
                self._broadcast(name, json.dumps({"failure": one_line(error)}), patience)
                raise
        answer = json.loads(self._broadcast(name, text, patience))
        if "failure" in answer:
            raise CheckpointError(answer["failure"])
        return answer["result"]

    def _broadcast(self, name: str, text: str | None, patience: float) -> str:
        return self.processes.broadcast(f"save/{self.number}/{name}", text, patience)
