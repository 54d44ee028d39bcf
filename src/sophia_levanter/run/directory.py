"""The run directory (`config.yaml`, `metrics.jsonl`, `checkpoints/`, `profile/`), and checks before a run uses it."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from sophia_levanter import files
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.build import flat
from sophia_levanter.config.command_line import Command, dump_config, load_config
from sophia_levanter.config.data import MixturePart, validation_field
from sophia_levanter.config.run import TrackingConfig, with_steps
from sophia_levanter.data.sources import absolute_source, absolute_tokenizer
from sophia_levanter.errors import DirectoryInUse, InputError

# Settings that `--resume auto` may change: the run's length, and settings that do not affect its results, such as the
# coordinator's address.
MAY_DIFFER = (
    "plugins",
    "trainer.metrics",
    "trainer.callbacks",
    "trainer.num_train_steps",
    "trainer.profile_steps",
    "trainer.run_dir",
    "trainer.checkpoint_dir",
    "trainer.checkpoint_every",
    "trainer.checkpoint_minutes",
    "trainer.keep_checkpoints",
    "trainer.keep_every",
    "trainer.keep_best",
    "trainer.best_by",
    "trainer.tasks",
    "trainer.tasks_every",
    "trainer.cast_checkpoint",
    "trainer.step_timeout",
    "trainer.log_every",
    "data.on_leak",
    "data.cache_dir",
    "data.num_workers",
    "mesh.coordinator",
    "mesh.num_processes",
    "mesh.process_id",
    "mesh.start_timeout",
    "mesh.heartbeat_timeout",
    *(f"tracking.{field.name}" for field in dataclasses.fields(TrackingConfig)),
)
LOCK_NAME = ".lock"
RUN_ID = ".run_id"
UNFINISHED_CONFIG = "config.yaml.tmp"
LAUNCH = "launch"  # the launcher's record of the run

# The open files whose locks this process holds. Closing a file releases its lock.
_locks: dict[Path, IO[str]] = {}


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The directory in which a run stores its files.

    Attributes:
        path: the path of the directory.
        resume: `never` for a new run, `if_saved` to continue from a checkpoint if one exists, `always` to require one.
        checkpoint_dir: the path or URL of the checkpoints; by default, `checkpoints` in the run directory.
    """

    path: Path
    resume: Literal["never", "if_saved", "always"]
    checkpoint_dir: str | None = None

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def run_id(self) -> str | None:
        """The id under which the run saves its checkpoints, or None if the directory does not contain an id.

        Raises:
            NotRegular: if the file that should contain the id is not a regular file.
        """
        try:
            return files.read_regular(self.path / RUN_ID, 1000).decode(errors="replace").strip() or None
        except FileNotFoundError:
            return None

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path | str:
        return self.path / "checkpoints" if self.checkpoint_dir is None else self.checkpoint_dir

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def lock(self) -> None:
        """Create and lock the run directory and, if it is separate and local, the checkpoint directory.

        The locks are held until `unlock` is called or this process ends.

        Raises:
            DirectoryInUse: if another process has locked one of the directories.
            InputError: if one of the directories cannot be created or written to.
        """
        for field, path in self._lockable():
            _lock(field, path)

    def unlock(self) -> None:
        """Release the locks."""
        for _, path in self._lockable():
            if lock := _locks.pop(path, None):
                lock.close()

    def _lockable(self) -> list[tuple[str, Path]]:
        places = [("run_dir", self.path)]
        if self.checkpoint_dir is not None and "://" not in self.checkpoint_dir:
            places.append(("checkpoint_dir", Path(self.checkpoint_dir)))
        return places

    def make_checkpoints(self) -> None:
        """Create the checkpoint folder if it belongs in the run directory.

        Raises:
            InputError: if the folder cannot be created.
        """
        if self.checkpoint_dir is None:
            with _naming("run_dir", self.path):
                Path(self.checkpoints).mkdir(exist_ok=True)

    def write_run_id(self, run_id: str) -> None:
        """Write the run's id to the run directory if the checkpoints are stored there too.

        If the checkpoints are elsewhere, each host may have its own run directory, and one of these directories could
        retain the id of an attempt that never saved a checkpoint.

        Raises:
            InputError: if the id cannot be written.
        """
        if self.checkpoint_dir is None:
            with _naming("run_dir", self.path):
                files.write_atomically(self.path / RUN_ID, f"{run_id}\n".encode())

    def write_config(self, config: TrainConfig) -> None:
        """Write the resolved configuration to the directory.

        Raises:
            InputError: if the configuration cannot be written. No partial file is left behind.
        """
        with _naming("run_dir", self.path):
            files.write_atomically(self.config_file, dump_config(config).encode())


