"""Resume a run: find its checkpoints, restore them, and check that they match the run."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from sophia_levanter import checkpoint
from sophia_levanter.checkpoint import Restored
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import build_config, load_config
from sophia_levanter.config.files import flatten
from sophia_levanter.config.settings import free_settings
from sophia_levanter.errors import InputError
from sophia_levanter.partition.processes import PATIENCE, Processes, wait_for_all
from sophia_levanter.run.directory import RUN_ID, RunDirectory, changed_fields, check_same_run
from sophia_levanter.run.loading import newest_manifest
from sophia_levanter.tracking.console import Console
from sophia_levanter.tracking.jsonl import lines_of
from sophia_levanter.training.checkpoints import is_of_training
from sophia_levanter.training.step import TrainState

if TYPE_CHECKING:
    from sophia_levanter.run.run import Run

# Leaves missing from older checkpoints, with their initial values. The next refresh corrects `steps_since_refresh`.
ADDED_LEAVES = {"optimizer_state.steps_since_refresh": 0}

# All processes roll back together, so they agree on the number of each rollback.
_rollbacks = itertools.count()


def find_checkpoints(directory: RunDirectory, processes: Processes, console: Console) -> bool:
    """Return whether there are checkpoints to resume from. Lock the directory, unless `directory.resume` is `never`.

    Raises:
        InputError: if `directory.resume` is `never` but checkpoints exist, or if there are no checkpoints even though
            `directory.resume` is `always` or the run has already saved one.
    """
    if directory.resume != "never":
        processes.on_process_zero("lock", directory.lock)
    # The first process decides for all processes, because hosts may see different contents on a shared disk.
    found = str(bool(checkpoint.steps(directory.checkpoints)))
    is_saved = processes.broadcast("saved", found, PATIENCE) == "True"
    if directory.resume == "never" and is_saved:
        raise InputError(
            f"trainer.checkpoint_dir {directory.checkpoints} already contains checkpoints; use --resume auto to "
            "continue that run, or another --trainer.checkpoint_dir to start a new one"
        )
    if directory.resume == "always" and not is_saved:
        raise InputError(
            f"--resume {directory.path}: {directory.checkpoints} contains no checkpoint to resume from; "
            f"start the run with --config FILE --trainer.run_dir {directory.path} --resume auto"
        )
    if directory.resume == "if_saved" and not is_saved:
        processes.on_process_zero("begin", lambda: _check_not_begun(directory, console))
    return is_saved


def restore(run: Run) -> Restored[TrainState]:
    """Restore the run's newest intact checkpoint.

    Raises:
        CheckpointError: if no checkpoint is intact.
        InputError: if the checkpoint does not match the model or the optimizer.
    """
    return checkpoint.restore(
        run.directory.checkpoints,
        run.partition.abstract(run.initial_state),
        report=run.console.notice,
        cast=run.config.trainer.cast_checkpoint,
        added=ADDED_LEAVES,
        processes=run.processes,
    )


def check_resumable(run: Run, restored: Restored[TrainState]) -> None:
    """Check that a run can continue from a checkpoint, and report what has changed since the checkpoint was saved.

    Raises:
        InputError: if the checkpoint belongs to a different run, or the model or the training text has changed.
    """
    directory, console = run.directory, run.console
    own = run.processes.broadcast("run id", directory.run_id or "", PATIENCE)
    if own and restored.run_id != own:
        raise InputError(
            f"--resume {directory.path}: step {restored.step} in {directory.checkpoints} was saved "
            f"by run {restored.run_id}, but this is run {own}; move that step elsewhere, or remove "
            f"{directory.path / RUN_ID} to resume from it"
        )
    saved_config: Any = restored.metadata.get("config")
    if not is_of_training(restored.metadata):
        raise InputError(f"{directory.checkpoints} contains checkpoints that were not saved by a training run")
    # Use the current metrics and callbacks, which do not affect results, because unregistered names would be rejected.
    saved_config["trainer"] |= {name: list(getattr(run.config.trainer, name)) for name in ("metrics", "callbacks")}
    old_config = build_config([flatten(saved_config, Path(f"{directory.checkpoints}/step-{restored.step:08d}"))])
    if directory.resume == "if_saved":
        check_same_run("checkpoint_dir", str(directory.checkpoints), old_config, run.config)
    for name, old, new in changed_fields(old_config, run.config):
        if name.startswith("model.") and name not in free_settings(run.config.model):
            raise InputError(f"--resume {directory.path}: {name} was {old} and is now {new}, which changes the model")
        if name == "trainer.initial_weights":
            raise InputError(
                f"--resume {directory.path}: {name} was {old} and is now {new}, but the run has already started; "
                "use another --trainer.run_dir to start a new one"
            )
    if not _is_same_text(restored.metadata["data"], run.provenance["data"]):
        raise InputError(
            f"--resume {directory.path}: the training text has changed since the run began: it was "
            f"{restored.metadata['data']} and is now {run.provenance['data']}; restore it, or start a new run"
        )
    if not _is_same_text(restored.metadata["validation"], run.provenance["validation"]):
        console.line("the validation text has changed since the run began; earlier and later losses are not comparable")
    console.resumed(restored.step, directory.path)
    began_with, now = restored.metadata["environment"], run.provenance["environment"]
    if began_with != now:
        console.line(f"losses may differ in low-order bits: the run started on {began_with} and is resuming on {now}")
    for name, old, new in changed_fields(old_config, run.config):
        if name not in ("trainer.run_dir", "mesh.coordinator", "mesh.process_id"):
            console.line(f"{name} was {old} and is now {new}")
        if name == "trainer.batch_size":
            console.line("the new batch size skips or repeats some sequences; trainer.batch_size_changes avoids that")
    then, now = (learning_rates(config, restored.step + 1) for config in (old_config, run.config))
    differ = np.flatnonzero(then != now)
    if differ.size:
        step = differ[-1]
        console.line(
            f"the schedule changed: at step {step} the learning rate was {then[step]:.3g} and is now {now[step]:.3g}"
            + f"; it is the same before step {differ[0]}" * bool(differ[0])
        )
    before, after = (_slow_warmup(config) for config in (old_config, run.config))
    if before != after and restored.step < max(before, after):
        console.line(
            f"the schedule changed: alpha and b3 grew over {before:,} steps and now grow over {after:,}; "
            f"set optimizer.slow_warmup to {before} to keep the old schedule"
        )


def learning_rates(config: TrainConfig, num_steps: int) -> np.ndarray:
    """Return the learning rates of a run's first `num_steps` steps as float32 [step]."""
    schedule = config.optimizer.build_schedule(config.trainer.num_train_steps)
    return np.asarray(jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(jnp.arange(num_steps)))


