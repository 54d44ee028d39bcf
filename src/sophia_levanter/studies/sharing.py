"""Share the initial steps of runs that differ only in length, for as long as their learning rates are the same.

A schedule with a stable phase and a decay (`optimizer.schedule.type: wsd`) has the same learning rates for all lengths
until the decay starts. A study with several lengths then trains the stable phase only once and adds a decay for each
length (Hägele et al. 2024, arXiv 2405.18392): each run starts from a checkpoint that the next shorter run saved before
its decay. The result is bitwise identical to training from step 0.
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

LEAST_SHARE = 0.25  # minimum fraction of the shorter run to share; waiting for fewer steps is not worthwhile
SHARED_STEPS = "shared_steps"  # file in the run directory, and key in records, that stores the number of reused steps
# Fields that depend on the length of a run but do not affect its steps.
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
    """The steps that a longer run reuses from a shorter run.

    Attributes:
        directory: the directory of the shorter run.
        step: the number of steps to reuse. The shorter run saves a checkpoint at this step.
    """

    directory: Path
    step: int

    @property
    def is_saved(self) -> bool:
        """Whether the checkpoint of the shorter run currently exists."""
        return self.step in checkpoint.steps(self.directory / "checkpoints")


def find_starts(runs: Mapping[Path, TrainConfig]) -> tuple[dict[Path, Start], str | None]:
    """Find the runs that can reuse steps from a shorter run.

    Args:
        runs: the configurations of a study, keyed by run directory.

    Returns:
        The start of each such run, keyed by run directory, and a line that explains why other runs train from scratch
        even though part of their schedule is stable, or None.
    """
    starts = {}
    for family in _families(runs):
        for shorter, longer in itertools.pairwise(family):
            if runs[shorter].trainer.num_train_steps == runs[longer].trainer.num_train_steps:
                continue
            step = steps_in_common(runs[shorter], runs[longer])
            step -= step % max(1, step // 50)  # the save interval must divide the step, so avoid primes
            if _is_worth_it(step, runs[shorter]) and _obstacle(runs[longer]) is None:
                starts[longer] = Start(shorter, step)
    hindered = (
        _hindrance(runs[family[0]], runs[family[-1]])
        for family in _families(runs, _WARMUP)
        if not any(directory in starts for directory in family)
    )
    return starts, next((reason for reason in hindered if reason), None)


def _families(runs: Mapping[Path, TrainConfig], *besides: str) -> list[list[Path]]:
    """Group the directories of runs that differ only in length and in the fields `besides`, shortest runs first."""
    families: dict[str, list[Path]] = defaultdict(list)
    for directory, config in runs.items():
        fields = {name: value for name, value in flat(config).items() if name not in (*_OF_LENGTH, *besides)}
        families[json.dumps(fields, default=str)].append(directory)
    return [sorted(family, key=lambda path: runs[path].trainer.num_train_steps) for family in families.values()]


def _is_worth_it(step: int, shorter: TrainConfig) -> bool:
    return step >= LEAST_SHARE * shorter.trainer.num_train_steps


def _obstacle(config: TrainConfig) -> str | None:
    """Return the reason why a run cannot reuse steps even if the learning rates are the same, or None."""
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
    """Return the reason, if any, why two runs do not share the steps that they could share with equal warm-ups."""
    if shorter.trainer.num_train_steps == longer.trainer.num_train_steps:
        return None
    warmups = [config.optimizer.warmup for config in (shorter, longer)]
    same = replace(longer, optimizer=replace(longer.optimizer, warmup=warmups[0]))
    if not _is_worth_it(steps_in_common(shorter, same), shorter):
        return None
    reason = _obstacle(longer)
    if reason is None and warmups[0] != warmups[1]:
        reason = f"{_WARMUP} resolves to {warmups[0]} or {warmups[1]} steps; give it in steps so that runs share steps"
    return reason and f"each run trains in full: {reason}"


def begin(start: Start, config: TrainConfig, directory: Path) -> None:
    """Create the directory of a run that reuses steps from a shorter run, as if the run had trained these steps itself.

    This function does nothing if the directory exists, or if the shorter run has no intact checkpoint at that step, for
    example because it diverged earlier. In the latter case, the run trains from scratch.

    Args:
        start: the steps to reuse.
        config: the run's configuration, including its run directory.
        directory: the run directory.
    """
    if directory.exists() or not start.is_saved:
        return
    # Rename the directory once it is complete. Without a checkpoint, it would look like a run whose checkpoint is lost.
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
    # The run will remove the lines for later steps.
    shutil.copyfile(RunDirectory(start.directory, "never").metrics_file, new.metrics_file)
    new.write_config(config)
    write_atomically(new.path / SHARED_STEPS, f"{start.step}\n".encode())
    new.path.rename(directory)


def steps_taken_over(directory: Path) -> int:
    """Return the number of steps that the run in a directory reused from a shorter run."""
    file = directory / SHARED_STEPS
    return int(file.read_text()) if file.exists() else 0