def choose_run_directory(command: Command) -> tuple[RunDirectory, TrainConfig]:
    """Choose the run directory for a command without creating it. Also return the configuration with absolute paths.

    Raises:
        InputError: if the directory contains another run, or `--resume auto` is given without `trainer.run_dir`.
    """
    assert command.config is not None
    given = command.config.trainer.run_dir
    if isinstance(command.resume, Path):
        run = RunDirectory(Path(os.path.abspath(command.resume)), "always")
    elif given is None:
        if command.resume == "auto":
            raise InputError("--resume auto requires --trainer.run_dir, the directory that later attempts resume from")
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        run = RunDirectory(Path("runs", f"{command.config_name}-{now}").absolute(), "never")
    else:
        run = RunDirectory(Path(os.path.abspath(os.path.expanduser(given))), "never")
    config = with_absolute_paths(command.config)
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, run_dir=str(run.path)))
    run = dataclasses.replace(run, checkpoint_dir=config.trainer.checkpoint_dir)
    if not isinstance(command.resume, Path) and _holds_files(run.path):
        if command.resume != "auto":
            raise InputError(
                f"trainer.run_dir {run.path} already contains files; use --resume auto to continue its run, "
                "or another --trainer.run_dir to start a new one"
            )
        _check_config_file(run, config)
        return dataclasses.replace(run, resume="if_saved"), config
    if command.resume == "auto" and run.checkpoint_dir is not None:
        # The run directory may have been lost with its machine, even though the checkpoints still exist.
        return dataclasses.replace(run, resume="if_saved"), config
    return run, config


def _holds_files(path: Path) -> bool:
    with _naming("run_dir", path):
        str(path).encode("utf-8")
        if path.exists() and not path.is_dir():
            raise InputError(f"trainer.run_dir {path} is a file; specify a directory")
        return path.is_dir() and any(
            entry.name not in (LOCK_NAME, UNFINISHED_CONFIG, LAUNCH) for entry in path.iterdir()
        )


def _lock(field: str, path: Path) -> None:
    if path in _locks:
        return
    with _naming(field, path):
        path.mkdir(parents=True, exist_ok=True)
        lock = files.lock(path / LOCK_NAME)
    if lock is None:
        raise DirectoryInUse(
            f"trainer.{field} {path} is in use by another process; wait for it or choose another directory"
        )
    _locks[path] = lock


@contextmanager
def _naming(field: str, path: Path) -> Iterator[None]:
    """Convert an `OSError` or `ValueError` about a directory into an `InputError` that names the directory."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        raise InputError(f"trainer.{field} {shown} cannot be used: {reason}; choose another directory") from error


def _check_config_file(run: RunDirectory, config: TrainConfig) -> None:
    if not run.config_file.exists():
        raise InputError(f"trainer.run_dir {run.path} contains files but no run; specify an empty or new directory")
    check_same_run("run_dir", str(run.path), load_config(run.config_file), config)


def check_same_run(field: str, place: str, old: TrainConfig, new: TrainConfig) -> None:
    """Check that `--resume auto` continues the same run.

    Args:
        field: the trainer setting that specifies `place`.
        place: the location of the earlier run.
        old: the configuration of the earlier run.
        new: the configuration of this command.

    Raises:
        InputError: if the configurations differ in a setting that may not change.
    """
    for name, before, after in changed_fields(old, new):
        # If `vocab_rows` is not set, it is taken from the initial weights.
        if name not in MAY_DIFFER and (name, after) != ("model.vocab_rows", None):
            changes = f", or continue that run with main --resume {place}" * (field == "run_dir")
            raise InputError(
                f"trainer.{field} {place} contains another run: its {name} is {before!r}, not {after!r}; "
                f"choose another --trainer.{field}{changes}"
            )


def changed_fields(old: TrainConfig, new: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Return (name, old value, new value) for each field that differs between two configurations.

    A fraction is considered equal to the number of steps or the learning rate that it resolves to.
    """
    before, after = flat(old), flat(new)
    steps = [_in_steps(config) for config in (old, new)]
    names = [*before, *(name for name in after if name not in before)]
    differ = [name for name in names if all(a.get(name) != b.get(name) for a, b in ((before, after), steps))]
    return [(name, before.get(name), after.get(name)) for name in differ]


def _in_steps(config: TrainConfig) -> dict[str, Any]:
    counts = config.optimizer.step_counts(config.trainer.num_train_steps)
    return flat(with_steps(config)) | {f"optimizer.{name}": count for name, count in counts.items()}


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the configuration with all paths to data, tasks, weights and checkpoints made absolute."""
    data, trainer = config.data, config.trainer
    train: str | tuple[MixturePart, ...]
    if isinstance(data.train, str):
        train = absolute_source(data.train, "data.train")
    else:
        train = tuple(dataclasses.replace(p, source=absolute_source(p.source, "data.train")) for p in data.train)
    sets = {name: absolute_source(source, validation_field(name)) for name, source in data.validation_sets.items()}
    resolved = dataclasses.replace(
        data,
        train=train,
        validation=sets.get("", sets or None),
        tokenizer=absolute_tokenizer(data.tokenizer),
        cache_dir=_absolute(data.cache_dir),
    )
    if trainer.checkpoint_dir is not None and "://" not in trainer.checkpoint_dir:
        trainer = dataclasses.replace(trainer, checkpoint_dir=_absolute(trainer.checkpoint_dir))
    if trainer.tasks:
        tasks = tuple(dataclasses.replace(task, file=_absolute(task.file)) for task in trainer.tasks)
        trainer = dataclasses.replace(trainer, tasks=tasks)
    if trainer.initial_weights is not None:
        trainer = dataclasses.replace(trainer, initial_weights=_absolute(trainer.initial_weights))
    return dataclasses.replace(config, data=resolved, trainer=trainer)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