def _slow_warmup(config: TrainConfig) -> int:
    """Return the number of steps over which AdEMAMix's alpha and b3 grow, or 0 for other optimizers."""
    return config.optimizer.step_counts(config.trainer.num_train_steps).get("slow_warmup", 0)


def steps_in_common(a: TrainConfig, b: TrainConfig) -> int:
    """Return the number of initial steps for which two runs have bitwise identical learning rates."""
    num_steps = min(config.trainer.num_train_steps for config in (a, b))
    differ = np.flatnonzero(learning_rates(a, num_steps) != learning_rates(b, num_steps))
    return int(differ[0]) if differ.size else num_steps


def with_saved_rows(config: TrainConfig, directory: RunDirectory) -> TrainConfig:
    """Set the number of embedding rows from the newest checkpoint, unless the configuration specifies it."""
    manifest = newest_manifest(directory.checkpoints)
    if config.model.vocab_rows is not None or manifest is None or not is_of_training(manifest.metadata):
        return config
    saved: Any = manifest.metadata["config"]
    model = dataclasses.replace(config.model, vocab_rows=saved.get("model", {}).get("vocab_rows"))
    return dataclasses.replace(config, model=model)


def _check_not_begun(directory: RunDirectory, console: Console) -> None:
    """Check that a run without checkpoints never saved one. Saved checkpoints might be on a disk that is now missing.

    A run that was killed before its first checkpoint starts over with a warning.

    Raises:
        InputError: if metrics.jsonl has so many lines that the run must have saved a checkpoint.
    """
    if not directory.metrics_file.exists() or not directory.metrics_file.stat().st_size:
        return
    lines = sum(1 for _ in lines_of(directory.metrics_file))
    every = load_config(directory.config_file).trainer.checkpoint_interval
    # A run passes its second save only after the first save is committed, and each step writes at most three lines: its
    # own, an evaluation and the scores on the tasks.
    if lines > 6 * every:
        raise InputError(
            f"{directory.metrics_file} has {lines} lines, but {directory.checkpoints} contains no checkpoint; restore "
            "the checkpoints, or remove the metrics to start again from step 0"
        )
    console.notice(f"WARNING: {directory.checkpoints} contains no checkpoint; the run starts again from step 0")


