"""Train from Python code, for example in a notebook, a thread, or a Ray Tune or Optuna trial."""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.build import encode
from sophia_levanter.config.command_line import Command, build_config, existing_run
from sophia_levanter.config.files import Layer, Setting, flatten, read_layers
from sophia_levanter.errors import InputError
from sophia_levanter.main import plan_run
from sophia_levanter.run.run import train as train_run
from sophia_levanter.run.summary import TrainingResult

__all__ = ["TrainingResult", "train"]

# Error messages show this in place of the path of a configuration file.
_CALL = Path("train()")
# Runs cannot overlap, because a run changes jax's configuration for the whole process.
_one_at_a_time = threading.Lock()


def train(
    config: str | os.PathLike[str] | TrainConfig | Mapping[str, Any] | None = None,
    *,
    resume: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> TrainingResult:
    """Train a model, as `python -m sophia_levanter.main` does.

    This function raises exceptions and never calls `sys.exit`. In the main thread, SIGINT and SIGTERM end training
    after the current step. The state is saved, and the signal is then passed to the program's own handlers, so Ctrl-C
    raises `KeyboardInterrupt` after the save. In other threads, signals are not handled. Concurrent calls from several
    threads run one at a time.

    Args:
        config: a YAML file, a `TrainConfig`, or a mapping of sections; None if and only if `resume` is a directory.
        resume: a run directory to continue, or `"auto"` to continue the run in `trainer.run_dir` if one exists.
        quiet: whether to print only warnings and the result.
        overrides: settings that override `config`: either sections as mappings (`optimizer={"learning_rate": 1e-3}`) or
            fields with dotted names (`**{"optimizer.learning_rate": 1e-3}`). Values may be NumPy scalars or paths.

    Returns:
        The result of the run, including its last step, its metrics, and the paths of its directory and checkpoint.

    Raises:
        InputError: if a setting, a file or the data is invalid.
        TrainingFailed: if too many consecutive steps were skipped (non-finite loss or gradient, or loss spike).
        CheckpointError: if no checkpoint could be read or written.

    Example:
        ```python
        result = train("config/gpt2_nano_sophia.yaml", optimizer={"learning_rate": 1e-3}, quiet=True)
        print(result.validation_loss, result.run_dir)
        ```
    """
    directory, resolved = plan_run(_command(config, resume, quiet, overrides))
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with _one_at_a_time:
            result = train_run(resolved, directory, quiet=quiet)
    finally:
        directory.unlock()
        if in_main_thread:
            for number, handler in handlers:
                # `getsignal` returns None for a handler that was not installed from Python and cannot be restored.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if in_main_thread and result.stopped_by is not None:
        signal.raise_signal(result.stopped_by)
    return result


def _command(config: Any, resume: Any, quiet: bool, overrides: Mapping[str, Any]) -> Command:
    settings = _settings(overrides)
    if resume is None or resume == "auto":
        if config is None:
            raise InputError("train(): config is missing; pass a YAML file, a TrainConfig or a mapping of sections")
        if isinstance(config, str | os.PathLike):
            layers, name = read_layers(Path(config)), Path(config).stem
        else:
            tree = encode(config) if isinstance(config, TrainConfig) else config
            layers, name = [flatten(tree, _CALL)], "train"
        # The random suffix distinguishes trials that start in the same second.
        return Command(build_config(layers, settings), f"{name}-{secrets.token_hex(2)}", resume, quiet=quiet)
    if config is not None:
        raise InputError("train(): config cannot be combined with resume; the run directory has its own config")
    if "trainer.run_dir" in settings:
        raise InputError(
            f"train(): trainer.run_dir cannot be combined with resume {resume}, which already specifies it"
        )
    run_dir = existing_run(Path(resume))
    return Command(build_config(read_layers(run_dir / "config.yaml"), settings), run_dir.name, run_dir, quiet=quiet)


def _settings(overrides: Mapping[str, Any]) -> Layer:
    named = {key: value for key, value in overrides.items() if "." in key}
    sections = flatten({key: value for key, value in overrides.items() if "." not in key}, _CALL)
    values = {key: setting.value for key, setting in sections.items()} | named
    return {key: Setting(_plain(value), _CALL) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """Convert a value to a type that a YAML parser would return."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if dataclasses.is_dataclass(value):
        return encode(value)
    # Convert NumPy and JAX scalars to Python scalars.
    return value.item() if getattr(value, "shape", None) == () else value
