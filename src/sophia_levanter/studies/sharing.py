"""Share the first steps of runs that differ only in length, as long as their learning rates are the same.

A schedule with a stable part and a decay (`optimizer.schedule.type: wsd`) has the same learning rates for all lengths
until the decay. A study with several lengths then trains the stable part once and decays from it for each length
(Hägele et al. 2024, arXiv 2405.18392): a run starts from a checkpoint that the next shorter run saved before its decay.
The result is bitwise identical to that of a run from step 0.
"""

from __future__ import annotations

import itertools
import json
import shutil
import uuid
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sophia_levanter import checkpoint
from sophia_levanter.checkpoint import CheckpointError
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdEMAMixConfig
from sophia_levanter.config.build import encode, flat
from sophia_levanter.config.optimizer import OptimizerConfig
from sophia_levanter.files import write_atomically
from sophia_levanter.run.directory import RunDirectory
from sophia_levanter.run.resuming import steps_in_common

LEAST_SHARE = 0.25  # of the shorter run; fewer steps are not worth the wait until it has saved
SHARED_STEPS = "shared_steps"  # a file in a run directory, and a fact in a record: the number of steps taken over
# Fields that depend on a run's length but do not change its steps.
_OF_LENGTH = (
    "trainer.num_train_steps",
    "trainer.evaluate_every",
    "trainer.checkpoint_every",
    "trainer.log_every",
    "trainer.tasks_every",
)
_WARMUP = "optimizer.warmup"


@dataclass(frozen=True)
class Start:
    """The steps that a longer run takes over from a shorter one.

    Attributes:
        directory: the directory of the shorter run.
        step: the number of steps; the shorter run saves a checkpoint after them.
    """

    directory: Path
    step: int

    @property
    def is_saved(self) -> bool:
        """Whether the shorter run currently has the checkpoint."""
        return self.step in checkpoint.steps(self.directory / "checkpoints")


def find_starts(runs: Mapping[Path, TrainConfig]) -> tuple[dict[Path, Start], str | None]:
    """Find the runs that can take over steps from a shorter run.

    Args:
        runs: a study's configurations, keyed by run directory.

    Returns:
        The start of each such run, keyed by run directory; and one line that explains why other runs train in full
        although part of their schedule is stable, or None.
    """
    starts = {}
    for family in _families(runs):
        for shorter, longer in itertools.pairwise(family):
            if runs[shorter].trainer.num_train_steps == runs[longer].trainer.num_train_steps:
                continue
            step = steps_in_common(runs[shorter], runs[longer])
            step -= step % max(1, step // 50)  # the run saves at a divisor of the step; a prime has too few
            if _is_worth_it(step, runs[shorter]) and _obstacle(runs[longer]) is None:
                starts[longer] = Start(shorter, step)
    hindered = (
        _hindrance(runs[family[0]], runs[family[-1]])
        for family in _families(runs, _WARMUP)
        if not any(directory in starts for directory in family)
    )
    return starts, next((reason for reason in hindered if reason), None)


def _families(runs: Mapping[Path, TrainConfig], *besides: str) -> list[list[Path]]:
    """Groups of directories of runs that differ only in length and in the fields `besides`, shortest runs first."""
    families: dict[str, list[Path]] = defaultdict(list)
    for directory, config in runs.items():
        fields = {name: value for name, value in flat(config).items() if name not in (*_OF_LENGTH, *besides)}
        families[json.dumps(fields, default=str)].append(directory)
    return [sorted(family, key=lambda path: runs[path].trainer.num_train_steps) for family in families.values()]


def _is_worth_it(step: int, shorter: TrainConfig) -> bool:
    return step >= LEAST_SHARE * shorter.trainer.num_train_steps


def _obstacle(config: TrainConfig) -> str | None:
    """The reason why a run cannot take over steps regardless of its learning rate, if there is one."""
    if config.trainer.max_rollbacks:
        return "trainer.max_rollbacks is above 0, and a run that rolls back requires its own checkpoints"
    if not type(config.optimizer).__module__.startswith("sophia_levanter."):
        name = OptimizerConfig.get_choice_name(type(config.optimizer))
        return f"optimizer.type {name} is from a plug-in, which may use the number of steps outside the schedule"
    if isinstance(config.optimizer, AdEMAMixConfig):
        warmup = config.optimizer.slow_warmup
        if warmup is None or 0 < warmup < 1:
            return "optimizer.slow_warmup is a fraction of the run; specify it in steps"
    return None


def _hindrance(shorter: TrainConfig, longer: TrainConfig) -> str | None:
    """Explain why two runs do not share steps that they would share if their warm-ups were the same."""
    if shorter.trainer.num_train_steps == longer.trainer.num_train_steps:
        return None
    warmups = [config.optimizer.warmup for config in (shorter, longer)]
    same = replace(longer, optimizer=replace(longer.optimizer, warmup=warmups[0]))
    if not _is_worth_it(steps_in_common(shorter, same), shorter):
        return None
    reason = _obstacle(longer)
    if reason is None and warmups[0] != warmups[1]:
        reason = f"{_WARMUP} is {warmups[0]} or {warmups[1]} steps; specify it in steps to share the common steps"
    return reason and f"each run trains in full: {reason}"


def begin(start: Start, config: TrainConfig, directory: Path) -> None:
    """Create the directory of a run that takes over steps from a shorter run, as if it had trained and saved them.

    This function does nothing if the directory exists, or if the shorter run has no intact checkpoint at that step, for
    example because it diverged earlier. In the latter case, the run trains in full.

    Args:
        start: the steps to take over.
        config: the run's configuration, including its run directory.
        directory: the run directory.
    """
    if directory.exists() or not start.is_saved:
        return
    # The directory is renamed once it is complete. Without a checkpoint, it would look like a run that lost its own.
    new = RunDirectory(directory.with_suffix(".partial"), "never")
    shutil.rmtree(new.path, ignore_errors=True)
    new.path.mkdir()
    source, target = start.directory / "checkpoints", new.path / "checkpoints"
    try:
        saved: Any = checkpoint.read_step(source, start.step).metadata["config"]
        metadata = {"config": saved | {"trainer": encode(config)["trainer"]}}
        checkpoint.copy_step(source, start.step, target, run_id=uuid.uuid4().hex, metadata=metadata)
    except CheckpointError:
        shutil.rmtree(new.path)
        return
    # The run will drop the lines for later steps.
    shutil.copyfile(RunDirectory(start.directory, "never").metrics_file, new.metrics_file)
    new.write_config(config)
    write_atomically(new.path / SHARED_STEPS, f"{start.step}\n".encode())
    new.path.rename(directory)


def steps_taken_over(directory: Path) -> int:
    """The number of steps that the run in a directory took over from a shorter run."""
    file = directory / SHARED_STEPS
    return int(file.read_text()) if file.exists() else 0