def best_so_far(
    run: Run, restored: Restored[TrainState], name: Literal["best", "best_evaluation"]
) -> dict[str, Any] | None:
    """Return the step and loss of the best saved or best evaluated state, or None if later losses are not comparable.

    Older checkpoints contain only the best saved one.
    """
    saved_config: Any = restored.metadata["config"]
    sequences = saved_config.get("trainer", {}).get("evaluation_windows")
    masked = saved_config.get("data", {}).get("mask_documents", False)
    same_sequences = sequences == run.config.trainer.evaluation_windows and masked == run.config.data.mask_documents
    same_text = _is_same_text(restored.metadata["validation"], run.provenance["validation"])
    best: Any = restored.metadata.get(name, restored.metadata.get("best"))
    is_sound = isinstance(best, dict) and isinstance(best.get("step"), int)
    is_sound = is_sound and isinstance(best.get(run.config.trainer.best_metric), float)
    return best if is_sound and same_sequences and same_text else None


def tokens_so_far(run: Run, step: int) -> int:
    """Return the number of tokens in the steps before `step`.

    Older checkpoints do not contain it, so it is computed from the configured batch sizes.
    """
    saved: Any = None if run.restored is None else run.restored.metadata.get("tokens")
    return saved if isinstance(saved, int) else run.batches.sequences_between(0, step) * run.config.model.seq_len


def _is_same_text(saved: Any, now: Any) -> bool:
    """Return whether the current description of a corpus matches the saved one, ignoring fields that were not saved."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return all(_is_same_text(value, now.get(name)) for name, value in saved.items())
    if isinstance(saved, list) and isinstance(now, list):
        return len(saved) == len(now) and all(map(_is_same_text, saved, now))
    return bool(saved == now)


def restore_before(run: Run, wrong: range, skipped_windows: int) -> Restored[TrainState] | None:
    """Restore the last checkpoint saved before the failed steps, and skip the data used up to the end of those steps.

    Later checkpoints are removed, because a restarted run would resume from them.

    Args:
        run: the run.
        wrong: the failed steps.
        skipped_windows: the number of sequences that the run has already skipped.

    Returns:
        The restored checkpoint, or None if no earlier checkpoint exists.

    Raises:
        CheckpointError: if no earlier checkpoint is intact.
    """
    directory = run.directory.checkpoints
    # The first process decides for all processes, because a listing of a shared disk may be stale on other hosts.
    listed = " ".join(map(str, checkpoint.steps(directory)))
    saved = list(map(int, run.processes.broadcast(f"rollback/{next(_rollbacks)}", listed, PATIENCE).split()))
    later = [step for step in saved if step > wrong.start]
    if len(later) == len(saved):
        run.console.line("cannot roll back: no checkpoint was saved before the skipped steps")
        return None
    if run.processes.is_first:
        for step in later:
            checkpoint.remove(directory, step)
    wait_for_all("later ones are removed")
    restored = restore(run)
    passed = run.batches.sequences_between(restored.step, wrong.stop)
    run.console.line(f"rolling back to step {restored.step} and skipping the {passed} sequences used since then")
    sequences = run.partition.place(np.asarray(skipped_windows + passed, np.int32))
    tree = eqx.tree_at(lambda state: state.skipped_windows, restored.tree, sequences)
    return dataclasses.replace(restored, tree=tree)
